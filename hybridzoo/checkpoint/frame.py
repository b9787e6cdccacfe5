"""Writing PyTorch's archives: byte for byte as the source's, with these weights, or anew.

An archive is its tensors' bytes and a frame: headers, pickle, padding, directory. An import
remembers the frame; filled again it is the source's file, with changed weights a valid one all the
same, because their checksums are mended.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hybridzoo.checkpoint.archive import Entry, load_tensors, read_entries, wrong_sums
from hybridzoo.checkpoint.shard import DTYPE_NAMES, DTYPES, Shard, Spec
from hybridzoo.checkpoint.transfer import memory_of
from hybridzoo.errors import CheckpointError
from hybridzoo.options import shown

PICKLE_FILE = "pytorch_model.bin"
# inflated: that of 100,000 tensors is smaller, while a few kilobytes may hold gigabytes.
_MAX_FRAME = 2**26


@dataclass(frozen=True)
class Frame:
    """All of an archive but its tensors' bytes.

    Attributes:
        rest: those bytes, end to end, deflated, in base64.
        starts: tensor -> its first byte in the file.
        orders: tensor -> its dimensions as they lie in memory, where it is not contiguous.
        same: tensor -> the one of `starts` whose bytes it shares.
    """

    rest: str
    starts: dict[str, int]
    orders: dict[str, list[int]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no import records; CheckpointError, for somebody may have edited it."""
        orders = [dim for order in self.orders.values() for dim in order]
        if any(type(value) is not int for value in (*self.starts.values(), *orders)) or any(
            not isinstance(owner, str) for owner in self.same.values()
        ):
            raise _refuse("places that are no whole numbers")

    def pieces(self, specs: Mapping[str, Spec]) -> list[tuple[bytes, str | None]]:
        """What the file consists of: bytes, and the tensor that follows them.

        Raises:
            CheckpointError: it is no frame of these tensors; it may come from a config.json that
                somebody edited.
        """
        for name in self.starts:
            order = self.orders.get(name)
            if name not in specs or (order and sorted(order) != [*range(len(specs[name].shape))]):
                raise _refuse(f"{shown(name)} in the order {shown(order)}")
        rest = self._inflated()
        found: list[tuple[bytes, str | None]] = []
        used = end = 0
        for name, start in sorted(self.starts.items(), key=lambda item: item[1]):
            if not 0 <= start - end <= len(rest) - used:
                raise _refuse(f"{shown(name)} at {start}, with {len(rest) - used} bytes for {end}")
            found.append((rest[used : used + start - end], name))
            used, end = used + start - end, start + specs[name].n_bytes
        return [*found, (rest[used:], None)]

    def _inflated(self) -> bytes:
        inflate = zlib.decompressobj()
        try:
            rest = inflate.decompress(base64.b64decode(self.rest, validate=True), _MAX_FRAME)
        except (binascii.Error, zlib.error) as error:
            raise _refuse(str(error)) from None
        if not inflate.eof:
            raise _refuse(f"cut off, or more than {_MAX_FRAME} bytes")
        return rest


@dataclass
class Pickle(Shard):
    """An archive to write.

    Attributes:
        frame: the source's; None makes a new one.
        same: tensor -> an earlier one whose bytes it shares in a new file.
    """

    frame: Frame | None = None
    same: dict[str, str] = field(default_factory=dict)

    def fetched(self) -> list[str]:
        """Tensors in the order in which they are written, each run of bytes once."""
        if self.frame is not None:
            return sorted(self.frame.starts, key=self.frame.starts.__getitem__)
        return [n for n, spec in self.tensors.items() if spec.n_bytes and n not in self.same]


def _refuse(what: str) -> CheckpointError:
    return CheckpointError(
        f"source_layout.files: a frame that is not its file's ({what}); it is what an import "
        "recorded. Remove source_layout from config.json."
    )


def frame_of(path: Path, tensors: Mapping[str, Tensor], specs: Mapping[str, Spec]) -> Frame | None:
    """The frame of an archive whose mapped tensors these are; None if it cannot be remembered."""
    found = _places(path, tensors)
    if found is None or path.stat().st_size - sum(specs[n].n_bytes for n in found.starts) > (
        _MAX_FRAME
    ):
        return None
    deflate, end, parts = zlib.compressobj(9), 0, []
    with open(path, "rb") as file:
        for name, start in sorted(found.starts.items(), key=lambda item: item[1]):
            file.seek(end)
            parts.append(deflate.compress(file.read(start - end)))
            end = start + specs[name].n_bytes
        file.seek(end)
        parts += [deflate.compress(file.read()), deflate.flush()]
    return replace(found, rest=base64.b64encode(b"".join(parts)).decode())


