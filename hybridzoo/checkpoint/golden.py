"""Answers shipped with weights: a few ids and their logits, and the checksums of every file.

`golden.safetensors` holds `input_ids` (b, l) and `logits` (b, n, vocab), those of the last n
positions, computed in float64 by every op's reference; its metadata says how far fp32 may be away.
Neither file has a name that a reader of safetensors or transformers looks for.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hybridzoo.checkpoint import load
from hybridzoo.checkpoint.io import GOLDEN, SUMS, finish_save, locked, sync
from hybridzoo.checkpoint.shard import Shard, Spec, open_shard, render_header
from hybridzoo.errors import CheckpointError
from hybridzoo.kernels.dispatch import find_op, list_ops, use
from hybridzoo.model import HybridLM
from hybridzoo.options import shown

REFERENCE = "reference"
# other BLAS, other devices and other backends add in other orders: each errs about as much as the
# reference in fp32 does, and 20 times that is still far below what one wrong op changes.
_NOISE_FACTOR = 20
_SHAPE = (2, 24)
_MAX_LOGITS = 2**18
_MAX_IDS = 2**16
# sha256sum writes a backslash before the digits where a name has one, or an end of line, escaped
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *]([^\x00-\x1f\\]+)")
_BLOCK = 2**22

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Golden:
    """Ids (b, l), their logits (b, n, vocab) in fp32 and the largest difference allowed."""

    input_ids: Tensor
    logits: Tensor
    tolerance: float

    def difference(self, model: HybridLM) -> float:
        """Largest difference of a model's logits; NaN where it computes one."""
        ids = self.input_ids.to(model.device)
        logits = _last(model, ids, self.logits.shape[1])
        return float((logits.cpu().double() - self.logits.double()).abs().max())


