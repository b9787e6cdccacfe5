"""PyTorch's files (.bin, .pt): what lies where in them, and their tensors, nothing else.

torch.save writes a zip archive of uncompressed entries: data.pkl, a pickle that names and shapes
the tensors, and an entry of bytes for each storage. Before 1.6 it wrote pickles and then the bytes.
"""

from __future__ import annotations

import io
import itertools
import mmap
import pickle
import pickletools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from hybridzoo.checkpoint.shard import DTYPE_NAMES, MAX_HEADER, refuse_disguise
from hybridzoo.errors import CheckpointError
from hybridzoo.options import shown

# 30,000 tensors need less; an operation may take a microsecond and sixty bytes.
_MAX_PICKLE, _MAX_OPERATIONS = 2**23, 2**20
# what an unpickler may raise on bytes that are no pickle, says Python's documentation, and torch's.
_NOT_A_PICKLE = (
    pickle.UnpicklingError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
# what a state dict's pickle names; torch's own list is longer, and some of that allocates at will.
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {name}Storage" for name in _STORAGES),
}


@dataclass(frozen=True)
class Entry:
    """One entry of a zip archive.

    Attributes:
        name: path inside the archive.
        start: where its bytes begin in the file.
        stop: where they end.
        crc: their checksum, as recorded.
        crc_at: where the file says that.
    """

    name: str
    start: int
    stop: int
    crc: int
    crc_at: tuple[int, ...]


def is_archive(path: Path) -> bool:
    """Whether a file begins as a zip archive does."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_entries(path: Path) -> list[Entry]:
    """An archive's entries in the order of their bytes; CheckpointError if it is not torch's."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            entries = sorted(_entries(data), key=lambda entry: entry.start)
        except (struct.error, OverflowError, ValueError) as error:
            raise CheckpointError(
                f"{path}: a broken zip archive ({error}); PyTorch's files are whole ones. Download "
                "it again."
            ) from None
    end = 0
    for entry in entries:
        if entry.start < end:
            raise _refuse(path, f"a zip archive whose {shown(entry.name)} overlaps another entry")
        end = entry.stop
    return entries


def _entries(data: mmap.mmap) -> Iterator[Entry]:
    end = data.rfind(b"PK\x05\x06", max(0, len(data) - 2**16 - 22))
    if end < 0:
        raise ValueError("it has no directory")
    count, size, at = struct.unpack_from("<HII", data, end + 10)
    if count == 0xFFFF or 0xFFFFFFFF in (size, at):
        (wide,) = struct.unpack_from("<8xQ4x", data, end - 20)
        count, size, at = struct.unpack_from("<QQQ", data, wide + 32)
    stop = at + size
    if stop > end or size > MAX_HEADER or count * 46 > size:
        raise ValueError(f"its directory has {count} entries in {size} bytes at {at}")
    for _ in range(count):
        sign, flags, method, crc, packed, n, n_name, n_extra, n_comment, header = (
            struct.unpack_from("<4s4xHH4xIIIHHH8xI", data, at)
        )
        name = data[at + 46 : at + 46 + n_name].decode()
        extra = data[at + 46 + n_name : at + 46 + n_name + n_extra]
        n, packed, header = _wide(extra, [n, packed, header])
        local, n_name_again, n_extra_again = struct.unpack_from("<4s22xHH", data, header)
        start = header + 30 + n_name_again + n_extra_again
        if sign != b"PK\x01\x02" or local != b"PK\x03\x04" or start + n > len(data):
            raise ValueError(f"{shown(name)} is not where its directory says")
        if method != 0 or packed != n:
            raise ValueError(f"{shown(name)} is compressed, which torch.save never does")
        again = header + 14
        if flags & 8:
            # sizes and checksum follow the bytes, after a signature that may be left out.
            again = start + n + (4 if data[start + n : start + n + 4] == b"PK\x07\x08" else 0)
        places = (p for p in (at + 16, again) if data[p : p + 4] == crc.to_bytes(4, "little"))
        yield Entry(name, start, start + n, crc, tuple(places))
        at += 46 + n_name + n_extra + n_comment


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """The values, those that do not fit 32 bits from the zip64 field."""
    while len(extra) >= 4:
        kind, n = struct.unpack_from("<HH", extra)
        if kind == 1:
            rest = struct.iter_unpack("<Q", extra[4 : 4 + n - n % 8])
            return [next(rest, (v,))[0] if v == 0xFFFFFFFF else v for v in values]
        extra = extra[4 + n :]
    return values


