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
# shorter runs are read with what lies between them, until a read has the length of the other: to
# ask for each would take longer.
_SHORT_RUN, _LONG_RUN = 2**10, 2**20


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
class Runs:
    """Runs of bytes of one length in a file, at most STEP_BYTES together, and what belongs there.

    Attributes:
        offsets: each run's first byte.
        tensor: the elements, run after run.
    """

    offsets: list[int]
    tensor: Tensor

    def write(self, fd: int, dtype: torch.dtype) -> None:
        """Write the tensor there, as `dtype`."""
        data = memory_of(self.tensor.detach().to(device="cpu", dtype=dtype).contiguous())
        n = len(data) // len(self.offsets)
        for i, offset in enumerate(self.offsets):
            done = 0
            while done < n:
                done += os.pwrite(fd, data[i * n + done : (i + 1) * n], offset + done)


@dataclass(frozen=True)
class Step:
    """One read: at most STEP_BYTES, or one element of every row where those are few.

    Attributes:
        file: what is read.
        offsets: first bytes of the runs that are read, all of one length.
        dtype: of the stored elements.
        shape: what lies there, run after run.
        start: where in it the box begins.
        target: what the box is read into.
    """

    file: OpenFile
    offsets: list[int]
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
            self._read(memory_of(target))
            return
        # pinned memory is torch's to keep and to give again
        raw = torch.empty(self.n_bytes, dtype=torch.uint8, device="cpu", pin_memory=target.is_cuda)
        self._read(memory_of(raw))
        found = raw.to(target.device).view(self.dtype).view(self.shape)
        target.copy_(narrow(found, self.start, target.shape))
        if target.is_cuda:
            # this thread's stream need not be the one that the weights are used on
            torch.cuda.current_stream(target.device).synchronize()

    def forget(self) -> None:
        """Take what was read out of the system's cache."""
        for offset in self.offsets:
            self.file.forget(offset, self.n_bytes // len(self.offsets))

    def _read(self, memory: memoryview) -> None:
        n = len(memory) // len(self.offsets)
        for i, offset in enumerate(self.offsets):
            self.file.read(offset, memory[i * n : (i + 1) * n])


def steps(piece: Piece, file: OpenFile, offset: int, dtype: torch.dtype) -> Iterator[Step]:
    """Cut a piece of the tensor at `offset` into reads, in the order of the file."""
    # a dimension of size one in front: then all of a small tensor is one row of it.
    shape, start, target = (1, *piece.shape), (0, *piece.start), piece.target[None]
    sizes, strides = target.shape, _strides(shape, dtype)
    if not target.numel():
        return
    dim = _first_whole(sizes, shape)
    if prod(sizes[:dim]) == 1 or sizes[dim] * strides[dim] >= _SHORT_RUN:
        for batch in runs(piece, offset, dtype):
            size = batch.tensor.shape
            yield Step(file, batch.offsets, dtype, size, (0,) * len(size), batch.tensor)
        return
    while prod(sizes[:dim]) > 1 and sizes[dim] * strides[dim] < _LONG_RUN:
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
                [offset + sum(map(mul, place, strides))],
                dtype,
                (rows, *shape[dim + 1 :]),
                (0, *start[dim + 1 :]),
                target[outer].narrow(0, row, rows),
            )


def runs(piece: Piece, offset: int, dtype: torch.dtype) -> Iterator[Runs]:
    """Where in a file the elements of a piece of the tensor at `offset` are, and no others."""
    shape, start, tensor = (1, *piece.shape), (0, *piece.start), piece.target[None]
    sizes, strides = tensor.shape, _strides(shape, dtype)
    if not tensor.numel():
        return
    base = offset + sum(map(mul, start, strides))
    # from `dim` on, the elements lie end to end; along `top` the batches are cut
    dim, own = _first_whole(sizes, shape), _strides(sizes, dtype)
    top = next(d for d, n in enumerate(own) if n <= STEP_BYTES)
    n_rows = max(1, STEP_BYTES // own[top])
    for outer in itertools.product(*map(range, sizes[:top])):
        for row in range(0, sizes[top], n_rows):
            rows = min(n_rows, sizes[top] - row)
            first = base + sum(map(mul, (*outer, row), strides))
            inner = [range(rows), *map(range, sizes[top + 1 : dim])] if top < dim else []
            places = itertools.product(*inner)
            offsets = [first + sum(map(mul, place, strides[top:])) for place in places]
            yield Runs(offsets, tensor[outer].narrow(0, row, rows))


def _strides(shape: Sequence[int], dtype: torch.dtype) -> list[int]:
    return [prod(shape[d + 1 :]) * dtype.itemsize for d in range(len(shape))]


def _first_whole(sizes: Sequence[int], shape: Sequence[int]) -> int:
    """The dimension from which on a box lies end to end."""
    return max((d for d, n in enumerate(sizes) if n != shape[d]), default=0)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not a copy."""
    # a single element counts as contiguous whatever its strides, but is not viewed as bytes then
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
