"""What a run starts from: device, model, tokenizer, data, and the lines that say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridzoo.checkpoint import load, read_config, save
from hybridzoo.checkpoint.reader import resolve
from hybridzoo.checkpoint.spread import Weights
from hybridzoo.comm import SINGLE, Parallel
from hybridzoo.config import HybridConfig
from hybridzoo.errors import ConfigError
from hybridzoo.kernels import dispatch
from hybridzoo.model import HybridLM
from hybridzoo.parallel.agree import from_first
from hybridzoo.parallel.engine import check
from hybridzoo.parallel.recipe import Recipe
from hybridzoo.parallel.stages import balance_line, stages
from hybridzoo.tokenizer import Tokenizer, load_tokenizer
from hybridzoo.train import snapshot
from hybridzoo.train.data import PackedData


@dataclass(frozen=True)
class Start:
    """A run's fixed parts.

    Attributes:
        model: fp32, on the device.
        tokenizer_file: the tokenizers JSON that checkpoints carry; None for bytes.
        data: batches of the recipe's source, one part of a step each.
    """

    model: HybridLM
    tokenizer_file: Path | None
    data: PackedData

    def save_model(self, directory: Path, weights: Weights) -> None:
        """Write a native directory that loads by itself; every rank its part."""
        file = self.tokenizer_file
        save(self.model, directory, dtype=torch.float32, tokenizer=file, weights=weights)


def find(
    recipe: Recipe, resume: bool, notice: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from and its plain values; half-written ones are removed.

    All ranks call it.

    Raises:
        ConfigError: a new run in the directory of another, or the recipe changed.
        CheckpointError: no checkpoint is intact.
    """
    root = Path(recipe.output)
    found = None
    if not resume:
        from_first(lambda: _refuse_kept(root))
    else:
        found = snapshot.newest(root, notice)
        if found is None:
            notice(f"{root}: no checkpoint yet; starting at step 0.")
    key = None if found is None else recipe.changed_key(found[1]["recipe"])
    if found is not None and key is not None:
        raise ConfigError(
            f"{key}: changed since {found[0]} was written; a resumed run keeps its recipe. "
            "Restore the value, or train into another output."
        )
    from_first(lambda: snapshot.remove_halves(root))
    return found


def _refuse_kept(root: Path) -> None:
    kept = snapshot.first_kept(root)
    if kept is None:
        return
    way = "Move it away" if kept.name == "best" else "Go on with --resume"
    raise ConfigError(
        f"output: {root} already holds {kept.name}/; a new run needs a directory of its own. "
        f"{way}, or choose another."
    )


def start(
    recipe: Recipe, device: torch.device, parallel: Parallel, checkpoint: Path | None
) -> Start:
    """Build a run's parts.

    Args:
        recipe: what to do.
        device: where the model lives.
        parallel: this process's place among the ranks.
        checkpoint: a checkpoint of the same run, whose weights replace those of recipe.model.

    Raises:
        ConfigError: model and tokenizer do not fit, or model and checkpoint, or model and ranks.
    """
    source = Path(recipe.model)
    config = read_config(source) if source.is_dir() else HybridConfig.load(source)
    tokenizer, file = _read_tokenizer(recipe, config, source)
    config = config.with_options(tokenizer="bytes" if file is None else "tokenizer.json")
    if checkpoint is not None and read_config(checkpoint) != config:
        raise ConfigError(
            f"model: {source} is not the model that {checkpoint} holds; a run resumes with its "
            "own. Restore the file, or train into another output."
        )
    check(config, recipe)
    stored = checkpoint or (source if source.is_dir() else None)
    where: dict[str, Any] = {"parallel": parallel, "device": device, "dtype": torch.float32}
    if parallel.pp.world > 1:
        where["stage"] = _stages(recipe, config, parallel)[parallel.pp.rank]
    if stored is None:
        model = HybridLM(config, seed=recipe.seed, **where)
    else:
        model = load(stored, **where)
        model.config = config
    data = PackedData(
        recipe.data.source,
        tokenizer,
        seq_len=recipe.data.seq_len,
        batch_size=recipe.batch_size // recipe.accumulate,
        seed=recipe.seed,
        packing=recipe.data.packing,
        rank=parallel.dp.rank,
        world=parallel.dp.world,
    )
    return Start(model, file, data)


def _stages(recipe: Recipe, config: HybridConfig, parallel: Parallel) -> list[range]:
    return stages(config, parallel.pp.world, recipe.parallel.balance, recipe.data.seq_len)


def describe(model: HybridLM, recipe: Recipe, device: torch.device) -> list[str]:
    """Lines that say what is trained where and how it is spread, and each op's backend and why."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dtype = "fp32" if recipe.precision == "fp32" else "bf16 with fp32 weights"
    n, active = model.config.n_params(), model.config.n_active_params()
    size = f"{n:,} parameters" + (f" ({active:,} active)" if active != n else "")
    tokens = recipe.batch_size * recipe.data.seq_len
    first = f"{model.config.name}: {size}, {dtype}, on {where}; "
    first += f"{recipe.steps:,} steps of {tokens:,} tokens"
    lines = [first, "kernels: " + ", ".join(_backends(device))]
    if model.parallel is not SINGLE:
        lines.insert(1, _layout(model, recipe))
    return lines


def _layout(model: HybridLM, recipe: Recipe) -> str:
    parallel, spread = model.parallel, recipe.parallel
    axes = ("tp", "pp", "dp", "ep")
    sizes = {name: getattr(parallel, name).world for name in axes}
    n = sizes["tp"] * sizes["pp"] * sizes["dp"]
    line = f"{n} ranks: " + " x ".join(f"{k} {sizes[k]}" for k in axes[:3])
    line += f" (ep {sizes['ep']} of dp)" if sizes["ep"] > 1 else ""
    line += ", sequence parallel" if parallel.sequence_parallel else ""
    line += f", ZeRO {spread.zero_stage}, {torch.distributed.get_backend()}"
    if sizes["pp"] > 1:
        parts = _stages(recipe, model.config, parallel)
        line += f"; {balance_line(model.config, parts, recipe.data.seq_len)}"
    return line


def _backends(device: torch.device) -> list[str]:
    """`op backend (better one: why not)` for every op."""
    chosen, refused = {}, dict[str, list[str]]()
    for row in dispatch.explain(device):
        if row.chosen:
            chosen[row.op] = row.backend
        elif row.op not in chosen and row.reason is not None:
            refused.setdefault(row.op, []).append(f"{row.backend}: {row.reason}")
    reasons = {op: f" ({'; '.join(why)})" for op, why in refused.items()}
    return [f"{op} {backend}{reasons.get(op, '')}" for op, backend in chosen.items()]


def _read_tokenizer(
    recipe: Recipe, config: HybridConfig, source: Path
) -> tuple[Tokenizer, Path | None]:
    """The tokenizer, and its file unless it is bytes."""
    spec = recipe.data.tokenizer
    if spec is None and config.tokenizer != "bytes":
        # beside the weights, or beside the model's YAML
        is_yaml = not source.is_dir()
        spec = str(
            source.parent / config.tokenizer if is_yaml else resolve(source, config.tokenizer)
        )
    spec = spec or "bytes"
    tokenizer = load_tokenizer(spec)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"model: vocab_size ({config.vocab_size}) is below the {tokenizer.vocab_size} ids of "
            f"the tokenizer {spec}; every id needs a row. Raise vocab_size."
        )
    if spec == "bytes":
        return tokenizer, None
    file = Path(spec)
    return tokenizer, file / "tokenizer.json" if file.is_dir() else file
