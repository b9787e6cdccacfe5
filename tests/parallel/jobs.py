"""What the ranks of a DeepSpeed test run: a mixed stack, its batches, and steps of an engine."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from unittest.mock import patch

import torch
from torch import Tensor

from hybridzoo.comm import SINGLE
from hybridzoo.config import HybridConfig
from hybridzoo.layers.init import seeded
from hybridzoo.parallel import deepspeed, groups
from hybridzoo.parallel.engine import SLOTS, Engine, Outcome, initialize
from hybridzoo.parallel.recipe import DataRecipe, ParallelRecipe, Recipe
from tests.models import make_model, tiny

VOCAB, LENGTH, N_PARTS = 29, 8, 4
# Mamba-2 with 1 and 4 groups, Mamba-1, 2 KV heads on up to 4 ranks, a router, a shared expert, an
# untrained bias; the last stack place is parallel
OPTIONS = {
    "name": "mixed",
    "d_model": 16,
    "vocab_size": VOCAB,
    "pattern": "M N [GA] F E",
    "layers": {
        "M": tiny("mamba2", n_groups=1),
        "G": tiny("mamba2", n_groups=4),
        "N": tiny("mamba1"),
        "A": tiny("attention", n_kv_heads=2),
        "F": tiny("mlp", d_ff=12),
        "E": tiny("moe", d_ff=8),
    },
    "tie_embeddings": True,
}
CONFIG = HybridConfig.from_dict(OPTIONS)


def recipe(dp=1, **change):
    """A step of 4 parts of 2 sequences, shared by `dp` ranks; the clipping is active."""
    spread = ParallelRecipe(**change.pop("parallel", {}))
    given = Recipe(
        model="", data=DataRecipe(source="", seq_len=LENGTH), output="", steps=20, lr=1e-3,
        batch_size=2 * N_PARTS, accumulate=N_PARTS // dp, clip_norm=0.5, parallel=spread,
    )  # fmt: skip
    return replace(given, **change)


def parts(step, rank=0, dp=1):
    """A rank's parts of a step; their counts of labels differ."""
    generator, made = seeded(step, "parts"), []
    for i in range(N_PARTS):
        ids = torch.randint(VOCAB, (2, LENGTH + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:, : 2 * i] = -100
        made.append({"input_ids": ids[:, :-1], "labels": labels})
    return made[rank * N_PARTS // dp : (rank + 1) * N_PARTS // dp]


@dataclass
class Seen:
    """One rank's view of some steps.

    `first` and `last` are the pieces of weights and moments after the first and the last one.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    evaluated: tuple[float, int] = (0.0, 0)
    first: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    last: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)


def engine_of(given, dtype=torch.float32, change: Callable | None = None):
    """The engine of this rank's model; `change` gets the model first."""
    spread, parallel = given.parallel, SINGLE
    if torch.distributed.is_initialized():
        # which a launcher would have set
        os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
        parallel = laid_out(spread.tp, spread.ep, spread.sequence_parallel)
    model = make_model(CONFIG, parallel, dtype)
    if change:
        change(model)
    return initialize(model, given)


@cache
def laid_out(tp, ep, sequence_parallel):
    return groups.init(tp=tp, ep=ep, sequence_parallel=sequence_parallel)


def state_of(engine):
    """Weights and moments of this rank: kind -> canonical name -> {piece: tensor}."""

    def weight(name):
        with engine.weights(name) as tensor:
            return tensor.clone()

    def slot(kind):
        return lambda name: engine.read_slot(name, kind).clone()

    readers = {"weight": weight, **{kind: slot(kind) for kind in SLOTS}}
    return {
        kind: {
            name: {piece: read(local) for piece, local in locals_.items()}
            for name, declared, locals_ in engine.model.local_names()
            if declared.trained
        }
        for kind, read in readers.items()
    }


def follow(engine, steps):
    """Train on the steps' batches, and evaluate."""
    seen, dp = Seen(), engine.parallel.dp
    for step in steps:
        seen.outcomes.append(engine.step(parts(step, dp.rank, dp.world), engine.recipe.lr))
        seen.first = seen.first or state_of(engine)
    seen.evaluated = engine.evaluate(parts(99, dp.rank, dp.world))
    seen.last = state_of(engine)
    return seen


def run(_, given, n_steps):
    """What a rank sees of a run."""
    return follow(engine_of(given), range(n_steps))


def alone(given, n_steps):
    """The same in one process."""
    given = replace(given, accumulate=N_PARTS, parallel=ParallelRecipe())
    return follow(Engine(make_model(CONFIG, dtype=torch.float32), given), range(n_steps))


def resume(_, given, n_before, n_after):
    """A run of both parts, and one whose second engine starts from what the first one left."""
    engine = engine_of(given)
    follow(engine, range(n_before))
    kept = {name: _kept(engine, name) for name in engine.params}
    n_updates = engine.n_updates
    whole = follow(engine, range(n_before, n_before + n_after))
    engine = engine_of(given, change=scramble)
    for name, (weight, moments) in kept.items():
        with engine.weights(name) as tensor:
            tensor.copy_(weight)
        engine.write_slots(name, moments, n_updates)
    return whole, follow(engine, range(n_before, n_before + n_after)), engine.n_updates


def _kept(engine, name):
    with engine.weights(name) as tensor:
        weight = tensor.clone()
    return weight, {slot: engine.read_slot(name, slot).clone() for slot in SLOTS}


@torch.no_grad()
def scramble(model):
    for parameter in model.parameters():
        parameter += 1


def spoil(_, given, where):
    """Steps 0, a bad one, 1, 2 beside steps 0, 1, 2; `where` the last rank's number is bad.

    The state before and after the bad step too.
    """
    plain = follow(engine_of(given), range(3))
    engine = engine_of(given)
    first = follow(engine, range(1))
    with bad_number(engine, where):
        bad = engine.step(parts(5, engine.parallel.dp.rank, engine.parallel.dp.world), 1e-3)
    after, n_updates = state_of(engine), engine.n_updates
    return plain, first, bad, after, n_updates, follow(engine, range(1, 3))


def bad_number(engine, where):
    """Until the block ends the last rank alone computes a NaN, in its gradients or loss only."""
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    known = deepspeed.loss

    def spoiled(*args):
        total, metrics = known(*args)
        if is_last and where == "loss":
            metrics["nats"] = metrics["nats"] + torch.inf
        elif is_last:
            total = total * torch.nan
        return total, metrics

    return patch.object(deepspeed, "loss", spoiled)


def untrained(_, given):
    """The router's untrained bias, as written and read."""
    engine = engine_of(given)
    name = "blocks.4.layer.correction_bias"
    with engine.weights(name) as tensor:
        tensor.copy_(torch.arange(6.0))
    with engine.weights(name) as tensor:
        return tensor.clone()
