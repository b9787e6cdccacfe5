"""Opening a checkpoint: which files it has, where they lie, whether they are what they say."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from hybridzoo.checkpoint.frame import PICKLE_FILE
from hybridzoo.checkpoint.io import COMMITTED, INDEX_FILE, SINGLE_FILE, Layout
from hybridzoo.checkpoint.shard import MAX_HEADER, open_shard, refuse_disguise
from hybridzoo.checkpoint.transfer import Piece, Step
from hybridzoo.errors import CheckpointError
from hybridzoo.options import shown, unique

_SHARD_NAME = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
_ATTEMPTS = 100

T = TypeVar("T")


class Reader:
    """The tensors of a directory, a single file or an index's shards; opening reads headers only.

    Attributes:
        directory: where the files are.
        layout: which tensors stand in which files, as found.
        specs: dtype and shape of every tensor, from the headers.

    Raises:
        CheckpointError: a file is missing, lies outside the directory, or is not what a safetensors
            file must be.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        entry = self._entry()
        if entry == SINGLE_FILE:
            self.layout = Layout({SINGLE_FILE: open_shard(self._existing(SINGLE_FILE))})
        else:
            index = read_json(resolve(self.directory, INDEX_FILE))
            weight_map = self._weight_map(index)
            files = dict.fromkeys(weight_map.values())
            shards = {name: open_shard(self._existing(name)) for name in sorted(files)}
            self.layout = Layout(shards, index.get("metadata") or {})
            self._check_weight_map(weight_map)
        self._home = {n: file for file, s in self.layout.files.items() for n in s.tensors}
        self.specs = {
            n: s for shard in self.layout.files.values() for n, s in shard.tensors.items()
        }

    def file_of(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return self._home[name]

    def view(self, name: str) -> Tensor:
        """The tensor, read whole."""
        return self.layout.files[self._home[name]].view(name)

    def fill(self, pieces: Iterable[Piece], *, once: bool = False) -> None:
        """Read pieces into their targets, in the order of the files.

        Args:
            pieces: what goes where.
            once: nobody here will soon read the files again: where memory cannot hold them beside
                the targets, they do not stay in the system's cache.

        Raises:
            CheckpointError: a file cannot be read, or was written to since it was opened.
        """
        places = {n: i for i, n in enumerate(self.specs)}
        ordered = sorted(pieces, key=lambda p: (places[p.name], p.start))
        shards = self.layout.files
        found = [step for p in ordered for step in shards[self._home[p.name]].steps(p)]
        n_bytes = sum(s.n_bytes + s.target.nbytes * s.target.is_cpu for s in found)
        leave = once and n_bytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

        def run(step: Step) -> None:
            # threads do not inherit the caller's modes; this one writes to all kinds of tensors
            with torch.inference_mode():
                step.run()
            if leave:
                step.forget()

        # two, so that one copies or casts while the other waits for the disk.
        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(run, found):
                pass
        for file in {self._home[p.name] for p in ordered}:
            shards[file].check()

    def _entry(self) -> str:
        places = [p for p in (self.directory / COMMITTED, self.directory) if p.is_dir()]
        for place in places:
            found = [n for n in (INDEX_FILE, SINGLE_FILE) if (place / n).exists()]
            if len(found) > 1 and not _is_of_one_file(place / INDEX_FILE):
                raise CheckpointError(
                    f"{place}: holds both {INDEX_FILE} and {SINGLE_FILE}; a checkpoint has one of "
                    "them. Remove the stale one."
                )
            if found:
                return found[0]
            if (place / PICKLE_FILE).exists():
                # what else lies there is older than a committed save of these
                break
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory}: no such directory; a checkpoint is a directory with "
                "config.json and safetensors. Check the path."
            )
        names = sorted(path.name for place in places for path in place.iterdir())
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        if pickles:
            raise CheckpointError(
                f"{self.directory}: only pickled weights ({pickles[0]}); hybridzoo loads "
                "safetensors, because a pickle can run code. Rewrite them once with `hybridzoo "
                f"convert {self.directory} TARGET --from-pickle`."
            )
        if shards := [name for name in names if name.endswith(".safetensors")]:
            raise CheckpointError(
                f"{self.directory}: {INDEX_FILE} is missing beside {shards[0]}; it says which "
                "tensor is in which file. Download it too."
            )
        raise CheckpointError(
            f"{self.directory}: no weights; expected {SINGLE_FILE} or {INDEX_FILE}. Check the "
            "path or download again."
        )

    def _existing(self, name: str) -> Path:
        path = resolve(self.directory, name)
        # a pipe would be waited for
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing; the checkpoint needs this file. Download it again."
            )
        return path

    def _weight_map(self, index: dict[str, Any]) -> dict[str, str]:
        weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
        if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
            raise CheckpointError(
                f"{self.directory / INDEX_FILE}: no weight_map ({type(weight_map).__name__}); an "
                "index maps each tensor to a file. Download it again."
            )
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
                raise CheckpointError(
                    f"{self.directory / INDEX_FILE}: {tensor} is in an illegal file ({file!r}); "
                    "shards are plain names such as model-00001-of-00002.safetensors in the same "
                    "directory. Do not trust this checkpoint."
                )
        return weight_map

    def _check_weight_map(self, weight_map: dict[str, str]) -> None:
        seen: dict[str, str] = {}
        for file, shard in self.layout.files.items():
            for name in shard.tensors:
                if name in seen:
                    raise CheckpointError(
                        f"{self.directory / file}: {name} is also in {seen[name]}; each tensor is "
                        "in one file. Download both again."
                    )
                seen[name] = file
        for name in sorted(seen.keys() | weight_map.keys()):
            if seen.get(name) != weight_map.get(name):
                raise CheckpointError(
                    f"{self.directory / INDEX_FILE}: {name} should be in "
                    f"{weight_map.get(name, 'no file')} but is in {seen.get(name, 'none')}; index "
                    "and shards must agree. Download them again."
                )


