"""PyTorch pickles (.bin, .pt), for `convert --from-pickle` alone: load() never unpickles."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from hybridzoo.checkpoint.archive import is_archive, load_tensors, read_entries, wrong_sums
from hybridzoo.checkpoint.frame import PICKLE_FILE, Pickle, frame_of
from hybridzoo.checkpoint.io import COMMITTED, Layout, plan
from hybridzoo.checkpoint.reader import read_json, resolve
from hybridzoo.checkpoint.shard import DTYPE_NAMES, Spec
from hybridzoo.checkpoint.transfer import Piece, narrow
from hybridzoo.errors import CheckpointError

_SUFFIXES = (".bin", ".pt", ".pth")
_WEIGHTS = re.compile(r"pytorch_model.*\.bin")


class PickleReader:
    """A directory's pickled tensors, seen like Reader's; nothing but tensors is unpickled.

    Attributes:
        directory: where the files are.
        specs: dtype and shape of every tensor.
        layout: the files that these tensors are exported to: pytorch_model.bin, the one read where
            it can be remembered, or safetensors.

    Args:
        directory: where the files are.
        remember: whether an export gives back pytorch_model.bin.
    """

    def __init__(self, directory: Path, *, remember: bool = False) -> None:
        self.directory = directory
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, str] = {}
        names = self._names()
        for name in names:
            self._add(resolve(directory, name))
        self.specs = {
            n: Spec(DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in self._tensors.items()
        }
        self.layout: Layout = plan(self.specs)
        if remember:
            path, frame = resolve(directory, PICKLE_FILE), None
            if names == [PICKLE_FILE] and is_archive(path):
                frame = frame_of(path, self._tensors, self.specs)
            self.layout = Layout({PICKLE_FILE: Pickle(self.specs, {}, frame=frame)})

    def file_of(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return self._files[name]

    def view(self, name: str) -> Tensor:
        """The tensor."""
        return self._tensors[name].contiguous()

    def fill(self, pieces: Iterable[Piece], *, once: bool = False) -> None:
        """Copy pieces into their targets."""
        for piece in pieces:
            stored = self.view(piece.name).view(piece.shape)
            piece.target.copy_(narrow(stored, piece.start, piece.target.shape))

    def _names(self) -> list[str]:
        places = [p for p in (self.directory / COMMITTED, self.directory) if p.is_dir()]
        paths = {p.name: p for place in places for p in place.iterdir() if p.is_file()}
        # a training run's arguments and optimizer are no weights.
        names = sorted(
            name
            for name, p in paths.items()
            if p.suffix in _SUFFIXES and p.stem not in ("training_args", "optimizer", "scheduler")
        )
        if not names:
            raise CheckpointError(
                f"{self.directory}: no pickled weights; expected files ending in "
                f"{', '.join(_SUFFIXES)}. Convert safetensors without --from-pickle."
            )
        index = resolve(self.directory, f"{PICKLE_FILE}.index.json")
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            listed = map(str, weight_map.values()) if isinstance(weight_map, dict) else ()
            if missing := sorted(set(listed) - paths.keys()):
                raise CheckpointError(
                    f"{self.directory}: {missing[0]} is missing; {index.name} lists it. Download "
                    "it too."
                )
        # beside a training run's weights lie states of its random numbers and of its scaler too.
        return [name for name in names if _WEIGHTS.fullmatch(name)] or names

    def _add(self, path: Path) -> None:
        tensors = load_tensors(path)
        if is_archive(path) and (wrong := wrong_sums(path, read_entries(path))):
            entry, crc = next(iter(wrong.items()))
            raise CheckpointError(
                f"{path}: {entry.name} is damaged (checksum {crc:08x}, recorded {entry.crc:08x}); "
                "its bytes are not those that were written. Download it again."
            )
        for name in tensors:
            if name in self._files:
                raise CheckpointError(
                    f"{path}: {name} is also in {self._files[name]}; each tensor is in one file. "
                    "Remove one."
                )
            self._files[name] = path.name
        self._tensors |= tensors
