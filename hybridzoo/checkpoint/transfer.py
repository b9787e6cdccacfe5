"""Between files and tensors: from memory to memory where the bytes are alike, else by a buffer."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from operator import mul
from pathlib import Path

import torch
from torch import Tensor

from hybridzoo.errors import CheckpointError

# one read, and one buffer; 16 MiB was faster than 4, more so where a load leaves the cache.
STEP_BYTES = 2**24
# shorter runs are read with what lies between them: a disk gives that for free.
_SHORT_RUN = 2**20


@dataclass(frozen=True)
class Piece:
    """A box of a stored tensor, and the tensor that it is read into or, of a save, written from.

    Attributes:
        name: the stored tensor.
        shape: the stored tensor's, up to dimensions of size one.
        start: where the box begins in it.
        target: a tensor of the box's shape, of any dtype and device; it wants no gradient.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    target: Tensor


def narrow(full: Tensor, start: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A box of a tensor, a view."""
    for dim, (first, size) in enumerate(zip(start, sizes, strict=True)):
        full = full.narrow(dim, first, size)
    return full


class OpenFile:
    """A file read at given places; it stays the one that was opened when a save replaces it.

    Raises:
        CheckpointError: it cannot be read, or is not as it was when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reading():
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._fd)
            self._opened = os.fstat(self._fd)
        self.size = self._opened.st_size

    def read(self, offset: int, memory: memoryview) -> None:
        """Fill memory with the bytes from `offset` on."""
        done = 0
        with self._reading():
            while done < len(memory):
                n = os.preadv(self._fd, [memory[done:]], offset + done)
                if not n:
                    raise self._changed()
                done += n

    def read_bytes(self, offset: int, n: int) -> bytes:
        """The `n` bytes from `offset` on."""
        memory = bytearray(n)
        self.read(offset, memoryview(memory))
        return bytes(memory)

    def forget(self, offset: int, n: int) -> None:
        """Take bytes that were read out of the system's cache, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, n, os.POSIX_FADV_DONTNEED)

    def check(self) -> None:
        """Refuse what was read if the file was written to meanwhile."""
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self.size, self._opened.st_mtime_ns):
            raise self._changed()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: changed while it was read (it had {self.size} bytes); a checkpoint is "
            "read when nobody writes to it. Load again once it is whole."
        )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({error.strerror or error}); loading needs all of "
                "it. Look after its disk, or download it again."
            ) from error


@dataclass(frozen=True)
class Step:
    """One read of at most STEP_BYTES, or of one element of every row where those are few.

    Attributes:
        file: what is read.
        offset: its first byte.
        dtype: of the stored elements.
        shape: what lies there, end to end.
        start: where in it the box begins.
        target: what the box is read into.
    """

    file: OpenFile
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: tuple[int, ...]
    target: Tensor

    @property
    def n_bytes(self) -> int:
        """Bytes that are read."""
        return prod(self.shape) * self.dtype.itemsize

    def run(self) -> None:
        """Read it."""
        target = self.target
        if (
            target.is_cpu
            and target.dtype == self.dtype
            and target.shape == self.shape
            and target.is_contiguous()
        ):
            self.file.read(self.offset, _memory(target))
            return
        # pinned memory is torch's to keep and to give again
        raw = torch.empty(self.n_bytes, dtype=torch.uint8, device="cpu", pin_memory=target.is_cuda)
        self.file.read(self.offset, _memory(raw))
        found = raw.to(target.device).view(self.dtype).view(self.shape)
        target.copy_(narrow(found, self.start, target.shape))
        if target.is_cuda:
            # this thread's stream need not be the one that the weights are used on
            torch.cuda.current_stream(target.device).synchronize()


def steps(piece: Piece, file: OpenFile, offset: int, dtype: torch.dtype) -> Iterator[Step]:
    """Cut a piece of the tensor at `offset` into reads, in the order of the file."""
    # a dimension of size one in front: then all of a small tensor is one row of it.
    shape, start, target = (1, *piece.shape), (0, *piece.start), piece.target[None]
    sizes = target.shape
    if not target.numel():
        return
    strides = [prod(shape[d + 1 :]) * dtype.itemsize for d in range(len(shape))]
    # from `dim` on, what is read lies end to end
    dim = max((d for d, n in enumerate(sizes) if n != shape[d]), default=0)
    while prod(sizes[:dim]) > 1 and sizes[dim] * strides[dim] < _SHORT_RUN:
        dim -= 1
    while strides[dim] > STEP_BYTES:
        dim += 1
    n_rows = STEP_BYTES // strides[dim]
    for outer in itertools.product(*map(range, sizes[:dim])):
        for row in range(0, sizes[dim], n_rows):
            rows = min(n_rows, sizes[dim] - row)
            place = (first + i for first, i in zip(start, (*outer, row), strict=False))
            yield Step(
                file,
                offset + sum(i * stride for i, stride in zip(place, strides, strict=False)),
                dtype,
                (rows, *shape[dim + 1 :]),
                (0, *start[dim + 1 :]),
                target[outer].narrow(0, row, rows),
            )


@dataclass(frozen=True)
class Runs:
    """One batch of writes: runs of bytes of one length, of at most STEP_BYTES together.

    Attributes:
        offsets: each run's first byte in the file.
        source: what is written there, run after run.
    """

    offsets: list[int]
    source: Tensor

    def write(self, fd: int, dtype: torch.dtype) -> None:
        """Write them as `dtype`."""
        data = _memory(self.source.detach().to(device="cpu", dtype=dtype).contiguous())
        n = len(data) // len(self.offsets)
        for i, offset in enumerate(self.offsets):
            done = 0
            while done < n:
                done += os.pwrite(fd, data[i * n + done : (i + 1) * n], offset + done)


def runs(piece: Piece, offset: int, dtype: torch.dtype) -> Iterator[Runs]:
    """Cut a piece of the tensor at `offset` into writes, which touch no byte of its neighbours."""
    shape, start, source = (1, *piece.shape), (0, *piece.start), piece.target[None]
    sizes = source.shape
    if not source.numel():
        return
    strides = [prod(shape[d + 1 :]) * dtype.itemsize for d in range(len(shape))]
    rows_of = [prod(sizes[d + 1 :]) * dtype.itemsize for d in range(len(shape))]
    base = offset + sum(map(mul, start, strides))
    # from `dim` on, what is written lies end to end; along `top` the batches are cut
    dim = max((d for d, n in enumerate(sizes) if n != shape[d]), default=0)
    top = next(d for d, n in enumerate(rows_of) if n <= STEP_BYTES)
    n_rows = max(1, STEP_BYTES // rows_of[top])
    for outer in itertools.product(*map(range, sizes[:top])):
        for row in range(0, sizes[top], n_rows):
            rows = min(n_rows, sizes[top] - row)
            first = base + sum(map(mul, (*outer, row), strides))
            inner = [range(rows), *map(range, sizes[top + 1 : dim])] if top < dim else []
            places = itertools.product(*inner)
            offsets = [first + sum(map(mul, place, strides[top:])) for place in places]
            yield Runs(offsets, source[outer].narrow(0, row, rows))


def _memory(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
