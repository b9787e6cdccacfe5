"""One save: which file holds what in which dtype, and the texts that say so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hybridzoo.checkpoint.convert import CONVERTERS, MODEL_TYPE, family
from hybridzoo.checkpoint.convert.base import Family, differences, published_config
from hybridzoo.checkpoint.copies import check_copies
from hybridzoo.checkpoint.frame import PICKLE_FILE, Pickle
from hybridzoo.checkpoint.io import INDEX_FILE, Layout, commit, plan, write
from hybridzoo.checkpoint.layout import Blocks, check_dtype, unfused, whole
from hybridzoo.checkpoint.recorded import SourceLayout, recorded_layout, twice
from hybridzoo.checkpoint.shard import DTYPE_NAMES, DTYPES, Spec
from hybridzoo.checkpoint.spread import Spread
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError
from hybridzoo.layers import Param
from hybridzoo.options import strict, suggest

NATIVE = "native"


class Planned(Protocol):
    """Canonical parameters, of a model or of a checkpoint, as a plan needs them."""

    config: HybridConfig

    @property
    def params(self) -> Mapping[str, Param]:
        """Their declarations."""

    def dtype(self, name: str) -> str:
        """Stored dtype of one."""


class Parameters(Planned, Protocol):
    """Canonical parameters that are read whole."""

    def fetch(self, name: str) -> Tensor:
        """One in full."""


class Store:
    """One save.

    Args:
        directory: where it goes.
        layout: "native" or a family.
        dtype: of the weights, those that stay fp32 aside; None keeps each one's.
        max_shard_bytes: size of a file, where no source's files are wanted back.
    """

    def __init__(
        self, directory: str | Path, layout: str, dtype: torch.dtype | None, max_shard_bytes: int
    ) -> None:
        self.directory, self.dtype, self.max_shard_bytes = directory, dtype, max_shard_bytes
        if layout not in (NATIVE, *CONVERTERS):
            known = [NATIVE, *CONVERTERS]
            raise CheckpointError(
                f"layout: unknown ({layout!r}); {suggest(layout, known)}known: {', '.join(known)}. "
                "Use one of them."
            )
        self.family = None if layout == NATIVE else family(layout)
        check_dtype(dtype)

    def run(self, source: Parameters, texts: dict[str, bytes]) -> None:
        """Write everything from whole parameters, in one process."""
        blocks, files, texts = self._planned(source, texts)
        write(self.directory, files, unfused(source.fetch, blocks), texts=texts)

    def run_spread(self, spread: Spread, texts: dict[str, bytes]) -> None:
        """Write this rank's slices; every rank calls it."""
        blocks, files, texts = self._planned(spread, texts)
        archives = [file for file, shard in files.files.items() if isinstance(shard, Pickle)]
        if not archives:
            fill, crew = partial(spread.fill, blocks=blocks), spread.crew
            commit(self.directory, files, fill, texts=texts, crew=crew, check=check_copies)
            return
        if spread.crew.world > 1:
            raise CheckpointError(
                f"layout: {archives[0]} cannot be written by {spread.crew.world} ranks; an archive "
                f"is written by one process. Save {NATIVE!r}, then use `hybridzoo convert`."
            )
        write(self.directory, files, unfused(spread.fetch, blocks), texts=texts)

    def _planned(
        self, source: Planned, texts: dict[str, bytes]
    ) -> tuple[Blocks, Layout, dict[str, bytes]]:
        if self.family is not None:
            blocks, files, own = self._published(self.family, source)
            return blocks, files, {**own, **texts}
        blocks = whole(source.config)
        files = plan(self._specs(source, blocks), self.max_shard_bytes)
        return blocks, files, {**texts, "config.json": self._native_text(source)}

    def _specs(self, source: Planned, blocks: Blocks) -> dict[str, Spec]:
        return {
            block.name: Spec(self._dtype(source, name), block.shape)
            for name, cut in blocks.items()
            for block in cut
        }

    def _dtype(self, source: Planned, name: str) -> str:
        if self.dtype is None:
            return source.dtype(name)
        wide = torch.promote_types(self.dtype, torch.float32)
        return DTYPE_NAMES[wide if source.params[name].fp32 else self.dtype]

    def _native_text(self, source: Planned) -> bytes:
        content = {
            "model_type": MODEL_TYPE,
            "dtype": self._main_dtype(source),
            **source.config.to_dict(),
        }
        return (json.dumps(strict(content), indent=2, allow_nan=False) + "\n").encode()

    def _main_dtype(self, source: Planned) -> str:
        name = self._dtype(source, "embed.weight")
        return str(DTYPES[name]).removeprefix("torch.")

    def _published(self, known: Family, source: Planned) -> tuple[Blocks, Layout, dict[str, bytes]]:
        """The source's own files if remembered and still fitting, else the newest dialect's."""
        config, layout = source.config, SourceLayout.of(source.config)
        texts: dict[str, str] = {}
        if layout is not None and layout.family == known.model_type:
            texts = dict(layout.texts)
            if not differences(config, known.read(layout.published())):
                blocks = known.blocks(config, layout.names())
                files = recorded_layout(layout, blocks)
                if files is not None:
                    return self._as_recorded(known, source, blocks, files, texts)
        published = published_config(known, config, self._main_dtype(source))
        texts["config.json"] = json.dumps(published, indent=2) + "\n"
        texts.pop(INDEX_FILE, None)
        blocks = known.blocks(config)
        specs = self._specs(source, blocks)
        if known.original:
            files = Layout({PICKLE_FILE: Pickle(specs, {}, same=twice(blocks))})
        else:
            files = plan(specs, self.max_shard_bytes)
        return blocks, files, _encoded(texts)

    def _as_recorded(
        self,
        known: Family,
        source: Planned,
        blocks: Blocks,
        files: Layout,
        texts: dict[str, str],
    ) -> tuple[Blocks, Layout, dict[str, bytes]]:
        if self.dtype is not None:
            specs = self._specs(source, blocks)
            for file, shard in files.files.items():
                own = {n: specs[n] for n in shard.tensors}
                files.files[file] = (
                    Pickle(own, {}, same=twice(blocks))
                    if isinstance(shard, Pickle)
                    else replace(shard, tensors=own, header=None)
                )
            if files.index is not None:
                files.index = {"total_size": sum(s.n_bytes for s in specs.values())}
                texts.pop(INDEX_FILE, None)
            if not known.original:
                published = json.loads(texts["config.json"])
                key = "torch_dtype" if "torch_dtype" in published else "dtype"
                published[key] = self._main_dtype(source)
                texts["config.json"] = json.dumps(published, indent=2) + "\n"
        return blocks, files, _encoded(texts)


def _encoded(texts: Mapping[str, str]) -> dict[str, bytes]:
    return {name: text.encode() for name, text in texts.items()}