def write_golden(directory: str | Path) -> Golden:
    """Compute and write golden.safetensors of a checkpoint; holds its weights in float64 and fp32.

    Raises:
        CheckpointError: the checkpoint is not whole, or its logits are not finite.
    """
    directory = Path(directory)
    exact = load(directory, dtype=torch.float64)
    vocab = exact.config.vocab_size
    ids = torch.randint(vocab, _SHAPE, generator=torch.Generator().manual_seed(0))
    n = min(max(_MAX_LOGITS // (_SHAPE[0] * vocab), 1), _SHAPE[1])
    with references():
        truth = _last(exact, ids, n)
        rounded = _last(load(directory, dtype=torch.float32), ids, n).double()
    # logits that come out exact are still stored in fp32
    stored = torch.finfo(torch.float32).eps * float(truth.abs().max())
    noise = max(float((rounded - truth).abs().max()), stored)
    if not 0 < noise < math.inf:
        raise CheckpointError(
            f"{directory}: its logits are not finite numbers, or all 0; golden values show what a "
            "whole model answers. Run `hybridzoo verify` to find the weights at fault."
        )
    golden = Golden(ids, truth.float(), _NOISE_FACTOR * noise)
    metadata = {
        "format": "pt",
        "dtype": "float32",
        "noise": repr(noise),
        "tolerance": repr(golden.tolerance),
        "why": f"noise: largest difference of fp32 from float64; tolerance: {_NOISE_FACTOR} of it",
    }
    specs = {"input_ids": Spec("I64", _SHAPE), "logits": Spec("F32", tuple(truth.shape))}
    data = ids.numpy().tobytes() + golden.logits.numpy().tobytes()
    _replace(directory / GOLDEN, render_header(Shard(specs, metadata)) + data)
    return golden


def write_sums(directory: str | Path) -> None:
    """Write SHA256SUMS, as `sha256sum *` prints it, of the directory's files but itself."""
    directory = Path(directory)
    lines = [f"{digest(directory / name)}  {name}" for name in plain_files(directory)]
    if odd := next((line for line in lines if not _LINE.fullmatch(line)), None):
        raise CheckpointError(
            f"{directory}: a file's name ({shown(odd[66:])}) holds a backslash or an end of "
            "line; a line holds a checksum and a name. Rename the file."
        )
    text = "".join(f"{line}\n" for line in lines)
    _replace(directory / SUMS, text.encode("utf-8", "surrogateescape"))


def seal(directory: str | Path) -> None:
    """Write golden.safetensors and SHA256SUMS of a finished checkpoint, for `verify` to check."""
    with locked(Path(directory), "saving to"):
        # the logits are those of a committed save wherever it lies, the checksums of what lies here
        finish_save(Path(directory))
        write_golden(directory)
        write_sums(directory)


def read_golden(path: Path, vocab_size: int) -> Golden:
    """The golden file of a checkpoint; CheckpointError where it cannot be one."""
    shard = open_shard(path)
    specs = shard.tensors
    ids, logits = specs.get("input_ids"), specs.get("logits")
    fits = (
        specs.keys() == {"input_ids", "logits"}
        and ids is not None
        and logits is not None
        and (ids.dtype, logits.dtype) == ("I64", "F32")
        and len(ids.shape) == 2
        and 0 < math.prod(ids.shape) <= _MAX_IDS
        and len(logits.shape) == 3
        and logits.shape[0] == ids.shape[0]
        and 0 < logits.shape[1] <= ids.shape[1]
        and logits.shape[2] == vocab_size
    )
    if not fits:
        held = {name: (s.dtype, s.shape) for name, s in specs.items()}
        raise CheckpointError(
            f"{path}: no golden values ({shown(held)}); expected input_ids (b, l) I64 and logits "
            f"(b, n, {vocab_size}) F32. Write it again with hybridzoo.checkpoint.golden.seal."
        )
    input_ids = shard.view("input_ids").clone()
    if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
        raise CheckpointError(
            f"{path}: input_ids outside the vocabulary; ids are 0 to {vocab_size - 1}. Write it "
            "again with hybridzoo.checkpoint.golden.seal."
        )
    return Golden(input_ids, shard.view("logits").clone(), _tolerance(path, shard.metadata))


def _tolerance(path: Path, metadata: dict[str, str]) -> float:
    text = metadata.get("tolerance", "")
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise CheckpointError(
        f"{path}: no tolerance in its metadata ({shown(text)}); expected a number above 0. Write "
        "it again with hybridzoo.checkpoint.golden.seal."
    )


def read_sums(path: Path) -> dict[str, str]:
    """File name -> SHA-256 of a file that sha256sum wrote; CheckpointError says which line errs."""
    if path.stat().st_size > _BLOCK:
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes; a list of checksums has at most {_BLOCK}. "
            "Download it again."
        )
    found: dict[str, str] = {}
    # a name may hold what splitlines() takes for the end of a line
    lines = path.read_bytes().decode("utf-8", "surrogateescape").replace("\r\n", "\n").split("\n")
    for i, line in enumerate(lines, 1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None or match[2] in found:
            what = "is listed twice" if match else "is not a checksum and a name"
            raise CheckpointError(
                f"{path}: line {i} {what} ({shown(line)}); a line is 64 hexadecimal digits, two "
                "spaces and a file's name, as sha256sum writes it. Download it again."
            )
        found[match[2]] = match[1].lower()
    return found


def plain_files(directory: Path) -> list[str]:
    """The files a checkpoint's list of checksums covers: all but itself and hidden ones."""
    names = (p.name for p in directory.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(name for name in names if name != SUMS)


def digest(path: Path, advance: Advance = lambda n: None) -> str:
    """SHA-256 of a file; `advance` hears of every block."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
            advance(len(block))
    return found.hexdigest()


@contextmanager
def references(**others: str) -> Iterator[None]:
    """Every op on its reference, but for those named."""
    plain = {name: REFERENCE for name in list_ops() if REFERENCE in find_op(name).backends}
    with use(**plain), use(**others):
        yield


@torch.no_grad()
def _last(model: HybridLM, ids: Tensor, n: int) -> Tensor:
    """Logits of the last n positions, (b, n, vocab)."""
    logits: Tensor = model(ids)
    return logits[:, -n:]


def _replace(path: Path, content: bytes) -> None:
    staged = path.with_name(f".{path.name}.tmp")
    staged.write_bytes(content)
    sync(staged)
    os.replace(staged, path)
    sync(path.parent)
