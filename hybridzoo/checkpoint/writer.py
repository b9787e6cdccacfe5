"""The files of a save in the making: laid out once, then filled by whoever holds their tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch

from hybridzoo.checkpoint.frame import Pickle
from hybridzoo.checkpoint.shard import DTYPES, Shard, render_header, starts_of
from hybridzoo.checkpoint.transfer import Piece, runs


def reserve(file: BinaryIO, shard: Shard) -> None:
    """Write a shard's header and take the room of its tensors: a full disk is seen now."""
    header = render_header(shard)
    file.write(header)
    file.flush()
    _, size = starts_of(shard, header)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        os.ftruncate(file.fileno(), size)


def is_on_nfs(directory: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether a directory lies on a network file system whose hosts do not see each other's pages.

    Args:
        directory: of this host.
        mounts: Linux's list of file systems; elsewhere the answer is no.
    """
    lines = mounts.read_text(encoding="utf-8").splitlines() if mounts.is_file() else []
    directory = directory.resolve()
    found = [(point.replace("\\040", " "), kind) for _, point, kind, *_ in map(str.split, lines)]
    over = [(len(point), kind) for point, kind in found if directory.is_relative_to(point)]
    return max(over, default=(0, ""))[1].startswith("nfs")


class Writer:
    """Writes slices into a save's reserved files; several ranks may do so at once.

    Args:
        directory: where the files are.
        shards: which tensors stand in which of them; archives are not written in slices.
        through: let every write reach the disk by itself. Else a host on NFS may send whole pages,
            in which another host's bytes are as they were (nfs_can_extend_write in Linux).

    Attributes:
        directory: as given.
    """

    def __init__(
        self, directory: Path, shards: Mapping[str, Shard], *, through: bool = False
    ) -> None:
        self.directory = directory
        self._flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_DSYNC if through else 0)
        # stored tensor -> file, first byte, dtype
        self._places: dict[str, tuple[str, int, torch.dtype]] = {}
        for file, shard in shards.items():
            if not isinstance(shard, Pickle):
                starts, _ = starts_of(shard, render_header(shard))
                for name, spec in shard.tensors.items():
                    self._places[name] = file, starts[name], DTYPES[spec.dtype]
        self._open: dict[str, int] = {}

    def put(self, piece: Piece) -> None:
        """Write a piece's tensor to its place, in the dtype of the file."""
        file, offset, dtype = self._places[piece.name]
        if file not in self._open:
            self._open[file] = os.open(self.directory / file, self._flags)
        for batch in runs(piece, offset, dtype):
            batch.write(self._open[file], dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Wait until what was written is on the disk, and close the files."""
        try:
            for fd in self._open.values():
                if error is None:
                    os.fsync(fd)
        finally:
            for fd in self._open.values():
                os.close(fd)
