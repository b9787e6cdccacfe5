"""A model, a text and a recipe small enough to train in a second."""

import io
from pathlib import Path

import torch
from rich.console import Console

from hybridzoo import HybridConfig, HybridLM
from hybridzoo.checkpoint import load
from hybridzoo.parallel.recipe import Recipe
from hybridzoo.train.loop import Trainer

MODEL = """
name: smallest
d_model: 16
vocab_size: 260
pattern: "SF MA [MA]E"
layers:
  S: {kind: mamba1, d_state: 3, dt_rank: 2}
  M: {kind: mamba2, d_state: 4, head_dim: 8, chunk_size: 8, conv_bias: true}
  A: {kind: attention, n_heads: 2, n_kv_heads: 1, qkv_bias: true, rope_fraction: 1.0}
  F: {kind: mlp, d_ff: 24}
  E: {kind: moe, d_ff: 12, n_experts: 3, top_k: 2}
dropout: 0.2
"""
SENTENCE = b"The quick brown fox jumps over the lazy dog, and %d more do. "
TEXT = b"".join(SENTENCE % (i * 7919 % 1000) for i in range(60))


def write_inputs(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "model.yaml").write_text(MODEL)
    (directory / "text.txt").write_bytes(TEXT)


def recipe(directory: Path, **changes) -> Recipe:
    """A recipe over the inputs, which it writes to `directory`; the run goes to directory/run."""
    write_inputs(directory)
    options = {
        "model": str(directory / "model.yaml"),
        "data": {"source": str(directory / "text.txt"), "seq_len": 24},
        "output": str(directory / "run"),
        "steps": 12,
        "batch_size": 4,
        "lr": 1e-2,
        "warmup_steps": 3,
        "ema": 0.9,
        "device": "cpu",
        "log_every": 1,
        "eval_every": 4,
        "eval_batches": 3,
        "save_every": 3,
    }
    return Recipe.from_dict(options | changes)


def model(seed: int = 0, **changes) -> HybridLM:
    import yaml

    return HybridLM(HybridConfig.from_dict(yaml.safe_load(MODEL) | changes), seed=seed)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


def said(console: Console) -> str:
    return console.file.getvalue()


class StopAt(list):
    """Signals caught so far: as if one came during update number `step`."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.trainer, self.step = trainer, step

    def __bool__(self) -> bool:
        return self.trainer.step >= self.step


def run_until(recipe: Recipe, step: int, *, resume: bool = False) -> Path:
    trainer = Trainer(recipe, resume, quiet())
    return trainer.run(StopAt(trainer, step))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load(directory).state_dict())


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The same names and, bit for bit, the same values."""
    assert left.keys() == right.keys()
    different = [k for k in left if not torch.equal(left[k], right[k])]
    assert not different
