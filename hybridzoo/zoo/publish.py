"""A checkpoint onto the hub: what may go, checked before a byte does."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hybridzoo.checkpoint import read_config, save
from hybridzoo.checkpoint.golden import plain_files
from hybridzoo.checkpoint.io import COMMITTED, GOLDEN, INDEX_FILE, SUMS, finish_save, locked
from hybridzoo.checkpoint.reader import resolve
from hybridzoo.checkpoint.verify import verify
from hybridzoo.errors import CheckpointError, ConfigError, HubError
from hybridzoo.options import shown
from hybridzoo.zoo import client
from hybridzoo.zoo.cache import PICKLED, WEIGHTS, content_id, is_pickle
from hybridzoo.zoo.card import check_licence, make_card
from hybridzoo.zoo.hub import listing

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
_ask = partial(client.ask, left="nothing was published")


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
        license: the hub's id of it, as apache-2.0; for a card that is written where there is none.
        message: of the commit.

    Raises:
        ConfigError: repo is not owner/name.
        CheckpointError: a pickle, a secret, no card or one of another licence, or a check of
            `verify` that fails.
        HubError: the hub cannot be reached or refuses.
    """
    _check_repo(repo)
    directory = Path(directory)
    names, left_out = _checked(directory)
    files = {name: (directory / name).stat().st_size for name in names}
    if README not in names:
        if license is None:
            raise CheckpointError(
                f"{directory / README}: missing; a published model has a card with its licence. "
                "Write one, or have one written: --license apache-2.0, if that is the licence."
            )
        card = make_card(read_config(directory), repo, license).render()
        if not dry_run:
            (directory / README).write_text(card, encoding="utf-8")
        files[README] = len(card.encode())
    else:
        check_licence(directory / README, license)
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


def _checked(directory: Path) -> tuple[list[str], list[str]]:
    """The files that may go up, and what else lies there; refuses what may not."""
    if (directory / COMMITTED).is_dir():
        # a save was cut: the checks would read its files there, and the upload those they replace
        with locked(directory, "saving to"):
            finish_save(directory)
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
    return names, left_out


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


def _upload(
    directory: Path, plan: Published, revision: str | None, message: str | None
) -> Published:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if client.is_offline():
        raise HubError(
            f"{plan.repo}: HF_HUB_OFFLINE is set; to publish, the hub has to be asked. Unset it."
        )
    repo, hub = plan.repo, client.api()
    _ask(repo, revision, lambda: hub.create_repo(repo, private=plan.private, exist_ok=True))
    is_private = _check_visibility(hub, plan)
    if revision is not None:
        _ask(repo, revision, lambda: hub.create_branch(repo, branch=revision, exist_ok=True))
    now: ModelInfo = _ask(repo, revision, lambda: hub.model_info(repo, revision=revision))
    there = [s.rfilename for s in now.siblings or ()]
    stale = {name for form in _STALE for name in fnmatch.filter(there, form)}
    removed = sorted(stale - plan.files.keys())
    plan = replace(plan, private=is_private, removed=removed)
    files = [CommitOperationAdd(name, directory / name) for name in plan.files]

    def upload() -> None:
        hub.preupload_lfs_files(repo, files, revision=revision, free_memory=False)

    def commit() -> str:
        return hub.create_commit(
            repo,
            [*(CommitOperationDelete(name) for name in removed), *files],
            commit_message=message or "Publish with hybridzoo",
            revision=revision,
            parent_commit=now.sha,
        ).oid

    with _storage_of(hub, repo, revision or "main"):
        _ask(repo, revision, upload)
        return replace(plan, commit=_committed(directory, plan, revision, commit))


def _committed(
    directory: Path, plan: Published, revision: str | None, commit: Callable[[], str]
) -> str:
    """The new commit's id; where its answer was lost on the way, as the branch has it."""
    where = f"{client.endpoint()}/{plan.repo}/commits/{revision or 'main'}"
    left = f"{where} shows whether this was published"
    try:
        return client.ask(plan.repo, revision, commit, left=left)
    except HubError:
        now, listed = listing(plan.repo, revision, left=left)
        if listed.keys() & set(plan.removed):
            raise
        for name, size in plan.files.items():
            there = listed.get(name)
            if there is None or there.size != size:
                raise
            if content_id(directory / name, there.oid) != there.oid:
                raise
        return now


def _check_visibility(hub: HfApi, plan: Published) -> bool:
    """Whether the repository is private; refuses what is public and should not be."""
    repo = plan.repo
    is_private = bool(_ask(repo, None, lambda: hub.model_info(repo)).private)
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
    answer = _ask(repo, revision, lambda: get_session().get(url, headers=build_hf_headers()))
    constants.HF_HUB_DISABLE_XET = answer.status_code == 404
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before
