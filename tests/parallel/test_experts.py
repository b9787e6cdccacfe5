"""Expert parallelism under DeepSpeed: losses, gradients and their norm are those of one process."""

import os
from dataclasses import replace
from functools import cache

import pytest
import torch

from hybridzoo.layers.init import seeded
from hybridzoo.parallel.engine import Engine, initialize
from hybridzoo.parallel.groups import init
from hybridzoo.parallel.recipe import DataRecipe, ParallelRecipe, Recipe
from hybridzoo.parallel.stages import stages
from tests import gloo
from tests.models import make_config, make_model, tiny

# without biases: attention does not see its keys' one, whose gradients are roundings
LAYERS = {
    "A": tiny("attention", n_kv_heads=2, qkv_bias=False),
    "E": tiny("moe", n_experts=8, n_expert_groups=4, d_ff=8),
}
CONFIG = make_config(pattern="A E A E", layers=LAYERS, shared={}, layers_at={})
ACCUMULATE = 2
SLOW = pytest.mark.slow


def recipe(**spread):
    """Two parts of two sequences a rank and step; the clipping is active."""
    return Recipe(
        model="", data=DataRecipe(source="", seq_len=6), output="", steps=20, lr=3e-3,
        batch_size=2 * ACCUMULATE * spread.pop("dp"), accumulate=ACCUMULATE, clip_norm=0.2,
        parallel=ParallelRecipe(**spread),
    )  # fmt: skip


def parts(step, dp_rank):
    """A rank's parts of a step; their counts of labels differ."""
    made = []
    for i in range(ACCUMULATE):
        generator = seeded(step, f"{dp_rank} {i}")
        ids = torch.randint(23, (2, 7), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:, : dp_rank + 2 * i] = -100
        made.append({"input_ids": ids[:, :-1], "labels": labels})
    return made


@cache
def laid_out(tp, ep, pp, sequence_parallel):
    # which a launcher would have set
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
    return init(tp=tp, ep=ep, pp=pp, sequence_parallel=sequence_parallel)


def train(engine, reads, n_steps):
    """Outcomes of the steps, AdamW's first moments after the first one, the weights at the end."""
    seen = []
    for step in range(n_steps):
        batches = [b for dp_rank in reads for b in parts(step, dp_rank)]
        seen.append(engine.step(batches, engine.recipe.lr))
        if step == 0:
            # (1 - beta_1) times the clipped gradient
            moments = {k: engine.read_slot(k, "exp_avg").clone() for k in engine.params}
    weights = {k: p.detach().clone() for k, p in engine.params.items()}
    return seen, moments, weights


def run_rank(_, given, n_steps, config=CONFIG):
    spread = given.parallel
    parallel = laid_out(spread.tp, spread.ep, spread.pp, spread.sequence_parallel)
    stage = stages(config, spread.pp, "pattern")[parallel.pp.rank]
    model = make_model(config, parallel, torch.float32, stage=stage)
    return train(initialize(model, given), [parallel.dp.rank], n_steps)


