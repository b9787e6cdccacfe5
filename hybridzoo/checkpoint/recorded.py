"""What a published checkpoint's files looked like, kept in the config for an exact export."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hybridzoo.checkpoint.frame import PICKLE_FILE, Frame, Pickle
from hybridzoo.checkpoint.io import INDEX_FILE, Layout
from hybridzoo.checkpoint.layout import Block, Blocks
from hybridzoo.checkpoint.pickled import PickleReader
from hybridzoo.checkpoint.reader import Reader, resolve
from hybridzoo.checkpoint.shard import DTYPES, MAX_HEADER, Shard, Spec
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError
from hybridzoo.options import read_options, strict

# files whose text an export writes back.
_TEXTS = ("config.json", "generation_config.json", INDEX_FILE)
# what is written has to be read again: the other half of a config.json is the architecture's.
_MAX_LAYOUT = MAX_HEADER // 2


@dataclass(frozen=True)
class SourceFile:
    """One file of SourceLayout.

    Attributes:
        file: its name.
        tensors: their dtypes, in the order of their bytes.
        metadata: of a safetensors header.
        header: the header itself, where its spelling is unusual.
        frame: of a .bin, a Frame.
    """

    file: str
    tensors: dict[str, str]
    metadata: dict[str, str]
    header: str | None
    frame: Any = None


@dataclass(frozen=True)
class SourceLayout:
    """What HybridConfig.source_layout holds, so that export gives back the source's files.

    Attributes:
        family: model_type of the source.
        files: its weight files, each a SourceFile.
        index: metadata of the index; None when there was none.
        texts: config.json and other texts to write again.
    """

    family: str
    files: tuple[Any, ...]
    index: dict[str, Any] | None
    texts: dict[str, str]

    @classmethod
    def of(cls, config: HybridConfig) -> SourceLayout | None:
        """The config's, checked: it may come from a config.json that somebody edited."""
        if config.source_layout is None:
            return None
        where = "source_layout"
        layout = read_options(cls, where, config.source_layout, of=where)
        files = [_read_file(f"{where}.files", entry) for entry in layout.files]
        try:
            # JSON may hold lone surrogates, which no file can
            json.dumps(config.source_layout, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(
                f"{where}: text that cannot be written ({error.reason}); it is UTF-8. Remove "
                "source_layout from config.json."
            ) from None
        dtypes = {dtype for file in files for dtype in map(str, file.tensors.values())}
        if not dtypes <= DTYPES.keys():
            raise CheckpointError(
                f"{where}.files: unknown dtype ({', '.join(sorted(dtypes - DTYPES.keys()))}); "
                f"known are {', '.join(DTYPES)}. Remove source_layout from config.json."
            )
        return replace(layout, files=tuple(files))

    def published(self) -> dict[str, Any]:
        """The source's config.json; CheckpointError if it is none."""
        try:
            content = json.loads(self.texts["config.json"])
        except (KeyError, TypeError, ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise CheckpointError(
                "source_layout.texts: no config.json that is an object; an import records the "
                "source's. Remove source_layout from config.json."
            )
        return content

    def names(self) -> set[str]:
        """Every tensor's."""
        return {name for file in self.files for name in file.tensors}


def record(family: str, reader: Reader | PickleReader) -> dict[str, Any] | None:
    """A SourceLayout as plain values; None, and a warning, if config.json has no room for it."""
    texts = {}
    for name in _TEXTS:
        path = resolve(reader.directory, name)
        if path.is_file() and (name != INDEX_FILE or _has_odd_index(reader, path)):
            texts[name] = _text(path)
    files = [
        {
            "file": file,
            "tensors": {name: spec.dtype for name, spec in shard.tensors.items()},
            "metadata": shard.metadata,
            # kept only where its spelling is unusual.
            "header": shard.header.decode() if shard.header else None,
            **({"frame": asdict(shard.frame)} if isinstance(shard, Pickle) and shard.frame else {}),
        }
        for file, shard in reader.layout.files.items()
    ]
    index = reader.layout.index
    layout = {"family": family, "files": files, "index": index, "texts": texts}
    if _has_room(layout):
        return layout
    warnings.warn(
        f"{reader.directory}: how its files look does not fit into config.json ({_MAX_LAYOUT} "
        "bytes); an export will not be byte-identical.",
        stacklevel=2,
    )
    return None


def _has_room(layout: dict[str, Any]) -> bool:
    try:
        # as a native config.json spells it
        return len(json.dumps(strict({"source_layout": layout}), indent=2)) <= _MAX_LAYOUT
    except RecursionError:
        # lists in lists: each line of theirs is longer than the last
        return False


def _has_odd_index(reader: Reader | PickleReader, path: Path) -> bool:
    """Whether an index is of the files that were read, and not spelled as transformers does."""
    # beside pickles, or a save that was cut short, it may be that of other weights.
    is_own = isinstance(reader, Reader) and reader.layout.index is not None
    return is_own and path.read_bytes() != reader.layout.index_text().encode()


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: not UTF-8 text (byte {error.start}); it is JSON. Download it again."
        ) from None


def _read_file(where: str, entry: Any) -> SourceFile:
    file = read_options(SourceFile, where, entry, of="files")
    if file.frame is None:
        return file
    return replace(file, frame=read_options(Frame, f"{where}.frame", file.frame, of="frame"))


def recorded_layout(layout: SourceLayout, blocks: Blocks) -> Layout | None:
    """The source's files; None unless they hold just the tensors of `blocks`."""
    places = {b.name: (name, b) for name, cut in blocks.items() for b in cut}
    if layout.names() != places.keys():
        return None
    files: dict[str, Shard] = {}
    for entry in layout.files:
        specs = {n: Spec(dtype, places[n][1].shape) for n, dtype in entry.tensors.items()}
        if entry.frame is None and entry.file != PICKLE_FILE:
            header = entry.header.encode() if entry.header else None
            files[entry.file] = Shard(specs, entry.metadata, header)
            continue
        for name, owner in (entry.frame.same if entry.frame else {}).items():
            # one run of bytes cannot hold two parameters, which may differ by now.
            if _content(places, name) != _content(places, owner):
                return None
        files[entry.file] = Pickle(specs, {}, frame=entry.frame, same=twice(blocks))
    return Layout(files, layout.index)


def _content(places: dict[str, tuple[str, Block]], name: str) -> Any:
    parameter, block = places.get(name, (name, None))
    return parameter, block and (block.box, block.start)


def twice(blocks: Blocks) -> dict[str, str]:
    """Stored tensors that are another one over again, and that one: a tied head, the embedding."""
    return {
        again.name: cut[0].name
        for cut in blocks.values()
        for again in cut[1:]
        if again.box == cut[0].box
    }
