"""safetensors files: read lazily and distrustfully, written all or not at all.

How a save is atomic. Everything is written and fsynced in `.saving/` inside the directory; renaming that to `.saved/` is
the one commit point, for config and weights together. The files then move out one by one, the index (or the single
file) last, after stale shards were removed. Until `.saving/` is renamed a reader sees the old checkpoint; from then on
it takes from `.saved/` whatever still lies there, so that a kill at any moment leaves the old or the new one, whole.
The next save clears `.saving/` or finishes `.saved/`. Final names need not be new, so every layout can be written.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridzoo.checkpoint.shard import DTYPES, Shard, Spec, open_shard, render_header
from hybridzoo.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_STAGING, _COMMITTED = ".saving", ".saved"
_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")


@dataclass
class Layout:
    """Which tensors stand in which files.

    Attributes:
        files: file name -> its shard: tensors in the order of their bytes, and the header's metadata.
        index: the index's `metadata`; None when there is no index.
    """

    files: dict[str, Shard] = field(default_factory=dict)
    index: dict[str, Any] | None = None

    def index_text(self) -> str:
        """The index as transformers writes it: sorted, indented by two."""
        weight_map = {name: file for file, shard in self.files.items() for name in shard.tensors}
        content = {"metadata": self.index, "weight_map": weight_map}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def plan(specs: Mapping[str, Spec], max_shard_bytes: int = 5_000_000_000) -> Layout:
    """Spread tensors over files of at most `max_shard_bytes`, in the given order; a larger tensor has its own file."""
    if max_shard_bytes < 1:
        raise CheckpointError(
            f"max_shard_bytes: too small ({max_shard_bytes}); a file holds at least one byte. Use 5_000_000_000."
        )
    groups: list[dict[str, Spec]] = [{}]
    room = max_shard_bytes
    for name, spec in specs.items():
        if groups[-1] and spec.n_bytes > room:
            groups.append({})
            room = max_shard_bytes
        groups[-1][name] = spec
        room -= spec.n_bytes
    # wide dtypes first, so that every tensor starts at a multiple of its item size.
    shards = [
        Shard(dict(sorted(g.items(), key=lambda item: -DTYPES[item[1].dtype].itemsize)))
        for g in groups
    ]
    if len(shards) == 1:
        return Layout({SINGLE_FILE: shards[0]})
    total = sum(spec.n_bytes for spec in specs.values())
    n = len(shards)
    names = (f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1))
    return Layout(dict(zip(names, shards, strict=True)), {"total_size": total})


def write(
    directory: str | Path,
    layout: Layout,
    fetch: Callable[[str], Tensor],
    *,
    texts: Mapping[str, bytes],
) -> None:
    """Write tensors, index and other files, all or nothing (how: see the module).

    Args:
        directory: made if missing; files that are not a checkpoint's weights are left alone.
        layout: which tensors go where; their dtypes are what is written.
        fetch: the tensor of a name, called once each in the layout's order; one at a time is alive here.
        texts: other files of the checkpoint (config.json, tokenizer.json) by name; a text of the index's name is
            written in place of the rendered index.

    Raises:
        CheckpointError: the directory cannot be written, another process is saving to it, or a tensor has not its
            planned shape.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            _finish(directory)
            staging = directory / _STAGING
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            for name, shard in layout.files.items():
                _write_shard(staging / name, shard, fetch)
            if layout.index is not None:
                texts = {INDEX_FILE: layout.index_text().encode(), **texts}
            for name, content in texts.items():
                with _synced(staging / name) as file:
                    file.write(content)
            _sync_directory(staging)
            os.rename(staging, directory / _COMMITTED)
            _sync_directory(directory)
            _finish(directory)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot be written ({error.strerror or error}); the checkpoint there before, if any, is whole. "
            "Free space, or save elsewhere."
        ) from error


def _finish(directory: Path) -> None:
    """Move a committed save into place; every step may be repeated, so a kill in between does no harm."""
    committed = directory / _COMMITTED
    if not committed.is_dir():
        return
    names = {p.name for p in committed.iterdir()}
    entry = INDEX_FILE if INDEX_FILE in names else SINGLE_FILE
    if entry in names:
        fresh = set(json.loads((committed / entry).read_bytes())["weight_map"].values()) if (
            entry == INDEX_FILE
        ) else set()  # fmt: skip
        for path in directory.iterdir():
            if _WEIGHT_FILE.fullmatch(path.name) and path.name not in fresh | {entry}:
                path.unlink()
        for name in sorted(names - {entry}):
            os.replace(committed / name, directory / name)
        _sync_directory(directory)
        os.replace(committed / entry, directory / entry)
    committed.rmdir()
    _sync_directory(directory)


