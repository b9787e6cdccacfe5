"""Loss curves of a small Mamba-1 on text, the chosen kernels against plain torch; see train.py."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from training import picks

from hybridzoo.config import HybridConfig
from hybridzoo.kernels.dispatch import list_ops, use
from hybridzoo.model import HybridLM
from hybridzoo.parallel.engine import Engine
from hybridzoo.parallel.loss import Batch
from hybridzoo.parallel.optim import lr_at
from hybridzoo.parallel.recipe import DataRecipe, Recipe
from hybridzoo.tokenizer import load_tokenizer
from hybridzoo.train.data import PackedData

CHOSEN, PLAIN, REVERSED, WIDE = "chosen", "reference", "rows reversed", "fp32"
RUNS = {
    CHOSEN: "bf16, the chosen kernels",
    PLAIN: "bf16, every op's reference",
    REVERSED: "bf16, every op's reference, the rows of each batch in reverse order",
    WIDE: "fp32, every op's reference",
}
# what is compared with the run of the references
NOISE = (
    "noise: how far two runs of the references in bf16 part whose batches differ in the order of "
    "their rows alone: the same function, summed in another order. fp32: what bf16 costs at all."
)


class CurveSize(NamedTuple):
    d_model: int = 256
    n_layers: int = 6
    batch: int = 16
    length: int = 512
    steps: int = 300


def run(name: str, size: CurveSize, args: argparse.Namespace) -> dict[str, Any]:
    """The losses of one run, nats a byte; all start from the same weights."""
    config = HybridConfig(
        name="curve", d_model=size.d_model, vocab_size=320, pattern=f"{size.n_layers}M",
        layers={"M": {"kind": "mamba1", "d_state": 16}},
    )  # fmt: skip
    recipe = Recipe(
        model="in memory", output="none", steps=size.steps, batch_size=size.batch, lr=1e-3,
        data=DataRecipe(source=args.curve, seq_len=size.length), warmup_steps=size.steps // 10,
        precision="fp32" if name == WIDE else "bf16",
    )  # fmt: skip
    engine = Engine(HybridLM(config, seed=0, device=args.device), recipe)
    data = PackedData(
        args.curve, load_tokenizer("bytes"), seq_len=size.length, batch_size=size.batch
    )
    losses = []
    with _backends(name), picks() as found:
        for i in range(size.steps):
            batch = data.batch_at(i)
            outcome = engine.step(
                [_reversed(batch) if name == REVERSED else batch], lr_at(recipe, i)
            )
            losses.append(outcome.nats)
    backends = {op: sorted(some) for op, some in sorted(found.items())}
    return {"what": RUNS[name], "losses": losses, "backends": backends, "source": args.curve}


def _backends(name: str) -> AbstractContextManager[Any]:
    return nullcontext() if name == CHOSEN else use(**dict.fromkeys(list_ops(), "reference"))


def _reversed(batch: Batch) -> Batch:
    return {"input_ids": batch["input_ids"].flip(0), "labels": batch["labels"].flip(0)}


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each run to the references': the largest and the mean absolute difference of a loss."""
    curves = {name: row["losses"] for name, row in runs.items() if "losses" in row}
    if PLAIN not in curves:
        return {}
    found = {}
    for name in (n for n in curves if n != PLAIN):
        gaps = _gaps(curves[name], curves[PLAIN])
        found[name] = {"largest": max(gaps), "mean": sum(gaps) / len(gaps)}
    return found


def _gaps(one: list[float], other: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(one, other, strict=True)]


def plot(runs: dict[str, dict[str, Any]], path: Path) -> str:
    """Draw the curves, and their distances below them; where that is, or why it is not."""
    if find_spec("matplotlib") is None:
        return "not drawn, matplotlib is missing; pip install matplotlib."
    # it costs most of a second, and only this part needs it
    from matplotlib.figure import Figure

    compared = compare(runs)
    curves = {name: row["losses"] for name, row in runs.items() if "losses" in row}
    figure = Figure(figsize=(8, 6.5), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    colours = {PLAIN: "0.6", CHOSEN: "C0", REVERSED: "C1", WIDE: "C2"}
    for name, losses in curves.items():
        steps = range(1, len(losses) + 1)
        style: dict[str, Any] = {"color": colours[name], "linewidth": 1.0}
        # broad, and behind those that should lie on it
        broad = {"linewidth": 4.0, "zorder": 1} if name == PLAIN else {}
        top.plot(steps, losses, label=RUNS[name], **style | broad)
        if name in compared:
            label = f"{name}: mean {compared[name]['mean']:.1e}"
            bottom.plot(steps, _gaps(losses, curves[PLAIN]), label=label, **style)
    has_gaps = any(y > 0 for line in bottom.lines for y in line.get_ydata())
    top.set(ylabel="loss, nats a byte", title="One small Mamba-1, the same weights and batches")
    bottom.set(xlabel="step", ylabel="distance to the\nreferences' bf16 loss")
    bottom.set_yscale("log" if has_gaps else "linear")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return str(path)


def is_finite(row: dict[str, Any]) -> bool:
    return bool(torch.tensor(row["losses"]).isfinite().all())
