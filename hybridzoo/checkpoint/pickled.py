"""PyTorch pickles (.bin, .pt), for `convert --from-pickle` alone: load() never unpickles."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from hybridzoo.checkpoint.io import Layout, plan
from hybridzoo.checkpoint.shard import DTYPE_NAMES, Spec
from hybridzoo.errors import CheckpointError

# what an unpickler may raise on bytes that are no pickle, says Python's documentation, and torch's.
_NOT_A_PICKLE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_SUFFIXES = (".bin", ".pt", ".pth")


class PickleReader:
    """A directory's pickled tensors, seen like Reader's; nothing but tensors is unpickled.

    Attributes:
        directory: where the files are.
        specs: dtype and shape of every tensor.
        layout: the safetensors files that these tensors are exported to.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        paths = sorted(p for p in directory.iterdir() if p.suffix in _SUFFIXES and p.is_file())
        # a training run's arguments and optimizer are no weights.
        paths = [p for p in paths if p.stem not in ("training_args", "optimizer", "scheduler")]
        if not paths:
            raise CheckpointError(
                f"{directory}: no pickled weights; expected files ending in "
                f"{', '.join(_SUFFIXES)}. Convert safetensors without --from-pickle."
            )
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, str] = {}
        for path in paths:
            self._add(path)
        self.specs = {
            n: Spec(DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in self._tensors.items()
        }
        self.layout: Layout = plan(self.specs)

    def file_of(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return self._files[name]

    def view(self, name: str) -> Tensor:
        """The tensor."""
        return self._tensors[name]

    def _add(self, path: Path) -> None:
        try:
            # torch before 1.6 wrote no zip, which alone can be mapped
            is_zip = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except _NOT_A_PICKLE as error:
            said = str(error).splitlines() or [type(error).__name__]
            raise CheckpointError(
                f"{path}: not a pickle of plain tensors ({said[0]}); nothing "
                "else is unpickled. Get safetensors."
            ) from None
        if not isinstance(content, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided
            for k, v in content.items()
        ):
            raise CheckpointError(
                f"{path}: not a mapping of names to dense tensors; a state dict is one. Save "
                "model.state_dict() alone."
            )
        for name, tensor in content.items():
            if name in self._files or tensor.dtype not in DTYPE_NAMES:
                raise CheckpointError(
                    f"{path}: {name} ({tensor.dtype}) is there twice, or of a dtype that "
                    "safetensors lacks; each tensor is in one file. Remove one."
                )
            self._tensors[name], self._files[name] = tensor.contiguous(), path.name
