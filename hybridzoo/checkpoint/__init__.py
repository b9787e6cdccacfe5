"""Models on disk: native directories, and published families read and written as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hybridzoo.checkpoint.convert import MODEL_TYPE, family
from hybridzoo.checkpoint.convert.base import (
    Family,
    differences,
    open_family,
    published_config,
    recorded_layout,
)
from hybridzoo.checkpoint.io import INDEX_FILE, Layout, Reader, plan, read_json, resolve, write
from hybridzoo.checkpoint.layout import Blocks, Gathered, Source, gather, load_into, unfused, whole
from hybridzoo.checkpoint.pickled import PickleReader
from hybridzoo.checkpoint.shard import DTYPE_NAMES, DTYPES, Spec
from hybridzoo.comm import SINGLE, Parallel
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError, ConfigError
from hybridzoo.layers import Param
from hybridzoo.model import HybridLM

__all__ = ["NATIVE", "Reader", "Source", "convert", "gather", "load", "open_source", "read_config", "save"]

NATIVE = "native"
MAX_SHARD_BYTES = 5_000_000_000
# small files beside the weights that a family publishes and a converted directory needs as much.
_SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
               "tokenizer.model", "chat_template.jinja")  # fmt: skip


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    parallel: Parallel = SINGLE,
) -> HybridLM:
    """Build the model of a native directory, or of a known family's published one, and fill it tensor by tensor.

    Args:
        directory: config.json and safetensors.
        dtype: of the parameters, A_log, D and dt_bias staying at least fp32; None is the dtype most weights are stored in.
        device: where the parameters are made and filled.
        parallel: this process's place among tensor-parallel ranks; each reads only its slices.

    Raises:
        CheckpointError: files, names, shapes or dtypes are not what config.json says; nothing was allocated.
        ConfigError: config.json of a native directory is wrong, or tp cannot cut the model.
    """
    source = open_source(directory)
    wanted = dtype or source.main_dtype()
    model = HybridLM(source.config, parallel=parallel, device=device, dtype=wanted, init=False)
    load_into(model, source)
    return model


def save(
    model: HybridLM,
    directory: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    layout: str = NATIVE,
    tokenizer: str | Path | None = None,
) -> None:
    """Write config.json and safetensors, all or nothing; under tensor parallelism every rank calls it and rank 0 writes.

    Args:
        model: its parameters are written under canonical names, a tied one once.
        directory: made if missing; a checkpoint there is replaced, other files are left alone.
        max_shard_bytes: larger models are split into files of at most this size.
        dtype: of the written weights, A_log, D and dt_bias staying at least fp32; None is the model's or, for the family
            that the model was loaded from, each tensor's own in the source.
        layout: "native", or a family: its newest dialect or, for the family that the model was loaded from, the
            source's own files.
        tokenizer: a tokenizers JSON to put beside the weights under the config's name for it.

    Raises:
        CheckpointError: the directory cannot be written, or the family cannot express the config.
    """
    texts = {}
    if tokenizer is not None:
        if model.config.tokenizer == "bytes":
            raise CheckpointError(
                f"tokenizer: the model reads bytes, not {tokenizer}; a file beside it would not be used. "
                "Leave it out, or set the config's tokenizer to the file's name."
            )
        texts[model.config.tokenizer] = Path(tokenizer).read_bytes()
    store = _Store(directory, layout, dtype, max_shard_bytes)
    store.run(Gathered(model), texts, writes=model.parallel.tp.rank == 0)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: str = NATIVE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    from_pickle: bool = False,
) -> HybridConfig:
    """Rewrite a checkpoint in another layout, tensor by tensor and without building the model; dtypes are kept.

    Args:
        source: a native directory or a known family's.
        target: a directory to write; the small files beside the weights (tokenizer) come along.
        layout: "native" or a family.
        max_shard_bytes: size of a file, where the source's own files are not wanted back.
        from_pickle: read .bin or .pt weights; only tensors are unpickled, but only do it for files you trust.

    Returns:
        The architecture.
    """
    source = Path(source)
    if source.resolve() == Path(target).resolve():
        raise CheckpointError(
            f"{target}: source and target are one directory; the source is read while the target is written. "
            "Choose another target."
        )
    opened = open_source(source, from_pickle=from_pickle)
    paths = {name: resolve(source, name) for name in _SIDE_FILES}
    texts = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    _Store(target, layout, None, max_shard_bytes).run(opened, texts, writes=True)
    return opened.config


def open_source(directory: str | Path, *, from_pickle: bool = False) -> Source:
    """Read config.json and the files' headers and check them against each other; no weights are read."""
    directory = Path(directory)
    config, known = _read_config(directory)
    reader = PickleReader(directory) if from_pickle else Reader(directory)
    if known is None:
        return Source(config, reader, whole(config))
    return open_family(known, config, reader)


def read_config(directory: str | Path) -> HybridConfig:
    """The architecture that a native or published directory's config.json gives; no weights are opened."""
    return _read_config(Path(directory))[0]