def wrong_sums(path: Path, entries: list[Entry]) -> dict[Entry, int]:
    """Entries whose bytes have another checksum than recorded, and that; none in a file without.

    torch can be told to write no checksums; then that of data.pkl, which it needs, is none either.
    """
    with open(path, "rb") as file:
        pickled = next((e for e in entries if e.name.endswith("/data.pkl")), None)
        if pickled is None or _crc(file, pickled) != pickled.crc:
            return {}
        found = {entry: _crc(file, entry) for entry in entries}
    return {entry: crc for entry, crc in found.items() if crc != entry.crc}


def _crc(file: BinaryIO, entry: Entry) -> int:
    crc, left = 0, entry.stop - entry.start
    file.seek(entry.start)
    while left:
        chunk = file.read(min(left, 2**24))
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return crc


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, mapped from an archive, in memory from an older file.

    Raises:
        CheckpointError: the file holds, calls or allocates anything else; it was not unpickled.
    """
    is_zip = is_archive(path)
    refuse_disguise(path, _head(path, 64), "PyTorch's format")
    _check_pickle(
        path, _pickle_of(path) if is_zip else _head(path, _MAX_PICKLE), 1 if is_zip else 5
    )
    try:
        # torch before 1.6 wrote no zip, which alone can be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except _NOT_A_PICKLE as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise _refuse(path, f"not a pickle of plain tensors ({said[0]})") from None
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided
        for k, v in content.items()
    ):
        raise CheckpointError(
            f"{path}: not a mapping of names to dense tensors; a state dict is one. Save "
            "model.state_dict() alone."
        )
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in content.values()}
    if sum(storage.nbytes() for storage in storages.values()) > path.stat().st_size:
        raise _refuse(path, "not a pickle of plain tensors (they have more bytes than the file)")
    for name, tensor in content.items():
        if tensor.dtype not in DTYPE_NAMES or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {shown(name)} ({tensor.dtype}, {tuple(tensor.shape)}) is of a dtype that "
                "safetensors lacks, or repeats its bytes; weights are plain tensors. Save "
                "contiguous ones."
            )
    return content


def _pickle_of(path: Path) -> bytes:
    found = [e for e in read_entries(path) if e.name.endswith("/data.pkl")]
    if len(found) != 1 or found[0].stop - found[0].start > _MAX_PICKLE:
        raise _refuse(path, "not a pickle of plain tensors (no data.pkl of a sound size)")
    with open(path, "rb") as file:
        file.seek(found[0].start)
        return file.read(found[0].stop - found[0].start)


def _head(path: Path, n: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(n)


def _check_pickle(path: Path, raw: bytes, count: int) -> None:
    """Read the operations of `count` pickles, running none: they may name what is in _GLOBALS."""
    file, n = io.BytesIO(raw), itertools.count(1)
    try:
        for _ in range(count):
            for operation, argument, _ in pickletools.genops(file):
                if next(n) > _MAX_OPERATIONS:
                    raise _refuse(path, f"a pickle of more than {_MAX_OPERATIONS} operations")
                # torch's unpickler knows no third operation that names a thing to call
                if operation.name in ("GLOBAL", "STACK_GLOBAL") and argument not in _GLOBALS:
                    if operation.name == "STACK_GLOBAL":
                        what = "a pickle of protocol 4 or more, which torch.load does not trust"
                        raise CheckpointError(
                            f"{path}: {what}; torch.save writes protocol 2. Save it again with "
                            "torch.save's own protocol."
                        )
                    raise _refuse(path, f"not a pickle of plain tensors (it calls {argument})")
    except (ValueError, struct.error, OverflowError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise _refuse(path, f"not a pickle of plain tensors ({shown(said[0])})") from None


def _refuse(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; nothing else is unpickled. Get safetensors.")
