"""Is a directory a whole, sane model? Each check is a finding, and a failed one a sentence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from hybridzoo.checkpoint import load, open_source
from hybridzoo.checkpoint.golden import (
    REFERENCE,
    Golden,
    digest,
    plain_files,
    read_golden,
    read_sums,
    references,
)
from hybridzoo.checkpoint.io import GOLDEN, INDEX_FILE, SUMS
from hybridzoo.checkpoint.layout import Source
from hybridzoo.checkpoint.reader import Reader, read_json, resolve
from hybridzoo.checkpoint.shard import DTYPES, Spec
from hybridzoo.errors import BackendError, CheckpointError, HybridzooError
from hybridzoo.kernels.dispatch import explain
from hybridzoo.model import HybridLM
from hybridzoo.options import shown
from hybridzoo.tokenizer import load_tokenizer

Status = Literal["ok", "failed", "not there", "not run"]
# what a long check tells: which one, bytes done, bytes in all.
Progress = Callable[[str, int, int], None]

# check -> what an earlier one must have opened for it
_NEEDS = {
    "files": None,
    "tensors": "reader",
    "values": "reader",
    "checksums": None,
    "tokenizer": "source",
    "golden": "source",
}
_CHOSEN, _REFERENCES = "chosen backends", "references"
_MAX_NAMED = 20
_BLOCK = 2**23


@dataclass(frozen=True)
class Finding:
    """One check's outcome.

    Attributes:
        check: files, tensors, values, checksums, tokenizer or golden.
        status: "not there": the checkpoint ships nothing to check; "not run": a failed check before
            it left nothing to check.
        detail: what was seen; of a failed check, the file, what it holds, what was expected and the
            way out.
    """

    check: str
    status: Status
    detail: str

    def to_dict(self) -> dict[str, str]:
        """The fields as plain values."""
        return asdict(self)


def verify(
    directory: str | Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = lambda check, done, total: None,
    only: Collection[str] | None = None,
) -> list[Finding]:
    """Check a native or published directory; nothing is written.

    Files and index against each other, tensors against config.json, values for NaN and Inf, every
    file against SHA256SUMS, the tokenizer against the embedding, and the model's logits against
    golden.safetensors with the backends that are chosen here and with each one that runs here.

    Args:
        directory: config.json and safetensors.
        device: where the golden values are compared.
        progress: hears how far the two checks that read every byte have come.
        only: the checks to make; None is all of them.

    Returns:
        The findings, in the order of the checks; all is well if none has failed.
    """
    checks = _Checks(Path(directory), torch.device(device), progress)
    found: list[Finding] = []
    for name, needs in _NEEDS.items():
        if only is not None and name not in only:
            continue
        if needs and not hasattr(checks, needs):
            found.append(Finding(name, "not run", "needs what failed above"))
            continue
        try:
            found.extend(getattr(checks, name)())
        except HybridzooError as error:
            found.append(Finding(name, "failed", str(error)))
    return found


class _Checks:
    """One method a check; files and tensors leave what they opened to the later ones."""

    reader: Reader
    source: Source

    def __init__(self, directory: Path, device: torch.device, progress: Progress) -> None:
        self.directory, self.device, self.progress = directory, device, progress

    def files(self) -> Iterator[Finding]:
        self.reader = Reader(self.directory)
        n_bytes, layout = _n_bytes(self.reader), self.reader.layout
        said = (layout.index or {}).get("total_size", n_bytes)
        if said != n_bytes or type(said) is not int:
            raise CheckpointError(
                f"{self.directory / INDEX_FILE}: a total_size of {shown(said)}; its files hold "
                f"{n_bytes} bytes of tensors. Download the checkpoint again."
            )
        n = len(layout.files)
        what = f"{n} file{'s' * (n > 1)}, {len(self.reader.specs)} tensors, {n_bytes:,} bytes"
        yield Finding("files", "ok", what)

    def tensors(self) -> Iterator[Finding]:
        self.source = open_source(self.directory)
        path = resolve(self.directory, "config.json")
        published = read_json(path)
        said = published.get("dtype", published.get("torch_dtype"))
        stored = Counter(spec.dtype for spec in self.reader.specs.values())
        names = {str(DTYPES[dtype]).removeprefix("torch.") for dtype in stored}
        if said is not None and said not in names:
            raise CheckpointError(
                f"{path}: a dtype of {shown(said)}; its weights are {', '.join(sorted(names))}. "
                "Mend config.json, if the weights are what you want."
            )
        dtypes = ", ".join(f"{n} {dtype}" for dtype, n in sorted(stored.items()))
        n_params = self.source.config.n_params()
        yield Finding("tensors", "ok", f"{n_params:,} parameters, as config.json says; {dtypes}")

    def values(self) -> Iterator[Finding]:
        done, total, bad = 0, _n_bytes(self.reader), 0
        for file, name, spec, blocks in self._tensors_read():
            n_nan = n_inf = 0
            for block in blocks:
                n_nan += int(block.isnan().sum())
                n_inf += int(block.isinf().sum())
                done += len(block) * DTYPES[spec.dtype].itemsize
                self.progress("values", done, total)
            if n_nan or n_inf:
                bad += 1
                if bad <= _MAX_NAMED:
                    n = math.prod(spec.shape)
                    what = f"{file}: {name} has {n_nan:,} NaN and {n_inf:,} Inf in {n:,} values"
                    way = "Download it again, or go back to an earlier checkpoint of its training"
                    yield Finding("values", "failed", f"{what}; weights are finite. {way}.")
        if bad > _MAX_NAMED:
            yield Finding("values", "failed", f"{bad - _MAX_NAMED} more tensors hold NaN or Inf.")
        if not bad:
            yield Finding("values", "ok", "no NaN, no Inf")

    def _tensors_read(self) -> Iterator[tuple[Path, str, Spec, Iterator[torch.Tensor]]]:
        """File, name, spec and values of every tensor; the values are to be taken at once."""
        for file, shard in self.reader.layout.files.items():
            path = resolve(self.directory, file)
            # read, not mapped: however large the checkpoint, one block of it is in memory
            with open(path, "rb") as stream:
                stream.seek(8 + int.from_bytes(stream.read(8), "little"))
                for name, spec in shard.tensors.items():
                    yield path, name, spec, _blocks(stream, spec)

    def checksums(self) -> Iterator[Finding]:
        path = resolve(self.directory, SUMS)
        if not path.is_file():
            yield Finding("checksums", "not there", f"no {SUMS}")
            return
        sums = read_sums(path)
        # every path is judged before a byte is read
        paths = {name: resolve(self.directory, name) for name in sums}
        done, total = 0, sum(p.stat().st_size for p in paths.values() if p.is_file())

        def advance(n: int) -> None:
            nonlocal done
            done += n
            self.progress("checksums", done, total)

        failed = []
        for name, file in paths.items():
            # a device or a pipe would be read for ever
            if not file.is_file():
                failed.append(f"{file}: missing; {SUMS} lists it. Download it again.")
            elif digest(file, advance) != sums[name]:
                failed.append(
                    f"{file}: its SHA-256 is not that in {SUMS}; the file was changed or cut. "
                    f"Download it again, or write {SUMS} again if the change was yours."
                )
        yield from (Finding("checksums", "failed", what) for what in failed[:_MAX_NAMED])
        if len(failed) > _MAX_NAMED:
            yield Finding("checksums", "failed", f"{len(failed) - _MAX_NAMED} more files differ.")
        if not failed:
            others = [name for name in plain_files(self.directory) if name not in sums]
            unlisted = f"; not listed: {', '.join(others[:_MAX_NAMED])}" if others else ""
            yield Finding("checksums", "ok", f"{len(sums)} files{unlisted}")

    def tokenizer(self) -> Iterator[Finding]:
        spec = self.source.config.tokenizer
        path = spec if spec == "bytes" else resolve(self.directory, spec)
        if isinstance(path, Path) and not path.is_file():
            yield Finding("tokenizer", "not there", f"no {spec} beside the weights")
            return
        n_ids, n_rows = load_tokenizer(path).vocab_size, self._n_rows()
        if n_ids > n_rows:
            raise CheckpointError(
                f"{path}: {n_ids} ids; the embedding has {n_rows} rows and every id needs one. Use "
                "the model's own tokenizer."
            )
        yield Finding("tokenizer", "ok", f"{n_ids} ids, {n_rows} rows")

    def golden(self) -> Iterator[Finding]:
        path = resolve(self.directory, GOLDEN)
        if not path.is_file():
            yield Finding("golden", "not there", f"no {GOLDEN}")
            return
        golden = read_golden(path, self._n_rows())
        model = load(self.directory, dtype=torch.float32, device=self.device)
        differences = {_CHOSEN: golden.difference(model)}
        with references():
            differences[_REFERENCES] = golden.difference(model)
        for row in explain(self.device):
            if row.reason is None and row.backend != REFERENCE:
                differences |= _alone(golden, model, row.op, row.backend)
        seen = ", ".join(f"{name} {d:.2g}" for name, d in differences.items())
        # NaN is not <= anything
        wrong = [name for name, d in differences.items() if not d <= golden.tolerance]
        what = f"{golden.tolerance:.2g} is allowed: {seen}"
        if not wrong:
            yield Finding("golden", "ok", f"{golden.input_ids.numel()} ids; {what}")
            return
        raise CheckpointError(f"{path}: the logits differ; {what}. {_blame(wrong)}.")

    def _n_rows(self) -> int:
        return self.source.params["embed.weight"].shape[0]


def _n_bytes(reader: Reader) -> int:
    return sum(spec.n_bytes for spec in reader.specs.values())


def _blocks(stream: Any, spec: Spec) -> Iterator[torch.Tensor]:
    """The values of the next tensor in a file, a block at a time."""
    left = spec.n_bytes
    while left:
        data = bytearray(stream.read(min(left, _BLOCK)))
        if not data:
            raise CheckpointError(
                f"{stream.name}: shorter than a moment ago; verify reads files that nobody writes. "
                "Try again."
            )
        left -= len(data)
        block = torch.frombuffer(data, dtype=DTYPES[spec.dtype])
        # torch asks 8-bit floats nothing
        yield block.float() if block.itemsize == 1 and block.is_floating_point() else block


def _alone(golden: Golden, model: HybridLM, op: str, backend: str) -> dict[str, float]:
    """The difference with one backend among references; nothing if it takes no such inputs."""
    try:
        with references(**{op: backend}):
            return {f"{op}={backend}": golden.difference(model)}
    except BackendError:
        return {}


def _blame(wrong: list[str]) -> str:
    """What is at fault where these runs differ, and the way out."""
    if _REFERENCES in wrong:
        return "These are not the weights or the config it was written for: download them again"
    alone = [name for name in wrong if name != _CHOSEN]
    if alone:
        return f"Wrong here: {', '.join(alone)}; use another backend (--kernels), and report it"
    return "Wrong here are backends that agree one by one; choose others (--kernels), and report it"