def _read_config(directory: Path) -> tuple[HybridConfig, Family | None]:
    path = resolve(directory, "config.json")
    published = read_json(path)
    model_type = published.get("model_type")
    try:
        if model_type == MODEL_TYPE:
            own = {k: v for k, v in published.items() if k not in ("model_type", "dtype")}
            return HybridConfig.from_dict(own), None
        known = family(model_type)
        return known.read(published).with_options(name=directory.resolve().name), known
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"{path}: {error}") from None


class _Parameters(Protocol):
    """Canonical parameters, of a model or of a checkpoint."""

    config: HybridConfig
    @property
    def params(self) -> Mapping[str, Param]:
        """Their declarations."""

    def dtype(self, name: str) -> str:
        """Stored dtype of one."""

    def fetch(self, name: str) -> Tensor:
        """One in full."""


class _Store:
    """One save: which file holds what in which dtype, and the texts that say so."""

    def __init__(
        self, directory: str | Path, layout: str, dtype: torch.dtype | None, max_shard_bytes: int
    ) -> None:
        self.directory, self.dtype, self.max_shard_bytes = directory, dtype, max_shard_bytes
        self.family = None if layout == NATIVE else family(layout)
        if dtype is not None and not dtype.is_floating_point:
            raise CheckpointError(
                f"dtype: not a weight's ({dtype}); weights are floating point. Use torch.bfloat16 or torch.float32."
            )

    def run(self, source: _Parameters, texts: dict[str, bytes], *, writes: bool) -> None:
        """Write everything, or only take part in the gathering of what another rank writes."""
        config = source.config
        if self.family is None:
            blocks: Blocks = whole(config)
            files = plan(self._specs(source, blocks), self.max_shard_bytes)
            texts = {**texts, "config.json": self._native_text(source)}
        else:
            blocks, files, own = self._published(self.family, source)
            texts = {**own, **texts}
        fetch = unfused(source.fetch, blocks)
        if writes:
            write(self.directory, files, fetch, texts=texts)
            return
        for shard in files.files.values():
            for name in shard.tensors:
                fetch(name)

    def _specs(self, source: _Parameters, blocks: Blocks) -> dict[str, Spec]:
        return {
            block.name: Spec(self._dtype(source, name), block.shape)
            for name, cut in blocks.items()
            for block in cut
        }

    def _dtype(self, source: _Parameters, name: str) -> str:
        if self.dtype is None:
            return source.dtype(name)
        wide = torch.promote_types(self.dtype, torch.float32)
        return DTYPE_NAMES[wide if source.params[name].fp32 else self.dtype]

    def _native_text(self, source: _Parameters) -> bytes:
        content = {
            "model_type": MODEL_TYPE,
            "dtype": self._main_dtype(source),
            **source.config.to_dict(),
        }
        return (json.dumps(content, indent=2) + "\n").encode()

    def _main_dtype(self, source: _Parameters) -> str:
        name = self._dtype(source, "embed.weight")
        return str(DTYPES[name]).removeprefix("torch.")

    def _published(
        self, known: Family, source: _Parameters
    ) -> tuple[Blocks, Layout, dict[str, bytes]]:
        """The source's own files where the config remembers them and still fits, else the newest dialect's."""
        config, layout = source.config, source.config.source_layout
        texts: dict[str, str] = {}
        if layout is not None and layout["family"] == known.model_type:
            texts = dict(layout["texts"])
            published = json.loads(texts["config.json"])
            if not differences(config, known.read(published)):
                names = {n for entry in layout["files"] for n in entry["tensors"]}
                blocks = known.blocks(config, names)
                files = recorded_layout(config, blocks)
                if files is not None:
                    return self._as_recorded(source, blocks, files, texts)
        published = published_config(known, config, self._main_dtype(source))
        texts["config.json"] = json.dumps(published, indent=2) + "\n"
        texts.pop(INDEX_FILE, None)
        blocks = known.blocks(config)
        files = plan(self._specs(source, blocks), self.max_shard_bytes)
        return blocks, files, _encoded(texts)

    def _as_recorded(
        self, source: _Parameters, blocks: Blocks, files: Layout, texts: dict[str, str]
    ) -> tuple[Blocks, Layout, dict[str, bytes]]:
        if self.dtype is not None:
            specs = self._specs(source, blocks)
            for file, shard in files.files.items():
                files.files[file] = replace(
                    shard, tensors={n: specs[n] for n in shard.tensors}, header=None
                )
            if files.index is not None:
                files.index = {"total_size": sum(s.n_bytes for s in specs.values())}
                texts.pop(INDEX_FILE, None)
            published = json.loads(texts["config.json"])
            key = "torch_dtype" if "torch_dtype" in published else "dtype"
            published[key] = self._main_dtype(source)
            texts["config.json"] = json.dumps(published, indent=2) + "\n"
        return blocks, files, _encoded(texts)


def _encoded(texts: Mapping[str, str]) -> dict[str, bytes]:
    return {name: text.encode() for name, text in texts.items()}
