"""What a run starts from: device, model, tokenizer, data, and the lines that say so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from hybridzoo.checkpoint import load, save
from hybridzoo.checkpoint.reader import resolve
from hybridzoo.config import HybridConfig
from hybridzoo.errors import ConfigError
from hybridzoo.kernels import dispatch
from hybridzoo.model import HybridLM
from hybridzoo.parallel.recipe import Recipe
from hybridzoo.tokenizer import Tokenizer, load_tokenizer
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

    def save_model(self, directory: Path) -> None:
        """Write a native directory that loads by itself."""
        save(self.model, directory, dtype=torch.float32, tokenizer=self.tokenizer_file)


def pick_device(recipe: Recipe) -> torch.device:
    """The device of the recipe; auto is the GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    if recipe.device == "cuda" and not has_gpu:
        raise ConfigError(
            f"device: torch {torch.__version__} sees no GPU (cuda); it must. Use auto or cpu."
        )
    return torch.device("cuda" if has_gpu and recipe.device != "cpu" else "cpu")


def start(recipe: Recipe, device: torch.device, checkpoint: Path | None) -> Start:
    """Build a run's parts.

    Args:
        recipe: what to do.
        device: where the model lives.
        checkpoint: a checkpoint of the same run, whose weights replace those of recipe.model.

    Raises:
        ConfigError: model and tokenizer do not fit, or model and checkpoint.
    """
    source = Path(recipe.model)
    loaded = load(source, dtype=torch.float32, device=device) if source.is_dir() else None
    config = HybridConfig.load(source) if loaded is None else loaded.config
    tokenizer, file = _read_tokenizer(recipe, config, source)
    config = config.with_options(tokenizer="bytes" if file is None else "tokenizer.json")
    if checkpoint is not None:
        model = load(checkpoint, dtype=torch.float32, device=device)
        if model.config != config:
            raise ConfigError(
                f"model: {source} is not the model that {checkpoint} holds; a run resumes with its "
                "own. Restore the file, or train into another output."
            )
    elif loaded is not None:
        model = loaded
        model.config = config
    else:
        model = HybridLM(config, seed=recipe.seed, device=device, dtype=torch.float32)
    data = PackedData(
        recipe.data.source,
        tokenizer,
        seq_len=recipe.data.seq_len,
        batch_size=recipe.batch_size // recipe.accumulate,
        seed=recipe.seed,
        packing=recipe.data.packing,
    )
    return Start(model, file, data)


def describe(model: HybridLM, recipe: Recipe, device: torch.device) -> list[str]:
    """Lines that say what is trained where, and which backend each op takes and why."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dtype = "fp32" if recipe.precision == "fp32" else "bf16 with fp32 weights"
    n, active = model.config.n_params(), model.config.n_active_params()
    size = f"{n:,} parameters" + (f" ({active:,} active)" if active != n else "")
    tokens = recipe.batch_size * recipe.data.seq_len
    first = f"{model.config.name}: {size}, {dtype}, on {where}; "
    first += f"{recipe.steps:,} steps of {tokens:,} tokens"
    return [first, "kernels: " + ", ".join(_backends(device))]


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