def _is_of_one_file(path: Path) -> bool:
    weight_map = read_json(path).get("weight_map")
    return isinstance(weight_map, dict) and {*map(str, weight_map.values())} == {SINGLE_FILE}


def undisturbed(directory: Path, read: Callable[[], T]) -> T:
    """What `read` finds when no save moves a file meanwhile: all of one checkpoint.

    A reader takes no lock, so that a read-only directory can be read and no reader delays a save.
    """
    for _ in range(_ATTEMPTS):
        before = _files(directory)
        try:
            found = read()
        except (OSError, CheckpointError):
            if _files(directory) == before:
                raise
        else:
            if _files(directory) == before:
                return found
    raise CheckpointError(
        f"{directory}: its files changed in each of {_ATTEMPTS} attempts to read them; a "
        "checkpoint is read between two saves. Try again."
    )


def _files(directory: Path) -> set[tuple[str, int, int]]:
    """Path, inode and time of every file there: a save changes some of them."""
    found = set()
    for place in (directory / COMMITTED, directory):
        # a save that ends takes COMMITTED away
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(place) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    found.add((entry.path, status.st_ino, status.st_mtime_ns))
    return found


def resolve(directory: Path, name: str) -> Path:
    """Where a file lies: in a committed save that was cut short, or in the directory.

    Raises:
        CheckpointError: it is a link that leads elsewhere, or no name that a file can have.
    """
    try:
        # both are asked, for only the system knows which names are too long
        there = [p for p in (directory / COMMITTED / name, directory / name) if p.exists()]
        path = there[0] if there else directory / name
        home, target = directory.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        # a name of a page's length, or with a NUL; links in a circle, a RuntimeError up to 3.12
        raise CheckpointError(
            f"{directory}: {shown(name)} leads to no file ({error}); a checkpoint's files have "
            "plain names. Download it again."
        ) from None
    allowed = [home]
    if home.parent.name == "snapshots":
        # huggingface_hub's cache: a snapshot's files are links to blobs/ of the same repository,
        # and those may be links to blobs/ of the cache, which all repositories share.
        allowed += [home.parent.parent / "blobs", home.parent.parent.parent / "blobs"]
    if not any(target.is_relative_to(a) for a in allowed):
        raise CheckpointError(
            f"{path}: leads out of the directory ({target}); a checkpoint's files lie in it. Copy "
            "the file there if you trust it."
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError says what else it holds."""
    if not path.is_file():
        inside = sorted(p.parent.name for p in path.parent.glob(f"*/{path.name}"))[:4]
        # a run's directory was named, not one of its checkpoints
        way = f"Name one inside ({', '.join(inside)})," if inside else "Check the path"
        raise CheckpointError(
            f"{path}: missing; a checkpoint has this file. {way} or download it again."
        )
    if path.stat().st_size > MAX_HEADER:
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes; no such file exceeds {MAX_HEADER}. Download it "
            "again."
        )
    raw = path.read_bytes()
    refuse_disguise(path, raw[:64], "JSON")
    try:
        # as text: of bytes Python also takes what transformers and an export do not
        content = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not JSON ({error}); expected an object. Download it again."
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: a {type(content).__name__}, not an object; expected {{key: value}}. "
            "Download it again."
        )
    return content