def cut(config, tensors, spread, rank):
    """What a rank (of dp and tp) holds of one process's tensors by canonical name."""
    tp, ep = spread.tp, (rank // spread.tp) % spread.ep
    mine = {}
    for name, p in config.params():
        if name in tensors:
            n = p.shape[0] // spread.ep
            full = tensors[name][ep * n : ep * n + n] if p.experts else tensors[name]
            prefix, dot, last = name.rpartition(".layer.")
            pieces = p.cut.shard(last, full, tp, rank % tp)
            mine |= {prefix + dot + piece: tensor for piece, tensor in pieces.items()}
    return mine


def check(n_steps, config=CONFIG, **spread):
    given = recipe(**spread)
    dp = given.batch_size // 2 // ACCUMULATE
    spread, lanes = given.parallel, dp * given.parallel.tp
    ranks = gloo.run(lanes * spread.pp, run_rank, given, n_steps, config)
    # one process takes the ranks' parts for parts of its batch
    alone = replace(given, accumulate=dp * ACCUMULATE, parallel=ParallelRecipe())
    engine = Engine(make_model(config, dtype=torch.float32), alone)
    seen, moments, weights = train(engine, range(dp), n_steps)
    squares = {name: moment.square().sum() for name, moment in moments.items()}
    # or the norm would not tell how often experts count in it
    assert sum(v for k, v in squares.items() if "expert_" in k) > 0.01 * sum(squares.values())
    for rank, (their_seen, their_moments, their_weights) in enumerate(ranks):
        for step, (got, expected) in enumerate(zip(their_seen, seen, strict=True)):
            where = f"step {step} on rank {rank}"
            # fp32: sums of a few thousand terms in another order
            assert got.nats == pytest.approx(expected.nats, abs=1e-5), where
            assert got.aux == pytest.approx(expected.aux, abs=1e-5), where
            assert got.norm == pytest.approx(expected.norm, rel=1e-4), where
            assert expected.norm > given.clip_norm
            assert got.n_targets == expected.n_targets
        # fp32 again; the moments hold gradients of 1e-4 and less
        same_cut(config, their_moments, moments, spread, rank, {"rtol": 1e-3, "atol": 1e-7})
        # AdamW divides tiny gradients by their size, so their roundings count
        same_cut(config, their_weights, weights, spread, rank, {"rtol": 1e-3, "atol": 2e-4})
    for lane in range(lanes):
        # each parameter is on a stage
        held = {name for *_, on_stage in ranks[lane::lanes] for name in on_stage}
        assert held == cut(config, weights, spread, lane).keys()


def same_cut(config, got, full, spread, rank, tolerance):
    expected = cut(config, full, spread, rank)
    for name, tensor in got.items():
        where = f"{name} on rank {rank}"
        torch.testing.assert_close(
            tensor, expected[name], msg=lambda m, w=where: f"{w}: {m}", **tolerance
        )


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(0, marks=SLOW), 1, pytest.param(2, marks=SLOW)]
)
def test_two_ranks_train_as_one_process(zero_stage):
    check(20, dp=2, ep=2, zero_stage=zero_stage)


@SLOW
@pytest.mark.parametrize(
    "spread",
    [
        {"dp": 2, "ep": 2, "tp": 2, "zero_stage": 1},
        {"dp": 2, "ep": 2, "tp": 2, "zero_stage": 0, "recompute": {"E": "full"}},
        {"dp": 2, "ep": 2, "tp": 2, "zero_stage": 2, "sequence_parallel": True},
        {"dp": 4, "ep": 2, "zero_stage": 2},
        {"dp": 4, "ep": 2, "zero_stage": 0},
        {"dp": 4, "ep": 4, "zero_stage": 1},
    ],
    ids=lambda spread: "-".join(f"{k}{v}" for k, v in spread.items()),
)
def test_four_ranks_train_as_one_process(spread):
    check(20, **spread)


@SLOW
@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("pattern", ["A E | A E", "A A | A E", "E A | A A"])
def test_pipeline_stages_share_experts_as_one_process(pattern, zero_stage):
    config = make_config(pattern=pattern, layers=LAYERS, shared={}, layers_at={})
    check(20, config, dp=2, ep=2, pp=2, zero_stage=zero_stage)


@SLOW
@pytest.mark.parametrize(("dp", "zero_stage"), [(2, 0), (4, 1)])
def test_pipeline_stages_hold_copies_of_experts(dp, zero_stage):
    layers = {"A": LAYERS["A"], "S": {"shared": "base"}}
    config = make_config(
        pattern="A S | A S", layers=layers, shared={"base": LAYERS["E"]}, layers_at={}
    )
    check(5, config, dp=dp, ep=2, pp=2, zero_stage=zero_stage)
