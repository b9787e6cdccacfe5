"""Checkpoints from the hub: into the cache that its tools share, every byte checked."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from hybridzoo.checkpoint.golden import read_sums
from hybridzoo.checkpoint.io import SUMS
from hybridzoo.errors import CheckpointError, HubError
from hybridzoo.options import shown
from hybridzoo.zoo import client, find_repository
from hybridzoo.zoo.cache import (
    COMMIT,
    CONFIG,
    PICKLED,
    WEIGHTS,
    Progress,
    Snapshot,
    cached,
    check,
    check_sums,
    is_pickle,
    names_among,
    note,
    silent,
    storage,
)

# no more than this is left on a disk by a download
_ROOM_LEFT = 2**26


@dataclass(frozen=True)
class Listed:
    """What the hub lists of a file: bytes, and the SHA-256 of a large or the git id of a small."""

    size: int
    oid: str


def download(
    name_or_repo: str,
    *,
    revision: str | None = None,
    report: Callable[[Snapshot], None] = lambda got: None,
    **options: Any,
) -> Path:
    """Download a model and check every file.

    Args:
        name_or_repo: a name of the zoo that is published on the hub, or owner/name.
        revision: a branch, tag or commit; None is main.
        report: hears which commit it is.
        options: of fetch.

    Returns:
        The directory.

    Raises:
        ConfigError: it is neither, or the name is not published.
        HubError, CheckpointError: as of fetch.
    """
    got = fetch(find_repository(name_or_repo), revision=revision, **options)
    report(got)
    return got.path


def fetch(
    repo: str,
    *,
    revision: str | None = None,
    pickles: bool = False,
    directory: str | Path | None = None,
    only_config: bool = False,
    progress: Progress = silent,
) -> Snapshot:
    """Download what hybridzoo reads of a repository; whole files that are here already stay.

    HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
    Offline, or with a warning where the hub is out of reach, what was downloaded before serves.
    Every file is compared with the hub's id of its content (SHA-256 of large files), and with
    SHA256SUMS where the repository has it.

    Args:
        repo: owner/name.
        revision: a branch, tag or commit; None is main.
        pickles: take pytorch_model*.bin where a repository has no safetensors; `convert` alone
            reads them.
        directory: put the files there and not into the cache.
        only_config: config.json is enough.
        progress: hears how far the check of the files has come.

    Raises:
        HubError: the hub cannot be reached, refuses, or sends other bytes than it lists; or there
            is no room on the disk.
        CheckpointError: the repository holds no checkpoint that can be read.
    """
    target = None if directory is None else _target(directory)
    if target is None and COMMIT.fullmatch(revision or "") and not only_config:
        # a commit never changes: once it was checked here there is nothing to ask
        found = cached(repo, revision, noted=True)
        if found is not None:
            return found
    try:
        commit, listed = listing(repo, revision)
    except HubError as error:
        is_lost = target is None and client.is_out_of_reach(error)
        found = cached(repo, revision, only_config=only_config) if is_lost else None
        if found is None:
            raise
        if not client.is_offline():
            warnings.warn(f"{error} Used: commit {found.commit} in the cache.", stacklevel=2)
        return found
    names = {CONFIG} if only_config else _wanted(repo, listed, pickles)
    _check_room(repo, {name: listed[name] for name in names}, target)
    if SUMS in names:
        path = _get(repo, commit, {SUMS: listed[SUMS]}, target, progress)
        sums = read_sums(path / SUMS)
        names |= {n for n in sums if n in listed and "/" not in n and not is_pickle(n)}
    files = {name: listed[name] for name in names}
    path = _get(repo, commit, files, target, progress)
    if SUMS in names:
        check_sums(repo, path, {name: file.oid for name, file in files.items()})
    if target is None:
        note(repo, commit, revision, None if only_config else names)
    return Snapshot(path, repo, commit)


def _target(directory: str | Path) -> Path:
    path = Path(directory).expanduser()
    if path.exists() and not path.is_dir():
        raise HubError(f"{path}: is a file; a download needs a directory. Choose another.")
    return path


def listing(repo: str, revision: str | None, **options: Any) -> tuple[str, dict[str, Listed]]:
    """The commit that a revision is now, and its files.

    Args:
        repo: owner/name.
        revision: a branch, tag or commit; None is main.
        options: of client.ask.

    Raises:
        HubError: as of client.ask, or a file's name leads out of the directory.
    """
    from huggingface_hub.hf_api import RepoFile

    hub = client.api()

    def read() -> tuple[str, dict[str, Listed]]:
        commit = hub.model_info(repo, revision=revision).sha or ""
        if not COMMIT.fullmatch(commit):
            raise ValueError(f"commit {commit!r}")
        tree = hub.list_repo_tree(repo, recursive=True, revision=commit)
        files = [f for f in tree if isinstance(f, RepoFile)]
        return commit, {
            f.path: Listed(f.lfs.size, f.lfs.sha256) if f.lfs else Listed(f.size, f.blob_id)
            for f in files
        }

    commit, listed = client.ask(repo, revision, read, **options)
    for name in listed:
        if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            raise HubError(
                f"{repo}: a file's name leads out of the directory ({shown(name)}); nothing was "
                "downloaded. Do not trust this repository."
            )
    return commit, listed


def _wanted(repo: str, listed: Collection[str], pickles: bool) -> set[str]:
    """The files of a repository that a checkpoint here is made of."""
    names = names_among(listed)
    pickled = {name for name in listed if fnmatchcase(name, PICKLED)}
    has_weights = any(fnmatchcase(name, WEIGHTS) for name in names)
    if CONFIG not in names or not (has_weights or pickled):
        what = f"weights ({WEIGHTS})" if CONFIG in names else CONFIG
        raise CheckpointError(
            f"{repo}: no {what} ({shown(sorted(listed))}); a checkpoint has both. Is it the "
            "repository of a whole model?"
        )
    if not has_weights and not pickles:
        raise CheckpointError(
            f"{repo}: only pickled weights ({min(pickled)}); a pickle can run code, so it comes "
            f"only when asked for. Run `hybridzoo download {repo} --pickle`, then `hybridzoo "
            f"convert {repo} TARGET --from-pickle`."
        )
    return names if has_weights else names | pickled


def _check_room(repo: str, files: Mapping[str, Listed], target: Path | None) -> None:
    """Refuse what the disk cannot hold; files that are here already need nothing."""
    place = target or storage(repo)
    need = 0
    for name, file in files.items():
        here = target / name if target else place / "blobs" / file.oid
        need += 0 if here.exists() else file.size
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if need and free < need + _ROOM_LEFT:
        raise HubError(
            f"{repo}: {need:,} bytes are to be downloaded and {free:,} are free on the disk of "
            f"{place}; nothing was. Make room, or set HF_HOME to another disk."
        )


def _get(
    repo: str, commit: str, files: Mapping[str, Listed], target: Path | None, progress: Progress
) -> Path:
    """Download and check these files; their directory."""
    from huggingface_hub import snapshot_download

    def run() -> str:
        return snapshot_download(
            repo,
            revision=commit,
            allow_patterns=[escape(name) for name in sorted(files)],
            local_dir=target,
            tqdm_class=_bars(progress),
        )

    path = Path(client.ask(repo, commit, run))
    check(repo, commit, path, {name: file.oid for name, file in files.items()}, progress)
    return path


def _bars(progress: Progress) -> type[Any]:
    """What the client takes for its bars: nothing is drawn, `progress` hears of the bytes."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            # one bar counts files, one what the network brought and one what was written
            self.told = options.get("unit") == "B" and "Downloading" not in options.get("desc", "")

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.told:
                progress("downloading", int(self.n), int(self.total or self.n))

    return Bar