class Reader:
    """The tensors of a directory: `model.safetensors`, or the shards of its index. Opening reads headers only.

    Attributes:
        directory: where the files are.
        layout: which tensors stand in which files, as found.

    Raises:
        CheckpointError: a file is missing, lies outside the directory, or is not what a safetensors file must be.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        entry = self._entry()
        if entry == SINGLE_FILE:
            self.layout = Layout({SINGLE_FILE: open_shard(self._safe_path(SINGLE_FILE))})
        else:
            index = self.read_json(INDEX_FILE)
            weight_map = self._weight_map(index)
            files = dict.fromkeys(weight_map.values())
            shards = {name: open_shard(self._safe_path(name)) for name in sorted(files)}
            self.layout = Layout(shards, index.get("metadata", {}))
            self._check_weight_map(weight_map)
        self._home = {n: s for s in self.layout.files.values() for n in s.tensors}

    @property
    def specs(self) -> dict[str, Spec]:
        """Dtype and shape of every tensor, from the headers."""
        return {name: shard.tensors[name] for name, shard in self._home.items()}

    def file_of(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return next(file for file, shard in self.layout.files.items() if name in shard.tensors)

    def view(self, name: str) -> Tensor:
        """The tensor as it lies in the file, mapped read-only: a slice of it reads only its bytes; clone before writing."""
        return self._home[name].view(name)

    def get(self, name: str) -> Tensor:
        """The tensor in memory of its own."""
        return self.view(name).clone()

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object beside the weights."""
        path = resolve(self.directory, name)
        return read_json(path)

    def _entry(self) -> str:
        for place in (self.directory / _COMMITTED, self.directory):
            found = [n for n in (INDEX_FILE, SINGLE_FILE) if (place / n).exists()]
            if len(found) > 1:
                raise CheckpointError(
                    f"{place}: holds both {INDEX_FILE} and {SINGLE_FILE}; a checkpoint has one of them. Remove the stale one."
                )
            if found:
                return found[0]
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory}: no such directory; a checkpoint is a directory with config.json and safetensors. "
                "Check the path."
            )
        pickles = sorted(
            p.name for p in self.directory.iterdir() if p.suffix in (".bin", ".pt", ".pth")
        )
        if pickles:
            raise CheckpointError(
                f"{self.directory}: only pickled weights ({pickles[0]}); hybridzoo loads safetensors, because a pickle can "
                f"run code. Rewrite them once with `hybridzoo convert {self.directory} TARGET --from-pickle`."
            )
        raise CheckpointError(
            f"{self.directory}: no weights; expected {SINGLE_FILE} or {INDEX_FILE}. Check the path or download again."
        )

    def _safe_path(self, name: str) -> Path:
        path = resolve(self.directory, name)
        if not path.exists():
            raise CheckpointError(
                f"{path}: missing; the checkpoint needs this file. Download it again."
            )
        home = self.directory.resolve()
        allowed = [home]
        if home.parent.name == "snapshots":
            # huggingface_hub's cache: a snapshot's files are links to blobs/ of the same repository.
            allowed.append(home.parent.parent / "blobs")
        if not any(path.resolve().is_relative_to(a) for a in allowed):
            raise CheckpointError(
                f"{path}: leads out of the directory ({path.resolve()}); a checkpoint's files lie in it. "
                "Copy the file there if you trust it."
            )
        return path

    def _weight_map(self, index: dict[str, Any]) -> dict[str, str]:
        weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
        if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
            raise CheckpointError(
                f"{self.directory / INDEX_FILE}: no weight_map ({type(weight_map).__name__}); an index maps each tensor to "
                "a file. Download it again."
            )
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
                raise CheckpointError(
                    f"{self.directory / INDEX_FILE}: {tensor} is in an illegal file ({file!r}); shards are plain names such "
                    "as model-00001-of-00002.safetensors in the same directory. Do not trust this checkpoint."
                )
        return weight_map

    def _check_weight_map(self, weight_map: dict[str, str]) -> None:
        seen: dict[str, str] = {}
        for file, shard in self.layout.files.items():
            for name in shard.tensors:
                if name in seen:
                    raise CheckpointError(
                        f"{self.directory / file}: {name} is also in {seen[name]}; each tensor is in one file. "
                        "Download both again."
                    )
                seen[name] = file
        for name in sorted(seen.keys() | weight_map.keys()):
            if seen.get(name) != weight_map.get(name):
                raise CheckpointError(
                    f"{self.directory / INDEX_FILE}: {name} should be in {weight_map.get(name, 'no file')} but is in "
                    f"{seen.get(name, 'none')}; index and shards must agree. Download them again."
                )


def resolve(directory: Path, name: str) -> Path:
    """Where a checkpoint's file lies: in the committed save if one was cut short, else in the directory."""
    committed = directory / _COMMITTED / name
    return committed if committed.exists() else directory / name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError says what else it holds."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing; a checkpoint has this file. Check the path or download it again."
        )
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not JSON ({error}); expected an object. Download it again."
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: a {type(content).__name__}, not an object; expected {{key: value}}. Download it again."
        )
    return content


def _write_shard(path: Path, shard: Shard, fetch: Callable[[str], Tensor]) -> None:
    with _synced(path) as file:
        file.write(render_header(shard))
        for name, spec in shard.tensors.items():
            tensor = fetch(name)
            if tensor.numel() != prod(spec.shape):
                raise CheckpointError(
                    f"{path.name}: {name} has {tensor.numel()} elements, its header says {spec.shape}; they must agree. "
                    "Save with the config that the model was built from."
                )
            flat = tensor.detach().to(device="cpu", dtype=DTYPES[spec.dtype]).reshape(-1)
            file.write(flat.contiguous().view(torch.uint8).numpy().data)


@contextmanager
def _synced(path: Path) -> Iterator[Any]:
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory for one saver; the lock ends with the process, however it ends."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{directory}: another process is saving to it; one may at a time. Wait, or save elsewhere."
            ) from None
        yield
    finally:
        os.close(fd)
