"""Models on disk: native directories, and published families read and written as they are."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from hybridzoo.checkpoint.convert import MODEL_TYPE, family, family_of
from hybridzoo.checkpoint.convert.base import Family, open_family
from hybridzoo.checkpoint.crew import Crew
from hybridzoo.checkpoint.io import MAX_SHARD_BYTES
from hybridzoo.checkpoint.layout import (
    Source,
    check_dtype,
    first_rows,
    load_into,
    whole,
)
from hybridzoo.checkpoint.pickled import PickleReader
from hybridzoo.checkpoint.reader import Reader, read_json, resolve, undisturbed
from hybridzoo.checkpoint.recorded import SourceLayout
from hybridzoo.checkpoint.shard import DTYPES
from hybridzoo.checkpoint.spread import Spread, Weights
from hybridzoo.checkpoint.store import NATIVE, Store
from hybridzoo.comm import SINGLE, Parallel
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError, ConfigError
from hybridzoo.model import HybridLM

__all__ = [
    "NATIVE",
    "Reader",
    "Source",
    "convert",
    "load",
    "load_into",
    "open_source",
    "read_config",
    "save",
]

# small files beside the weights that a family publishes and a converted directory needs as much.
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    "LICENSE",
)


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    parallel: Parallel = SINGLE,
    stage: range | None = None,
) -> HybridLM:
    """Build the model of a native or published directory and fill it tensor by tensor.

    Args:
        directory: config.json and safetensors.
        dtype: of the parameters, A_log, D and dt_bias staying at least fp32; None is the dtype most
            weights are stored in.
        device: where the parameters are made and filled.
        parallel: this process's place among the ranks; each reads only its slices.
        stage: places of the stack that this pipeline stage holds; None is all of them.

    Returns:
        The model in eval mode: dropout starts with model.train().

    Raises:
        CheckpointError: files, names, shapes or dtypes are not what config.json says; nothing was
            allocated.
        ConfigError: config.json of a native directory is wrong, or the ranks cannot share the
            model.
    """
    check_dtype(dtype)
    source = open_source(directory)
    wanted = dtype or source.main_dtype()
    if dtype is None:
        _say_what_is_cast(source, wanted)
    model = HybridLM(
        source.config, parallel=parallel, stage=stage, device=device, dtype=wanted, init=False
    )
    load_into(model, source)
    return model.eval()


def _say_what_is_cast(source: Source, dtype: torch.dtype) -> None:
    stored = {n: DTYPES[source.dtype(n)] for n, p in source.params.items() if not p.fp32}
    cast = [name for name, d in stored.items() if d != dtype]
    if cast:
        warnings.warn(
            f"{source.reader.directory}: {cast[0]} and {len(cast) - 1} more are stored as "
            f"{stored[cast[0]]} but loaded as {dtype}, like most. Ask for a dtype to choose.",
            stacklevel=3,
        )


def save(
    model: HybridLM,
    directory: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    layout: str = NATIVE,
    tokenizer: str | Path | None = None,
    weights: Weights | None = None,
) -> None:
    """Write config.json and safetensors, all or nothing.

    Of a model that several ranks share every rank calls it and writes its own slices, of copies one
    holder's; the files are those that one process writes.

    Args:
        model: its parameters are written under canonical names, a tied one once.
        directory: made if missing; a checkpoint there is replaced, other files are left alone. All
            ranks see it.
        max_shard_bytes: larger models are split into files of at most this size.
        dtype: of the written weights, A_log, D and dt_bias staying at least fp32; None is the
            model's or, for the family that the model was loaded from, each tensor's own in the
            source.
        layout: "native", or a family: its newest dialect or, for the family that the model was
            loaded from, the source's own files.
        tokenizer: a tokenizers JSON to put beside the weights under the config's name for it; a
            tokenizer_config.json next to it comes along, for it names eos and bos.
        weights: gives the whole tensor of a name in the model for the length of a block, where
            parameters are partitioned (an engine's `weights`); every rank asks for all of its own
            in the order of model.local_names().

    Raises:
        CheckpointError: the directory cannot be written, copies differ between ranks, or the family
            cannot express the config; the same error on every rank, whichever it happened on.
    """
    crew = Crew.of(model.parallel)
    with crew.phase():
        texts = _tokenizer_files(model.config, tokenizer) if crew.is_first else {}
        store = Store(directory, layout, dtype, max_shard_bytes)
    store.run_spread(Spread(model, crew, weights), texts)


def _tokenizer_files(config: HybridConfig, tokenizer: str | Path | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    if config.tokenizer == "bytes":
        raise CheckpointError(
            f"tokenizer: the model reads bytes, not {tokenizer}; a file beside it would not "
            "be used. Leave it out, or set the config's tokenizer to the file's name."
        )
    if not Path(tokenizer).is_file():
        raise CheckpointError(
            f"{tokenizer}: no such file; a tokenizer is a tokenizers JSON. Check the path."
        )
    texts = {config.tokenizer: Path(tokenizer).read_bytes()}
    specials = Path(tokenizer).with_name("tokenizer_config.json")
    if specials.is_file():
        texts[specials.name] = specials.read_bytes()
    return texts


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: str = NATIVE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    from_pickle: bool = False,
    unpad_vocab: bool = False,
) -> HybridConfig:
    """Rewrite a checkpoint in another layout, tensor by tensor; dtypes are kept.

    Args:
        source: a native directory or a known family's.
        target: a directory to write; the small files beside the weights (tokenizer) come along.
        layout: "native" or a family.
        max_shard_bytes: size of a file, where the source's own files are not wanted back.
        from_pickle: read .bin or .pt weights; only tensors are unpickled, but only do it for files
            you trust.
        unpad_vocab: leave out the rows of embedding and head with which the original Mambas fill
            their vocabulary up, so that no such token can be predicted.

    Returns:
        The architecture.

    Raises:
        CheckpointError: source or target is not what it must be, the family cannot express the
            config, or there is no padding to leave out.
    """
    source = Path(source)
    if source.resolve() == Path(target).resolve():
        raise CheckpointError(
            f"{target}: source and target are one directory; the source is read while the target "
            "is written. Choose another target."
        )
    opened = open_source(source, from_pickle=from_pickle)
    if unpad_vocab:
        opened = _unpadded(opened)
    # a tokenizer named by somebody else's config.json must lie beside it.
    names = {*_SIDE_FILES, Path(opened.config.tokenizer).name}
    paths = {name: resolve(source, name) for name in sorted(names)}
    texts = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    Store(target, layout, None, max_shard_bytes).run(opened, texts)
    return opened.config


def _unpadded(source: Source) -> Source:
    layout, rows = SourceLayout.of(source.config), source.config.vocab_size
    if layout is not None and family(layout.family).original:
        published = layout.published() | {"pad_vocab_size_multiple": 1}
        rows = family(layout.family).read(published).vocab_size
    if rows >= source.config.vocab_size:
        raise CheckpointError(
            f"{source.reader.directory}: no padded vocabulary ({source.config.vocab_size} rows); "
            "only the original files of Mamba have rows without a token. Leave out --unpad-vocab."
        )
    return first_rows(source, rows)


def open_source(directory: str | Path, *, from_pickle: bool = False) -> Source:
    """Check config.json and the files' headers against each other; no weights are read."""
    directory = Path(directory)
    return undisturbed(directory, lambda: _open_source(directory, from_pickle))


def _open_source(directory: Path, from_pickle: bool) -> Source:
    config, known = _read_config(directory)
    reader: Reader | PickleReader = Reader(directory) if not from_pickle else PickleReader(
        directory, remember=known is not None and known.original
    )  # fmt: skip
    if known is None:
        return Source(config, reader, whole(config))
    return open_family(known, config, reader)


def read_config(directory: str | Path) -> HybridConfig:
    """The architecture in a native or published directory's config.json."""
    directory = Path(directory)
    return undisturbed(directory, lambda: _read_config(directory))[0]


def _read_config(directory: Path) -> tuple[HybridConfig, Family | None]:
    path = resolve(directory, "config.json")
    published = read_json(path)
    try:
        if published.get("model_type") == MODEL_TYPE:
            own = {k: v for k, v in published.items() if k not in ("model_type", "dtype")}
            return HybridConfig.from_dict(own), None
        known = family_of(published)
        return known.read(published).with_options(name=_name(directory)), known
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"{path}: {error}") from None


def _name(directory: Path) -> str:
    path = directory.resolve()
    if path.parent.name == "snapshots":
        # huggingface_hub's cache: models--owner--name/snapshots/commit
        return path.parent.parent.name.split("--")[-1]
    return path.name
