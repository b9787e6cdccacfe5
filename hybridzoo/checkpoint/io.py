"""Writing a checkpoint: all of it or nothing.

How a save is atomic. Everything is written and fsynced in `.saving/` inside the directory; renaming
that to `.saved/` is the one commit point, for config and weights together. The files then move out
one by one, the index (or the single file) last, after stale shards were removed. Until `.saving/`
is renamed a reader sees the old checkpoint; from then on it takes from `.saved/` whatever still
lies there, so that a kill at any moment leaves the old or the new one, whole. The next save clears
`.saving/` or finishes `.saved/`. Final names need not be new, so every layout can be written.

Several ranks save in phases that all of them end together: the first lays out the files, header and
room; each writes its own slices at their offsets and waits for the disk; the first commits.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hybridzoo.checkpoint.crew import ALONE, Crew
from hybridzoo.checkpoint.frame import PICKLE_FILE, Pickle, check_size, write_archive
from hybridzoo.checkpoint.shard import DTYPES, Shard, Spec
from hybridzoo.checkpoint.transfer import Piece
from hybridzoo.checkpoint.writer import Writer, is_on_nfs, reserve
from hybridzoo.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
# answers and checksums of the weights beside them: worth nothing once others stand there.
GOLDEN, SUMS = "golden.safetensors", "SHA256SUMS"
_STAGING, COMMITTED = ".saving", ".saved"
_PLAIN_NAME = re.compile(r"\w[\w.-]*")
_WEIGHT_FILE = re.compile(
    r"(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin)(\.index\.json)?"
)


@dataclass
class Layout:
    """Which tensors stand in which files.

    Attributes:
        files: file name -> its shard: tensors in the order of their bytes, and the header's
            metadata.
        index: the index's `metadata`; None when there is no index.
    """

    files: dict[str, Shard] = field(default_factory=dict)
    index: dict[str, Any] | None = None

    def index_text(self) -> str:
        """The index as transformers writes it: sorted, indented by two."""
        weight_map = {name: file for file, shard in self.files.items() for name in shard.tensors}
        content = {"metadata": self.index, "weight_map": weight_map}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def plan(specs: Mapping[str, Spec], max_shard_bytes: int = 5_000_000_000) -> Layout:
    """Spread tensors, in order, over files of `max_shard_bytes`; a larger one has its own file."""
    if max_shard_bytes < 1:
        raise CheckpointError(
            f"max_shard_bytes: too small ({max_shard_bytes}); a file holds at least one byte. Use "
            "5_000_000_000."
        )
    groups: list[dict[str, Spec]] = [{}]
    room = max_shard_bytes
    for name, spec in specs.items():
        if groups[-1] and spec.n_bytes > room:
            groups.append({})
            room = max_shard_bytes
        groups[-1][name] = spec
        room -= spec.n_bytes
    # wide dtypes first, so that every tensor starts at a multiple of its item size.
    shards = [
        Shard(dict(sorted(g.items(), key=lambda item: -DTYPES[item[1].dtype].itemsize)))
        for g in groups
    ]
    if len(shards) == 1:
        return Layout({SINGLE_FILE: shards[0]})
    total = sum(spec.n_bytes for spec in specs.values())
    n = len(shards)
    names = (f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1))
    return Layout(dict(zip(names, shards, strict=True)), {"total_size": total})


def write(
    directory: str | Path,
    layout: Layout,
    fetch: Callable[[str], Tensor],
    *,
    texts: Mapping[str, bytes],
) -> None:
    """Write whole tensors, index and other files in one process, all or nothing.

    Args:
        directory: made if missing; files that are not a checkpoint's weights, or the answers and
            checksums of those replaced, are left alone.
        layout: which tensors go where; their dtypes are what is written.
        fetch: the tensor of a name, called once each in the layout's order; one at a time is alive
            here.
        texts: other files of the checkpoint (config.json, tokenizer.json) by name; a text of the
            index's name is written in place of the rendered index.

    Raises:
        CheckpointError: the directory cannot be written, another process is saving to it, or a
            tensor has not its planned shape.
    """

    def fill(writer: Writer) -> None:
        for file, shard in layout.files.items():
            if isinstance(shard, Pickle):
                write_archive(writer.directory / file, shard, fetch)
                sync(writer.directory / file)
                continue
            for name, spec in shard.tensors.items():
                tensor = fetch(name)
                check_size(file, name, tensor, spec)
                start = (0,) * len(spec.shape)
                writer.put(Piece(name, spec.shape, start, tensor.reshape(spec.shape)))

    commit(directory, layout, fill, texts=texts)


def commit(
    directory: str | Path,
    layout: Layout,
    fill: Callable[[Writer], Any],
    *,
    texts: Mapping[str, bytes],
    crew: Crew = ALONE,
    check: Callable[[list[Any]], None] = lambda found: None,
) -> None:
    """Write what every rank of a crew fills in, all or nothing (how: see the module).

    Args:
        directory: as in write; every rank sees the same one.
        layout: as in write; the same on every rank.
        fill: writes this rank's slices; it may return something small.
        texts: as in write; the first rank's are written.
        crew: the ranks that call it.
        check: hears what every rank's `fill` returned; the same error on all ends the save.

    Raises:
        CheckpointError: as write's, on every rank, whichever it happened on.
    """
    directory = Path(directory)
    staging = directory / _STAGING
    with ExitStack() as undo:
        with crew.phase(), _writing(directory):
            if crew.is_first:
                _stage(directory, layout, texts, undo)
        # before `fill`, in which ranks may wait for each other
        with crew.phase() as met:
            met.value = socket.gethostname()
            if not staging.is_dir():
                raise CheckpointError(
                    f"{directory}: not the directory that rank 0 writes to; the ranks share one "
                    "file system. Save to a place that every host sees."
                )
        through = len(set(met.values)) > 1 and is_on_nfs(staging)
        writer = Writer(staging, layout.files, through=through)
        with crew.phase() as filled, _writing(directory), writer:
            filled.value = fill(writer)
        check(filled.values)
        with crew.phase(), _writing(directory):
            if crew.is_first:
                sync(staging)
                os.rename(staging, directory / COMMITTED)
                sync(directory)
                finish_save(directory)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot be written ({error.strerror or error}); the checkpoint there "
            "before, if any, is whole. Free space, or save elsewhere."
        ) from error


def _stage(directory: Path, layout: Layout, texts: Mapping[str, bytes], undo: ExitStack) -> None:
    """Make the files, their tensors still empty; what is to be undone at the end joins `undo`."""
    for name in [*layout.files, *texts]:
        # names may come from a config.json that somebody else wrote.
        if not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(
                f"{directory}: illegal file name ({name!r}); a checkpoint's files lie in it, "
                "under plain names. Mend config.json."
            )
    if not directory.exists():
        undo.callback(_remove_empty, directory)
    directory.mkdir(parents=True, exist_ok=True)
    undo.enter_context(locked(directory, "saving to"))
    finish_save(directory)
    staging = directory / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    # half a checkpoint must not be what fills the disk
    undo.callback(shutil.rmtree, staging, ignore_errors=True)
    staging.mkdir()
    for name, shard in layout.files.items():
        if not isinstance(shard, Pickle):
            with _synced(staging / name) as file:
                reserve(file, shard)
    if layout.index is not None:
        texts = {INDEX_FILE: layout.index_text().encode(), **texts}
    for name, content in texts.items():
        with _synced(staging / name) as file:
            file.write(content)


def _remove_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()


def finish_save(directory: Path) -> None:
    """Move a committed save into place, under the lock; one that was killed doing so goes on."""
    committed = directory / COMMITTED
    if not committed.is_dir():
        return
    names = {p.name for p in committed.iterdir()}
    entry = next((n for n in (INDEX_FILE, SINGLE_FILE, PICKLE_FILE) if n in names), None)
    if entry is not None:
        fresh = set(json.loads((committed / entry).read_bytes())["weight_map"].values()) if (
            entry == INDEX_FILE
        ) else set()  # fmt: skip
        for path in directory.iterdir():
            is_weights = _WEIGHT_FILE.fullmatch(path.name) and path.name not in fresh | {entry}
            if is_weights or path.name in {GOLDEN, SUMS} - names:
                path.unlink()
        for name in sorted(names - {entry}):
            os.replace(committed / name, directory / name)
        sync(directory)
        os.replace(committed / entry, directory / entry)
    committed.rmdir()
    sync(directory)


@contextmanager
def _synced(path: Path) -> Iterator[Any]:
    # to be read as well: where a file system cannot reserve room, the C library looks at each block
    with open(path, "x+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file's or directory's content is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def locked(directory: Path, doing: str) -> Iterator[None]:
    """Hold a directory for one process; the lock ends with the process, however it ends.

    Raises:
        CheckpointError: another one is `doing` ("saving to") it.
    """
    fd = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{directory}: another process is {doing} it; one may at a time. Wait for its end, "
                "or choose another directory."
            ) from None
        yield
    finally:
        os.close(fd)
