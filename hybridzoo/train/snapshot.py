"""Checkpoints of a run: whole or absent, the last few kept, the newest intact one found again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from hybridzoo.checkpoint.io import locked, sync
from hybridzoo.errors import CheckpointError
from hybridzoo.parallel.agree import agreed, exchange, from_first, is_first, rank, world

_NAME = re.compile(r"step-(\d{8,})")
_POINTER, _INFO, _HALF = "latest", "trainer.json", "tmp-"
# of a run, among files of the user's that may begin alike
_HALVES = re.compile(r"tmp-((gone-)?step-\d{8,}|latest|log\.jsonl|loss\.png)")


@contextmanager
def held(root: Path) -> Iterator[None]:
    """Keep other trainers out of a run's directory, which is made, and removed if left empty.

    The first rank does it for all.
    """
    with ExitStack() as stack:
        with agreed():
            if is_first():
                root.mkdir(parents=True, exist_ok=True)
                stack.callback(_remove_empty, root)
                stack.enter_context(locked(root, "training into"))
        yield


def write(
    root: Path,
    step: int,
    write_parts: Callable[[Path], None],
    info: Mapping[str, Any],
    *,
    keep_last: int,
) -> Path:
    """Write `root/step-{step}/`, then point `root/latest` at it, then remove the oldest.

    A kill at any moment leaves every checkpoint that `latest` ever named, but for those pruned. All
    ranks call it; what fails on one is raised in all, after which nothing of it is left.

    Args:
        root: directory of the run.
        step: updates done.
        write_parts: writes this rank's part of everything but trainer.json.
        info: plain values; trainer.json holds them and the digest of every file.
        keep_last: checkpoints kept, this one included.

    Raises:
        CheckpointError: it cannot be written; nothing of it is left.
    """
    final = root / name_of(step)
    half = root / f"{_HALF}{final.name}"
    try:
        with agreed(), _writing(final):
            if is_first():
                _remove(half)
        with agreed(), _writing(final):
            write_parts(half)
        with agreed(), _writing(final):
            mine = _digests(half)
        found = exchange(mine)
        with agreed(), _writing(final):
            if is_first():
                files = {name: digest for share in found for name, digest in share.items()}
                _complete(half, {**info, "step": step, "files": dict(sorted(files.items()))})
    except CheckpointError:
        if is_first():
            shutil.rmtree(half, ignore_errors=True)
        raise
    with agreed(), _writing(final):
        if is_first():
            _publish(root, half, final, keep_last)
    return final


def _publish(root: Path, half: Path, final: Path, keep_last: int) -> None:
    _remove(final)
    half.rename(final)
    replace_text(root / _POINTER, final.name + "\n")
    # a newer one is damaged, or it would have been resumed from: this run has not come that far
    kept = [d for d in _directories(root) if _step(d) <= _step(final)][:keep_last]
    for other in set(_directories(root)) - set(kept):
        _remove(other)


@contextmanager
def _writing(final: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointError) as error:
        # ranks agreed on the error, not on its cause
        reason = error if world() > 1 else error.__cause__ or error
        raise CheckpointError(
            f"{final}: cannot be written ({reason}); the checkpoints before it are whole. Free "
            "space, then go on with --resume."
        ) from error


def _digests(directory: Path) -> dict[str, str]:
    """This rank's share of the files' digests."""
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    return {name: _digest(directory / name) for name in names[rank() :: world()]}


def _complete(directory: Path, info: Mapping[str, Any]) -> None:
    # last: a directory without it is not a checkpoint
    (directory / _INFO).write_text(json.dumps(info, indent=1), encoding="utf-8")
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def name_of(step: int) -> str:
    """Directory of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def newest(root: Path, notice: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that `latest` names, or the newest intact one before it; None where is none.

    All ranks call it, and share the reading.

    Args:
        root: directory of the run.
        notice: called with a sentence for every checkpoint that is passed over.

    Raises:
        CheckpointError: there are checkpoints, but none is intact.
    """
    found, reason = from_first(lambda: _candidates(root, notice)), ""
    for directory in found:
        reason = why_broken(directory)
        if not reason:
            return directory, read_info(directory)
        notice(f"{directory}: {reason}; taking the checkpoint before it.")
    if found:
        raise CheckpointError(
            f"{root}: none of {len(found)} checkpoints is intact (the oldest: {reason}); a run "
            "resumes from one. Train into another directory."
        )
    return None


def _candidates(root: Path, notice: Callable[[str], None]) -> list[Path]:
    """Newest first, from the one that `latest` names."""
    found, pointer = _directories(root), root / _POINTER
    # a power cut may leave any bytes
    text = pointer.read_text(encoding="utf-8", errors="replace") if pointer.is_file() else None
    named = None if text is None else root / text.strip()
    if named is not None and named not in found:
        notice(f"{pointer}: it names {named.name}, which is not there; looking for another.")
    # newer than the pointer: complete but for the pointer; a resume would write it again
    return [d for d in found if named not in found or _step(d) <= _step(named)]


def why_broken(directory: Path) -> str:
    """What is wrong with a checkpoint's files; empty where nothing is. All ranks call it."""
    files, reason = from_first(lambda: _listed(directory))
    # hundreds of GB on one rank would outlast the patience of the others
    mine = {name: files[name] for name in sorted(files)[rank() :: world()]}
    return next(filter(None, [reason, *exchange(_mismatch(directory, mine))]), "")


def _listed(directory: Path) -> tuple[dict[str, str], str]:
    """Each file's digest as trainer.json has it, or what is wrong with that."""
    if not (directory / _INFO).is_file():
        return {}, f"{_INFO} is missing"
    try:
        return dict(read_info(directory)["files"]), ""
    except (ValueError, KeyError, TypeError):
        return {}, f"{_INFO} is damaged"


def _mismatch(directory: Path, files: Mapping[str, str]) -> str:
    for name, digest in files.items():
        if not (directory / name).is_file():
            return f"{name} is missing"
        if _digest(directory / name) != digest:
            return f"{name} is damaged"
    return ""


def read_info(directory: Path) -> dict[str, Any]:
    """The plain values of a checkpoint."""
    info: dict[str, Any] = json.loads((directory / _INFO).read_text(encoding="utf-8"))
    return info


def remove_halves(root: Path) -> None:
    """Delete what a killed run left half written."""
    for path in root.glob(f"{_HALF}*"):
        if not _HALVES.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def first_kept(root: Path) -> Path | None:
    """A checkpoint or the best weights that a run left in the directory; None where is none."""
    best = [root / "best"] if (root / "best" / "config.json").is_file() else []
    return next(iter(_directories(root) + best), None)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it always holds its old or its new text."""
    half = path.with_name(f"{_HALF}{path.name}")
    half.write_text(text, encoding="utf-8")
    sync(half)
    half.replace(path)
    sync(path.parent)


def _directories(root: Path) -> list[Path]:
    """Newest first."""
    return sorted(_named(root), key=_step, reverse=True)


def _step(directory: Path) -> int:
    return int(directory.name.partition("-")[2])


def _named(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (d for d in root.iterdir() if d.is_dir() and _NAME.fullmatch(d.name))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_empty(root: Path) -> None:
    # what was refused before its first step leaves no trace; a directory with files stays
    with suppress(OSError):
        root.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir():
        # renamed first: a kill in the middle leaves nothing that looks like a checkpoint
        gone = path.with_name(f"{_HALF}gone-{path.name}")
        shutil.rmtree(gone, ignore_errors=True)
        shutil.rmtree(path.rename(gone))
    elif path.exists():
        path.unlink()
