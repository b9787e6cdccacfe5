"""One safetensors file: header length, JSON header, bytes; every rule is checked on opening."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from hybridzoo.checkpoint.transfer import OpenFile, Piece, Step, steps
from hybridzoo.errors import CheckpointError
from hybridzoo.options import shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# of a header, an index or a config.json: 40,000 tensors need a third of it, and what is larger
# would take Python long to read.
MAX_HEADER = 2**24

_UNPICKLE = "Name it pytorch_model.bin, then rewrite it with `hybridzoo convert --from-pickle`."
# what stands in a file's place where a download went wrong: its start -> what it is, the way out.
_DOWNLOADS = {
    b"version https://git-lfs": ("a git-lfs pointer", "Run `git lfs pull` in its repository."),
    b"<!doctype": ("a web page", "Download the file itself."),
    b"<html": ("a web page", "Download the file itself."),
}
_PICKLES = {
    b"pk\x03\x04": ("a zip file (a PyTorch pickle)", _UNPICKLE),
    b"\x80\x02": ("a pickle", _UNPICKLE),
    b"\x80\x04": ("a pickle", _UNPICKLE),
}


@dataclass(frozen=True)
class Spec:
    """Dtype, in safetensors' spelling, and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass
class Shard:
    """One file's tensors.

    Attributes:
        tensors: name -> dtype and shape, in the order of their bytes.
        metadata: the header's `__metadata__`.
        header: the header's bytes, where they are not the usual spelling of the two above.
    """

    tensors: dict[str, Spec]
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    header: bytes | None = None
    _file: OpenFile | None = field(default=None, repr=False, compare=False)
    _starts: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def fetched(self) -> list[str]:
        """Tensors in the order in which they are written."""
        return list(self.tensors)

    def steps(self, piece: Piece) -> Iterator[Step]:
        """The reads of a piece of one of its tensors; of an opened shard."""
        assert self._file is not None
        dtype = DTYPES[self.tensors[piece.name].dtype]
        return steps(piece, self._file, self._starts[piece.name], dtype)

    def view(self, name: str) -> Tensor:
        """A tensor, read; of an opened shard."""
        spec = self.tensors[name]
        target = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="cpu")
        for step in self.steps(Piece(name, spec.shape, (0,) * target.ndim, target)):
            step.run()
        return target

    def check(self) -> None:
        """CheckpointError if the file was written to since it was opened."""
        assert self._file is not None
        self._file.check()


def render_header(shard: Shard) -> bytes:
    """Length and JSON, padded with spaces to a multiple of 8, as the safetensors library does."""
    if shard.header is not None:
        return len(shard.header).to_bytes(8, "little") + shard.header
    entries: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
    end = 0
    for name, spec in shard.tensors.items():
        start, end = end, end + spec.n_bytes
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def starts_of(shard: Shard, header: bytes) -> tuple[dict[str, int], int]:
    """First byte of each tensor, and the file's size, where a header is followed by the tensors."""
    starts, end = {}, len(header)
    for name, spec in shard.tensors.items():
        starts[name] = end
        end += spec.n_bytes
    return starts, end


def open_shard(path: Path) -> Shard:
    """Open a file and check its header and size; CheckpointError says what it is instead."""
    file = OpenFile(path)
    size = file.size
    if size < 8:
        raise _refuse(path, f"{size} bytes", "a safetensors file has a header")
    magic = file.read_bytes(0, min(size, 32))
    n = int.from_bytes(magic[:8], "little")
    if n > MAX_HEADER:
        refuse_disguise(path, magic, "the safetensors format", _DOWNLOADS | _PICKLES)
        raise _refuse(path, f"a header of {n} bytes", f"no header exceeds {MAX_HEADER}")
    if 8 + n > size:
        raise _refuse(path, f"truncated ({size} bytes)", f"its header alone has {n}")
    raw = file.read_bytes(8, n)
    entries = _parse(path, raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _refuse(path, f"metadata {shown(metadata)}", "metadata is an object of strings")
    spans = {name: _entry(path, name, entry) for name, entry in entries.items()}
    ordered = sorted(spans, key=lambda name: spans[name][1:])
    end = 0
    for name in ordered:
        _, start, stop = spans[name]
        if start != end:
            what = "overlaps the tensor before it" if start < end else "follows a hole"
            raise _refuse(path, f"{name} {what} (byte {start})", "tensors lie end to end")
        end = stop
    if 8 + n + end != size:
        kind = "truncated" if 8 + n + end > size else "trailing bytes"
        raise _refuse(path, f"{kind} ({size} bytes)", f"its header promises {8 + n + end}")
    shard = Shard({name: spans[name][0] for name in ordered}, metadata)
    shard._file = file
    shard._starts = {name: 8 + n + spans[name][1] for name in ordered}
    if render_header(shard)[8:] != raw:
        shard.header = raw
    return shard


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _refuse(path, f"{shown(key)} is there twice", "names are unique")
            for text in (key, value):
                if isinstance(text, str):
                    # an escaped lone surrogate is JSON to Python, but no text that can be written
                    text.encode()
            found[key] = value
        return found

    try:
        entries = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _refuse(path, f"a header that is not JSON ({error})", "it must be") from None
    if not isinstance(entries, dict):
        raise _refuse(path, f"a header that is a {type(entries).__name__}", "it is an object")
    return entries


def _entry(path: Path, name: str, entry: Any) -> tuple[Spec, int, int]:
    """Spec, first byte and end of one tensor."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(k) for k in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: {name} has dtype {shown(dtype)}; known are {', '.join(DTYPES)}. Use an "
            "unquantised checkpoint."
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _refuse(
            path,
            f"{name} has shape {shown(shape)} and offsets {shown(offsets)}",
            "both are lists of whole numbers >= 0",
        )
    spec = Spec(dtype, tuple(shape))
    if spec.n_bytes >= 2**63:
        raise _refuse(path, f"{name} has shape {shown(shape)}", "a tensor has < 2**63 bytes")
    if offsets[1] - offsets[0] != spec.n_bytes:
        raise _refuse(
            path,
            f"{name} spans {offsets[1] - offsets[0]} bytes",
            f"{dtype} {shown(shape)} has {spec.n_bytes}",
        )
    return spec, offsets[0], offsets[1]


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def refuse_disguise(
    path: Path, start: bytes, expected: str, disguises: dict[bytes, tuple[str, str]] = _DOWNLOADS
) -> None:
    """Refuse, by its first bytes, a file that is plainly something else than expected."""
    for magic, (what, way_out) in disguises.items():
        if start.lstrip().lower().startswith(magic):
            raise CheckpointError(f"{path}: {what}; expected {expected}. {way_out}")


def _refuse(path: Path, what: str, rule: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what}; {rule}, so this is not a whole safetensors file. Download it again."
    )
