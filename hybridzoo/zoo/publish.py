"""A checkpoint onto the hub: what may go, checked before a byte does."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from hybridzoo.checkpoint import read_config, save
from hybridzoo.checkpoint.golden import plain_files
from hybridzoo.checkpoint.io import GOLDEN, INDEX_FILE, SUMS
from hybridzoo.checkpoint.reader import resolve
from hybridzoo.checkpoint.verify import verify
from hybridzoo.errors import CheckpointError, ConfigError, HubError
from hybridzoo.options import shown
from hybridzoo.zoo import client
from hybridzoo.zoo.cache import PICKLED, WEIGHTS, is_pickle
from hybridzoo.zoo.card import Card, FrontMatter

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

    from hybridzoo.model import HybridLM

README = "README.md"
# those of verify that need no arithmetic of the model
_CHEAP = ("files", "tensors", "values", "checksums", "tokenizer")
# PyTorch's archives and the pickles of protocols 2 to 5, whatever they are called
_PICKLED = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")
_SECRET_NAMES = re.compile(
    r"\.env(\..*)?|\.netrc|\.pypirc|\.npmrc|\.git-credentials|id_(rsa|dsa|ecdsa|ed25519)"
    r"|.*\.(pem|key|p12|pfx|keystore)|(stored_)?tokens?(\.txt)?|(.*[_.-])?(credentials|secrets?)(\.\w+)?",
    re.IGNORECASE,
)
_SECRETS = {
    "a token of the hub": rb"\bhf_[A-Za-z0-9]{30,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a token of GitHub": rb"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{40})",
    "a key of AWS": rb"\bAKIA[0-9A-Z]{16}\b",
    "an API key": rb"\bsk-[A-Za-z0-9_-]{32,}",
}
_MAX_TEXT = 2**25
# of an earlier version, these would be taken for parts of the new one
_STALE = (WEIGHTS, INDEX_FILE, GOLDEN, SUMS, PICKLED, "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Published:
    """What was published, or would be.

    Attributes:
        repo: owner/name.
        files: name -> bytes.
        left_out: what else lies in the directory: hidden files and folders.
        private: whether only its owner sees the repository.
        removed: files of the repository's last version that the new one is without.
        commit: the new one; None of a dry run.
    """

    repo: str
    files: dict[str, int]
    left_out: list[str]
    private: bool
    removed: list[str]
    commit: str | None = None


def publish(
    directory: str | Path,
    repo: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    revision: str | None = None,
    license: str | None = None,
    message: str | None = None,
) -> Published:
    """Upload a checkpoint in one commit, after its files were checked as `verify` checks them.

    Args:
        directory: ours or a family's, with a card (README.md) that says the licence.
        repo: owner/name; made if missing.
        private: only its owner sees the repository; a public one is refused then.
        dry_run: check everything, ask the hub nothing and upload nothing.
        revision: the branch, made if missing; None is main.
        license: where there is no card, write one of this licence (the hub's id, as apache-2.0)
            into the directory.
        message: of the commit.

    Raises:
        ConfigError: repo is not owner/name.
        CheckpointError: a pickle, a secret, no card, or a check of `verify` that fails.
        HubError: the hub cannot be reached or refuses.
    """
    _check_repo(repo)
    directory = Path(directory)
    names = plain_files(directory) if directory.is_dir() else []
    if (directory / SUMS).is_file():
        names.append(SUMS)
    everything = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    left_out = [name for name in everything if name not in names]
    for name in everything:
        _refuse_name(directory / name)
    for name in names:
        _refuse_content(resolve(directory, name))
    failed = [f for f in verify(directory, only=_CHEAP) if f.status == "failed"]
    if failed:
        raise CheckpointError(f"not published: {failed[0].detail}")
    files = {name: (directory / name).stat().st_size for name in names}
    if README not in names:
        if license is None:
            raise CheckpointError(
                f"{directory / README}: missing; a published model has a card with its licence. "
                "Write one, or have one written: --license apache-2.0, if that is the licence."
            )
        card = _card(directory, repo, license)
        if not dry_run:
            (directory / README).write_text(card, encoding="utf-8")
        files[README] = len(card.encode())
    else:
        _check_card(directory / README)
    plan = Published(repo, dict(sorted(files.items())), left_out, private, [])
    return plan if dry_run else _upload(directory, plan, revision, message)


def push(
    model: HybridLM, repo: str, *, tokenizer: str | Path | None = None, **options: Any
) -> Published:
    """Publish a model in memory.

    Args:
        model: whole, on one process.
        repo: owner/name.
        tokenizer: as of checkpoint.save.
        options: of publish; `license` for the card.

    Raises:
        ConfigError: the model is spread over ranks.
        CheckpointError, HubError: as of publish.
    """
    place = model.parallel
    if any(axis.world > 1 for axis in (place.tp, place.ep, place.pp, place.dp)):
        raise ConfigError(
            "push_to_hub: the model is spread over ranks; one process publishes. Save it with "
            "save_pretrained on every rank, then run `hybridzoo publish` on the directory."
        )
    with TemporaryDirectory() as folder:
        save(model, folder, tokenizer=tokenizer)
        return publish(folder, repo, **options)


def _check_repo(repo: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ConfigError(f"{shown(repo)}: not a repository's name; it is owner/name. Write both.")


def _refuse_name(path: Path) -> None:
    if is_pickle(path.name):
        raise CheckpointError(
            f"{path}: a pickle; it can run code where it is read, and nobody should have to trust "
            "one. Move it elsewhere, or publish what `hybridzoo convert` makes of it."
        )
    if _SECRET_NAMES.fullmatch(path.name) and path.is_file():
        raise CheckpointError(
            f"{path}: a name that secrets have; a published secret is lost. Move it elsewhere."
        )


def _refuse_content(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(4)
        if _PICKLED.match(start):
            raise CheckpointError(
                f"{path}: a pickle or an archive by its content; it can run code where it is read. "
                "Move it elsewhere."
            )
        if path.suffix == ".safetensors" or path.stat().st_size > _MAX_TEXT:
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            for what, form in _SECRETS.items():
                if re.search(form, line):
                    raise CheckpointError(
                        f"{path}: line {number} holds what looks like {what}; a published secret "
                        "is lost. Remove it, and revoke it if others may have seen it."
                    )


def _check_card(path: Path) -> None:
    head, fence, _ = path.read_text(encoding="utf-8").removeprefix("---\n").partition("\n---")
    try:
        front = yaml.safe_load(head) if fence else None
    except yaml.YAMLError as error:
        front = " ".join(str(error).split())
    if not isinstance(front, dict) or not front.get("license"):
        raise CheckpointError(
            f"{path}: no licence in its front matter ({shown(front)}); the hub shows that. "
            "Begin the card with a line of ---, a line such as license: apache-2.0, and ---."
        )


def _card(directory: Path, repo: str, license: str) -> str:
    config = read_config(directory)
    kinds = {branch.config.kind for place in config.places for branch in place}
    front = FrontMatter(
        license=license,
        library_name="hybridzoo",
        pipeline_tag="text-generation",
        tags=tuple(sorted(kinds)),
    )
    body = (
        f"# {config.name}\n\nA hybrid language model of hybridzoo: `{config.pattern}`, "
        f"{config.n_params():,} parameters, d_model {config.d_model}.\n\n## Use\n\n"
        f'```python\nimport hybridzoo\n\nmodel = hybridzoo.load("{repo}")\n```\n'
    )
    return Card(front, body).render()


def _upload(
    directory: Path, plan: Published, revision: str | None, message: str | None
) -> Published:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if client.is_offline():
        raise HubError(
            f"{plan.repo}: HF_HUB_OFFLINE is set; to publish, the hub has to be asked. Unset it."
        )
    repo, hub = plan.repo, client.api()
    client.ask(repo, revision, lambda: hub.create_repo(repo, private=plan.private, exist_ok=True))
    is_private = _check_visibility(hub, plan)
    if revision is not None:
        client.ask(repo, revision, lambda: hub.create_branch(repo, branch=revision, exist_ok=True))
    now: ModelInfo = client.ask(repo, revision, lambda: hub.model_info(repo, revision=revision))
    there = [s.rfilename for s in now.siblings or ()]
    removed = [
        name
        for name in there
        if name not in plan.files and any(fnmatchcase(name, form) for form in _STALE)
    ]
    operations: list[Any] = [CommitOperationDelete(name) for name in removed]
    operations += [CommitOperationAdd(name, directory / name) for name in plan.files]

    def commit() -> str:
        return hub.create_commit(
            repo,
            operations,
            commit_message=message or "Publish with hybridzoo",
            revision=revision,
            parent_commit=now.sha,
        ).oid

    with _storage_of(hub, repo, revision or "main"):
        oid = client.ask(repo, revision, commit)
    return Published(repo, plan.files, plan.left_out, is_private, removed, oid)


def _check_visibility(hub: HfApi, plan: Published) -> bool:
    """Whether the repository is private; refuses what is public and should not be."""
    repo = plan.repo
    is_private = bool(client.ask(repo, None, lambda: hub.model_info(repo)).private)
    if plan.private and not is_private:
        raise HubError(
            f"{repo}: is public already; what is published there all see. Pass --public "
            "(private=False) if that is meant, or choose another name."
        )
    if is_private and not plan.private:
        warnings.warn(
            f"{repo}: is private and stays so; its settings can change that.", stacklevel=4
        )
    return is_private


@contextmanager
def _storage_of(hub: HfApi, repo: str, revision: str) -> Iterator[None]:
    """Xet where the hub has it; the client takes that for granted, and mirrors do not have it."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    before = constants.HF_HUB_DISABLE_XET
    if before or find_spec("hf_xet") is None:
        yield
        return
    url = f"{client.endpoint()}/api/models/{repo}/xet-write-token/{revision}"
    answer = client.ask(repo, revision, lambda: get_session().get(url, headers=build_hf_headers()))
    constants.HF_HUB_DISABLE_XET = answer.status_code == 404
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before