def _places(path: Path, tensors: Mapping[str, Tensor]) -> Frame | None:
    """Where an archive's tensors lie, as a Frame without its bytes.

    None for a file of another byte order, and where a tensor is not dense, overlaps another without
    being it, or lies outside the archive's storages.
    """
    entries = read_entries(path)
    storages = sorted({_span(t.untyped_storage()) for t in tensors.values()})
    stored = [(e.start, e.stop) for e in entries if "/data/" in e.name and e.start < e.stop]
    # torch tells where tensors lie in memory: the file is mapped to it as a whole
    base = next((a for a, b in storages if a < b), 0) - next((a for a, _ in stored), 0)
    if [(a - base, b - base) for a, b in storages if a < b] != stored or _is_swapped(path, entries):
        return None
    owners: dict[tuple[int, int], str] = {}
    found = Frame("", {})
    for name, tensor in tensors.items():
        if not tensor.nbytes:
            continue
        strides = tensor.stride()
        order = sorted(range(tensor.ndim), key=strides.__getitem__, reverse=True)
        start = tensor.data_ptr() - base
        owner = owners.setdefault((start, start + tensor.nbytes), name)
        if not tensor.permute(order).is_contiguous() or strides != tensors[owner].stride():
            return None
        if owner != name:
            found.same[name] = owner
            continue
        found.starts[name] = start
        if not tensor.is_contiguous():
            found.orders[name] = order
    overlaps = (a[1] > b[0] for a, b in pairwise(sorted(owners)))
    return None if any(overlaps) else found


def _span(storage: torch.UntypedStorage) -> tuple[int, int]:
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _is_swapped(path: Path, entries: list[Entry]) -> bool:
    for entry in entries:
        if entry.name.endswith("/byteorder"):
            with open(path, "rb") as file:
                file.seek(entry.start)
                return file.read(6) != b"little"
    return False


def write_archive(path: Path, pickle: Pickle, fetch: Callable[[str], Tensor]) -> None:
    """Write a file, tensor by tensor, and read it back as torch does.

    Raises:
        CheckpointError: the frame makes no archive of these tensors.
    """
    frame = pickle.frame or _new_frame(path, pickle)
    with open(path, "xb") as file:
        for rest, name in frame.pieces(pickle.tensors):
            file.write(rest)
            if name is not None:
                file.write(data_of(path, name, fetch(name), pickle.tensors[name], frame.orders))
    try:
        is_whole = _mended(path, pickle, frame)
    except CheckpointError:
        is_whole = False
    if not is_whole:
        raise _refuse("it makes no archive of these tensors")


def _mended(path: Path, pickle: Pickle, frame: Frame) -> bool:
    """Whether torch finds the tensors where they were written; their checksums are right then."""
    with open(path, "r+b") as file:
        for entry, crc in wrong_sums(path, read_entries(path)).items():
            for place in entry.crc_at:
                file.seek(place)
                file.write(crc.to_bytes(4, "little"))
    tensors = load_tensors(path)
    specs = {n: Spec(DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()}
    return specs == pickle.tensors and _places(path, tensors) == replace(frame, rest="")


def _new_frame(path: Path, pickle: Pickle) -> Frame:
    """That of the file that torch.save makes of these tensors."""
    # never written to, so that they take no memory
    tensors = {
        name: torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        for name, spec in pickle.tensors.items()
        if name not in pickle.same
    }
    # last, so that the bytes lie in the order of fetched()
    tensors |= {name: tensors[owner] for name, owner in pickle.same.items()}
    with torch.serialization.skip_data():
        torch.save(tensors, path)
    frame = frame_of(path, load_tensors(path), pickle.tensors)
    path.unlink()
    assert frame is not None
    return frame


def data_of(
    path: Path, name: str, tensor: Tensor, spec: Spec, orders: Mapping[str, list[int]]
) -> memoryview:
    """The bytes of a tensor as a file holds them; CheckpointError if it has not the shape."""
    check_size(path.name, name, tensor, spec)
    tensor = tensor.detach().to(device="cpu", dtype=DTYPES[spec.dtype])
    if name in orders:
        tensor = tensor.reshape(spec.shape).permute(orders[name])
    return memory_of(tensor.contiguous())


def check_size(where: str, name: str, tensor: Tensor, spec: Spec) -> None:
    """CheckpointError if a tensor has not as many elements as were planned for it."""
    if tensor.numel() != prod(spec.shape):
        raise CheckpointError(
            f"{where}: {name} has {tensor.numel()} elements, its header says {spec.shape}; "
            "they must agree. Save with the config that the model was built from."
        )
