"""What was downloaded: huggingface_hub's cache, its files checked once and noted.

The cache is the client's own, shared with its other users: snapshots/<commit>/ holds links to blobs
whose names are the hub's ids of their content, refs/ the commit of each branch. Beside them
.hybridzoo/<commit>.checked.json has size and time of each file that was right, and
<commit>.whole.json the files of a download that came whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hybridzoo.checkpoint.golden import digest, read_sums
from hybridzoo.checkpoint.io import INDEX_FILE, SUMS
from hybridzoo.checkpoint.reader import read_json
from hybridzoo.errors import CheckpointError, HubError

# a long check's word, bytes done, bytes in all.
Progress = Callable[[str, int, int], None]

CONFIG, WEIGHTS, PICKLED = "config.json", "model*.safetensors", "pytorch_model*.bin"
COMMIT = re.compile(r"[0-9a-f]{40}")
# at the top of a repository; what else SHA256SUMS lists comes too, pickles aside.
_FILES = (
    "*.json",
    WEIGHTS,
    "golden.safetensors",
    "tokenizer.model",
    "merges.txt",
    "*.jinja",
    "README.md",
    "LICEN[CS]E*",
    "NOTICE*",
    SUMS,
)
_SHA256_DIGITS = 64
_CHECKED, _WHOLE = "checked", "whole"


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository on this machine.

    Attributes:
        path: the directory.
        repo: owner/name.
        commit: which one it is, 40 hexadecimal digits.
        was_cached: whether the hub was not asked, or did not answer.
    """

    path: Path
    repo: str
    commit: str
    was_cached: bool = False


def silent(what: str, done: int, total: int) -> None:
    """The Progress that tells nobody."""


def cached(
    repo: str, revision: str | None = None, *, noted: bool = False, only_config: bool = False
) -> Snapshot | None:
    """What the cache holds of a revision, its files checked; None where it is not whole.

    Args:
        repo: owner/name.
        revision: a branch or tag as it was when last asked for, or a commit; None is main.
        noted: a whole download by hybridzoo only; another tool may have left files out.
        only_config: config.json is enough.

    Raises:
        HubError: a file is not what the hub's id of it says.
    """
    found = _here(repo, revision, noted, only_config)
    if found is None:
        return None
    snapshot, names = found
    folder = snapshot.path
    # a cache without links holds copies, which do not say what they should be
    links = [name for name in names if (folder / name).is_symlink()]
    oids = {name: os.readlink(folder / name).split("/")[-1] for name in links}
    check(repo, snapshot.commit, folder, oids)
    return snapshot


def _here(
    repo: str, revision: str | None, noted: bool = False, only_config: bool = False
) -> tuple[Snapshot, set[str]] | None:
    """What `cached` is to check, and its files; None where it is not whole."""
    home = storage(repo)
    ref = home / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision or ""
    folder = home / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not (folder / CONFIG).is_file():
        return None
    known = _notes(home, commit, _WHOLE).get("files")
    if not known and (noted or not (only_config or _is_whole(folder))):
        return None
    names = {CONFIG} if only_config else {*(known or names_among(p.name for p in folder.iterdir()))}
    if not all((folder / name).is_file() for name in names):
        return None
    return Snapshot(folder, repo, commit, was_cached=True), names


