"""Tensor parallelism of every kind on gloo processes: the same function as on one rank."""

from dataclasses import replace

import pytest
import torch

from hybridzoo.comm import SINGLE
from hybridzoo.config import HybridConfig
from hybridzoo.errors import ConfigError
from hybridzoo.layers import KINDS
from hybridzoo.layers.norm import GatedRMSNorm
from tests import gloo
from tests.layers.cases import CASES, D_MODEL, VARIANTS, full_weights, randn
from tests.layers.tp import joined, local_state, run_aux, run_init, run_layer
from tests.models import assert_modes_equal, run_modes

# float64: sums over ranks differ from one rank's in order only
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}

WIDE = {"mlp": {"d_ff": 12}, "moe": {"d_ff": 8, "shared_d_ff": 12}}


def runs():
    for name, config in CASES.items():
        yield pytest.param(config, 2, id=f"{name}-tp2")
        changes = WIDE.get(config.kind, {})
        if VARIANTS.get(name, {}).get("shared_d_ff", 0) is None:
            changes = {"d_ff": 8}
        yield pytest.param(replace(config, **changes), 4, id=f"{name}-tp4")


every_run = pytest.mark.parametrize(("config", "world"), list(runs()))


def assert_close(got, expected, what):
    torch.testing.assert_close(got, expected, **TOLERANCE, msg=lambda m: f"{what}: {m}")


@every_run
def test_ranks_compute_one_ranks_function(config, world):
    weights = full_weights(config)
    args = (config, weights, randn(2, 11, D_MODEL), randn(2, 11, D_MODEL, seed=1))
    one = run_layer(SINGLE, *args)
    ranks = gloo.run(world, run_layer, *args)
    for rank, outcome in enumerate(ranks):
        for what, tensor in one.outputs.items():
            assert_close(outcome.outputs[what], tensor, f"{what} on rank {rank}")
        for name, spec in config.state(D_MODEL, 2, 12).items():
            expected = local_state(spec, one.states[name], world, rank)
            assert_close(outcome.states[name], expected, f"{name} on rank {rank}")
    table = {k: p for k, p in config.params(D_MODEL).items() if p.trained}
    for name, grad in joined(table, [r.grads for r in ranks]).items():
        assert_close(grad, one.grads[name], f"gradient of {name}")


def run_gated_norm(parallel, y, z, weight):
    rank, world = parallel.tp.rank, parallel.tp.world
    y, z, weight = (t.chunk(world, -1)[rank] for t in (y, z, weight))
    norm = GatedRMSNorm(torch.nn.Parameter(weight), 0.0, 12, True, parallel=parallel)
    return norm(y, z).detach()


def test_a_norm_across_ranks_rounds_as_on_one_rank():
    # signs alone: their sum of squares is exact in any order, so that only the roundings remain
    y, z, weight = (randn(*s).bfloat16() for s in ((2, 31, 12), (2, 31, 12, 1), (12,)))
    y, z = y.sign(), z[..., 0]
    one = run_gated_norm(SINGLE, y, z, weight)
    assert torch.equal(torch.cat(gloo.run(2, run_gated_norm, y, z, weight), -1), one)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_sequence_parallel_ranks_compute_one_ranks_model(kind, world):
    # two blocks, so that a stream of one rank's tokens passes between them
    layers = [run.values[0] for run in runs() if run.values[1] == world]
    norms = {"norm": "layer_norm" if kind in ("mamba1", "moe") else "rms_norm"}
    configs = [
        HybridConfig(
            d_model=D_MODEL, vocab_size=23, pattern="LL", layers={"L": c.to_dict()}, **norms
        )
        for c in layers
        if c.kind == kind
    ]
    ranks = gloo.run(world, run_modes, configs, True)
    assert_modes_equal(ranks, run_modes(SINGLE, configs), configs, **TOLERANCE)


@every_run
def test_initial_weights_do_not_depend_on_the_ranks(config, world):
    one = run_init(SINGLE, config, D_MODEL)
    full = joined(config.params(D_MODEL), gloo.run(world, run_init, config, D_MODEL))
    assert full.keys() == one.keys()
    for name, tensor in full.items():
        assert torch.equal(tensor, one[name]), name


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.kind == "moe"])
def test_balance_losses_have_one_ranks_gradients(name):
    args = (CASES[name], full_weights(CASES[name]), randn(2, 11, D_MODEL))
    dx, d_router = run_aux(SINGLE, *args)
    assert dx.any()
    assert d_router.any()
    for rank_dx, rank_d_router in gloo.run(2, run_aux, *args):
        assert_close(rank_dx, dx, "dx")
        assert_close(rank_d_router, d_router, "router")


def test_a_cut_that_is_not_whole_names_the_legal_tp():
    config = replace(CASES["mamba2"], n_heads=8, n_groups=4)
    rule = "mamba2: tp=3 must divide n_heads (8), and divide or be a multiple of n_groups (4). "
    with pytest.raises(ConfigError) as error:
        config.check_tp("mamba2", D_MODEL, 3)
    assert str(error.value) == rule + "Use tp=1, 2, 4 or 8."
    for legal in (1, 2, 4, 8):
        config.check_tp("mamba2", D_MODEL, legal)
    with pytest.raises(ConfigError, match=r"tp=16 must divide n_heads \(8\)"):
        config.check_tp("mamba2", D_MODEL, 16)
