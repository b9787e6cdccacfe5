"""What a published checkpoint's files looked like, kept in the config for an exact export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybridzoo.checkpoint.io import INDEX_FILE, Layout
from hybridzoo.checkpoint.layout import Blocks
from hybridzoo.checkpoint.pickled import PickleReader
from hybridzoo.checkpoint.reader import Reader, resolve
from hybridzoo.checkpoint.shard import DTYPES, Shard, Spec
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError
from hybridzoo.options import read_options

# files whose text an export writes back.
_TEXTS = ("config.json", "generation_config.json", INDEX_FILE)


@dataclass(frozen=True)
class SourceFile:
    """One file of SourceLayout: its tensors' dtypes in the order of their bytes, and its header."""

    file: str
    tensors: dict[str, str]
    metadata: dict[str, str]
    header: str | None


@dataclass(frozen=True)
class SourceLayout:
    """What HybridConfig.source_layout holds, so that export gives back the source's files.

    Attributes:
        family: model_type of the source.
        files: its weight files, each a SourceFile; a header is kept where its spelling is unusual.
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
        files = [read_options(SourceFile, f"{where}.files", f, of="files") for f in layout.files]
        dtypes = {dtype for file in files for dtype in map(str, file.tensors.values())}
        if not dtypes <= DTYPES.keys():
            raise CheckpointError(
                f"{where}.files: unknown dtype ({', '.join(sorted(dtypes - DTYPES.keys()))}); "
                f"known are {', '.join(DTYPES)}. Remove source_layout from config.json."
            )
        return replace(layout, files=tuple(files))

    def names(self) -> set[str]:
        """Every tensor's."""
        return {name for file in self.files for name in file.tensors}


def record(family: str, reader: Reader | PickleReader) -> dict[str, Any]:
    """A SourceLayout as plain values."""
    texts = {}
    for name in _TEXTS:
        path = resolve(reader.directory, name)
        # an index that transformers would spell alike is written again rather than remembered.
        if path.is_file() and (
            name != INDEX_FILE or path.read_bytes() != reader.layout.index_text().encode()
        ):
            texts[name] = _text(path)
    files = [
        {
            "file": file,
            "tensors": {name: spec.dtype for name, spec in shard.tensors.items()},
            "metadata": shard.metadata,
            # kept only where its spelling is unusual.
            "header": shard.header.decode() if shard.header else None,
        }
        for file, shard in reader.layout.files.items()
    ]
    index = reader.layout.index
    return {"family": family, "files": files, "index": index, "texts": texts}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: not UTF-8 text (byte {error.start}); it is JSON. Download it again."
        ) from None


def recorded_layout(layout: SourceLayout, blocks: Blocks) -> Layout | None:
    """The source's files; None unless they hold just the tensors of `blocks`."""
    shapes = {b.name: b.shape for cut in blocks.values() for b in cut}
    if layout.names() != shapes.keys():
        return None
    files = {
        entry.file: Shard(
            {name: Spec(dtype, shapes[name]) for name, dtype in entry.tensors.items()},
            entry.metadata,
            entry.header.encode() if entry.header else None,
        )
        for entry in layout.files
    }
    return Layout(files, layout.index)