def check(
    repo: str,
    commit: str,
    folder: Path,
    oids: Mapping[str, str],
    progress: Progress = silent,
) -> None:
    """Hash the files that no earlier check knows; a wrong one is removed, so that it comes again.

    Args:
        repo: owner/name.
        commit: whose files they are.
        folder: where they are.
        oids: file -> the hub's id of it: SHA-256, or a git blob's.
        progress: hears of bytes done.

    Raises:
        HubError: a file is missing or another.
    """
    if missing := sorted(name for name in oids if not (folder / name).is_file()):
        raise HubError(
            f"{repo}: {missing[0]} did not come; the hub lists it at commit {commit}. Try again."
        )
    home = storage(repo)
    # where the cache is a link the client says where it leads
    is_cache = folder.parent.resolve() == (home / "snapshots").resolve()
    known = _notes(home, commit, _CHECKED) if is_cache else {}
    stamps = {name: _stamp(folder / name) for name in oids}
    new = [name for name in oids if known.get(name) != stamps[name]]
    done, total = 0, sum((folder / name).stat().st_size for name in new)

    def advance(n: int) -> None:
        nonlocal done
        done += n
        progress("checking", done, total)

    bad = [name for name in new if content_id(folder / name, oids[name], advance) != oids[name]]
    for name in bad:
        _remove(folder / name)
    if bad:
        raise HubError(
            f"{repo}: {bad[0]} is not what the hub says that it is at commit {commit} "
            f"({oids[bad[0]]}); the copy was removed. Download it again; if that ends here too, do "
            "not trust the repository."
        )
    if new and is_cache:
        # a cache that may only be read serves as well, and is hashed each time
        with suppress(OSError):
            _write_notes(home, commit, _CHECKED, known | stamps)


def check_sums(repo: str, folder: Path, oids: Mapping[str, str]) -> None:
    """Compare files, already checked against their ids, with the repository's SHA256SUMS.

    Raises:
        CheckpointError: one differs.
    """
    sums = read_sums(folder / SUMS)
    for name in sorted(sums.keys() & oids):
        oid = oids[name]
        if sums[name] != (oid if len(oid) == _SHA256_DIGITS else digest(folder / name)):
            raise CheckpointError(
                f"{folder / name}: its SHA-256 is not that in {SUMS} of {repo}; one was published "
                "without the other. Ask its owner to publish it again."
            )


def note(repo: str, commit: str, revision: str | None, names: Collection[str] | None) -> None:
    """Remember which commit a revision is, and which files came whole.

    Without names, where only some came, a revision of which all is here stays what it is.
    """
    home, ref = storage(repo), storage(repo) / "refs" / (revision or "main")
    if names is None and _here(repo, revision) is not None:
        return
    # a cache that may only be read serves as well
    with suppress(OSError):
        if names is not None and sorted(names) != _notes(home, commit, _WHOLE).get("files"):
            _write_notes(home, commit, _WHOLE, {"files": sorted(names)})
        if revision != commit and not (ref.is_file() and ref.read_text() == commit):
            _replace(ref, commit)


def names_among(files: Iterable[str]) -> set[str]:
    """Those at the top of a repository that a checkpoint is made of, pickles aside."""
    return {n for n in files if "/" not in n and any(fnmatchcase(n, form) for form in _FILES)}


def is_pickle(name: str) -> bool:
    """Whether a file of this name is one of Python's pickles, which run code when they are read."""
    endings = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
    return name.lower().endswith(endings)


def storage(repo: str) -> Path:
    """Where the cache keeps a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _is_whole(folder: Path) -> bool:
    """Whether a directory that another tool filled holds all of a checkpoint's weights."""
    if (folder / INDEX_FILE).is_file():
        shards = read_json(folder / INDEX_FILE).get("weight_map")
        return isinstance(shards, dict) and all(
            (folder / str(name)).is_file() for name in shards.values()
        )
    return any(folder.glob(WEIGHTS)) or any(folder.glob(PICKLED))


def _notes_path(home: Path, commit: str, kind: str) -> Path:
    return home / ".hybridzoo" / f"{commit}.{kind}.json"


def _notes(home: Path, commit: str, kind: str) -> dict[str, Any]:
    path = _notes_path(home, commit, kind)
    return read_json(path) if path.is_file() else {}


def _write_notes(home: Path, commit: str, kind: str, notes: dict[str, Any]) -> None:
    _replace(_notes_path(home, commit, kind), json.dumps(notes, indent=1))


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def content_id(path: Path, oid: str, advance: Callable[[int], None] = lambda n: None) -> str:
    """A file's SHA-256, or its id as a git blob where `oid` is one."""
    if len(oid) == _SHA256_DIGITS:
        return digest(path, advance)
    content = path.read_bytes()
    advance(len(content))
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _remove(path: Path) -> None:
    """A file, and what its links lead to."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    staged.write_text(text)
    os.replace(staged, path)
