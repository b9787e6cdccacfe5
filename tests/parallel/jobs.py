"""What the ranks of a DeepSpeed test run: a mixed stack, its batches, and steps of an engine."""

import os
from dataclasses import dataclass, field, replace

import torch

from hybridzoo.comm import SINGLE
from hybridzoo.config import HybridConfig
from hybridzoo.layers.init import seeded
from hybridzoo.parallel import groups
from hybridzoo.parallel.engine import Engine, initialize
from hybridzoo.parallel.recipe import DataRecipe, ParallelRecipe, Recipe
from tests.models import joined, make_model, tiny

VOCAB, LENGTH = 29, 8
# Mamba-2 with 1 and 4 groups, Mamba-1, 2 KV heads on 4 ranks, a router and a shared expert
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
    "tie_embeddings": False,
}
CONFIG = HybridConfig.from_dict(OPTIONS)


def recipe(**change):
    """A recipe of 2 sequences a part, whose clipping is active."""
    spread = ParallelRecipe(**change.pop("parallel", {}))
    base = Recipe(
        model="", data=DataRecipe(source="", seq_len=LENGTH), output="", steps=20,
        batch_size=8, lr=1e-3, clip_norm=0.5, parallel=spread,
    )  # fmt: skip
    return replace(base, **change)


def parts(n_parts, step, vocab=VOCAB):
    """One step's batch in parts of 2 sequences, whose counts of labels differ."""
    generator, made = seeded(step, "parts"), []
    for i in range(n_parts):
        ids = torch.randint(vocab, (2, LENGTH + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:, : i % 3] = -100
        made.append({"input_ids": ids[:, :-1], "labels": labels})
    return made


@dataclass
class Seen:
    """What one rank saw of a run."""

    outcomes: list = field(default_factory=list)
    evaluated: tuple = ()
    weights: dict = field(default_factory=dict)
    moments: dict = field(default_factory=dict)


def pieces_of(engine, read):
    """Canonical name -> {piece: what `read` gives for it}."""
    return {
        name: {piece: read(local) for piece, local in locals_.items()}
        for name, declared, locals_ in engine.model.local_names()
        if declared.trained
    }


def read_weight(engine, name):
    with engine.weights(name) as tensor:
        return tensor.clone()


def my_parts(parallel, given, accumulate, step):
    every = parts(given.batch_size // 2, step)
    dp = parallel.dp
    return [b for i, b in enumerate(every) if i // accumulate % dp.world == dp.rank]


def run(_, given, n_steps, options=OPTIONS, dtype=torch.float32):
    """n steps and an evaluation of the recipe's layout on this rank; one process where `_` is None."""
    spread = given.parallel
    parallel = SINGLE
    if _ is not None:
        # which a launcher would have set
        os.environ["LOCAL_RANK"] = str(_.tp.rank)
        parallel = groups.init(
            tp=spread.tp, ep=spread.ep, pp=spread.pp, sequence_parallel=spread.sequence_parallel
        )
    model = make_model(HybridConfig.from_dict(options), parallel, dtype)
    engine = Engine(model, given) if _ is None else initialize(model, given)
    return follow(engine, given, range(n_steps))


def follow(engine, given, steps):
    seen = Seen()
    for step in steps:
        mine = my_parts(engine.parallel, given, given.accumulate, step)
        seen.outcomes.append(engine.step(mine, given.lr))
    seen.evaluated = engine.evaluate(my_parts(engine.parallel, given, given.accumulate, 99))
    seen.weights = pieces_of(engine, lambda name: read_weight(engine, name))
    seen.moments = {
        slot: pieces_of(engine, lambda name: engine.read_slot(name, slot))
        for slot in ("exp_avg", "exp_avg_sq")
    }
    return seen
