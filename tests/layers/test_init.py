"""Initial weights: every parameter's values against the distribution that its paper starts from."""

# tables read as rows: one case a line
# ruff: noqa: E501

import math
from dataclasses import replace

import pytest
import torch

from hybridzoo.config import HybridConfig
from hybridzoo.layers import kind_config
from hybridzoo.layers.init import dt_bias, seeded
from hybridzoo.model import HybridLM

D_MODEL, N_SUBLAYERS = 64, 9

CONFIGS = {
    "mamba1": {"d_state": 16, "expand": 2, "in_proj_bias": True, "out_proj_bias": True, "x_norm": "learned"},
    "mamba2": {"d_state": 16, "head_dim": 1, "n_groups": 2, "in_proj_bias": True, "out_proj_bias": True},
    "attention": {"n_heads": 4, "n_kv_heads": 2, "qkv_bias": True, "out_proj_bias": True, "d_conv": 4, "parallel_d_ff": 40},
    "mlp": {"d_ff": 200, "bias": True},
    "moe": {"d_ff": 40, "n_experts": 6, "top_k": 2, "shared_d_ff": 48, "correction_bias": True, "bias": True, "d_latent": 24},
}  # fmt: skip
# d_inner 128 and dt_rank 4 of d_model 64; residual projections are divided by sqrt(9)
FAN = {64: 1 / 8, 128: 128**-0.5, 4: 1 / 2}
NORMAL = ("normal", 0.02)
RESIDUAL = ("normal", 0.02 / 3)
EXPECTED = {
    "mamba1": {
        "in_proj.weight": ("uniform", FAN[64]), "in_proj.bias": ("uniform", FAN[64]), "conv_weight": ("uniform", FAN[4]),
        "conv_bias": ("uniform", FAN[4]), "x_proj.weight": ("uniform", FAN[128]), "dt_norm.weight": ("constant", 1),
        "B_norm.weight": ("constant", 1), "C_norm.weight": ("constant", 1), "dt_proj.weight": ("uniform", FAN[4]),
        "dt_bias": ("dt", (1e-3, 1e-1)), "A_log": ("log_arange", 16), "D": ("constant", 1),
        "out_proj.weight": ("uniform", FAN[128] / 3), "out_proj.bias": ("constant", 0),
    },
    "mamba2": {
        "in_proj.weight": ("uniform", FAN[64]), "in_proj.bias": ("uniform", FAN[64]), "conv_weight": ("uniform", FAN[4]),
        "conv_bias": ("uniform", FAN[4]), "dt_bias": ("dt", (1e-3, 1e-1)), "A_log": ("log_uniform", (1, 16)),
        "D": ("constant", 1), "norm.weight": ("constant", 1), "out_proj.weight": ("uniform", FAN[128] / 3),
        "out_proj.bias": ("constant", 0),
    },
    "attention": {
        "qkv_proj.weight": NORMAL, "qkv_proj.bias": ("constant", 0), "conv_weight": ("uniform", FAN[4]),
        "conv_bias": ("uniform", FAN[4]), "out_proj.weight": RESIDUAL, "out_proj.bias": ("constant", 0),
    },
    "mlp": {
        "gate_up_proj.weight": NORMAL, "gate_up_proj.bias": ("constant", 0), "down_proj.weight": RESIDUAL,
        "down_proj.bias": ("constant", 0),
    },
    "moe": {
        "expert_up_weight": NORMAL, "expert_down_weight": NORMAL, "router_weight": NORMAL,
        "correction_bias": ("constant", 0), "shared_up_proj.weight": NORMAL, "shared_up_proj.bias": ("constant", 0),
        "shared_down_proj.weight": RESIDUAL, "shared_down_proj.bias": ("constant", 0), "latent_down_proj.weight": NORMAL,
        "latent_down_proj.bias": ("constant", 0), "latent_up_proj.weight": RESIDUAL, "latent_up_proj.bias": ("constant", 0),
    },
}  # fmt: skip


def assert_uniform(u, n):
    """Samples of U(0, 1): mean, variance and both ends, each within 5 of its own standard deviations."""
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n)
    # the fourth central moment of U(0, 1) is 1 / 80
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt((1 / 80 - 1 / 144) / n)
    # P(min > t) = (1 - t)^n; a float32 rounding of the ends is forgiven
    reach = 15 / n
    assert -1e-5 < u.min() < reach
    assert 1 - reach < u.max() < 1 + 1e-5


def assert_normal(x, std, n):
    z = x / std
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    # the largest of n normal draws lies near sqrt(2 log n)
    assert 0.6 * math.sqrt(2 * math.log(n)) < z.abs().max() < math.sqrt(2 * math.log(n)) + 2
    # a third of a uniform's fourth moment is missing here
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)


def assert_follows(name, x, rule):
    law, value = rule
    n, x = x.numel(), x.double()
    if law == "constant":
        assert (x == value).all()
    elif law == "uniform":
        assert_uniform((x / value).flatten() / 2 + 0.5, n)
    elif law == "normal":
        assert_normal(x.flatten(), value, n)
    elif law == "log_uniform":
        assert_uniform((x.exp() - value[0]) / (value[1] - value[0]), n)
    elif law == "dt":
        steps = torch.nn.functional.softplus(x, threshold=50)
        assert_uniform((steps / value[0]).log() / math.log(value[1] / value[0]), n)
    else:
        assert law == "log_arange"
        expected = torch.arange(1, value + 1).double().log().expand(x.shape)
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


def built(kind, d_model=D_MODEL, **change):
    config = replace(kind_config("test", kind)(**CONFIGS[kind]), **change)
    layer = config.build(d_model)
    layer.init_weights(0, f"{kind}.", N_SUBLAYERS)
    return layer


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_follows_its_law(kind):
    layer = built(kind)
    assert layer.table.keys() == EXPECTED[kind].keys()
    for name, rule in EXPECTED[kind].items():
        assert_follows(name, layer.get_parameter(name).detach(), rule)


def test_steps_never_start_below_their_floor():
    x = dt_bias(1e-6, 1e-1, 1e-4)((10_000,), seeded(0, "x")).double()
    steps = torch.nn.functional.softplus(x)
    assert steps.min() > 0.999e-4
    # two fifths of the logarithmic range lie below the floor
    share = (steps < 1.001e-4).double().mean()
    assert abs(share - 0.4) < 5 * math.sqrt(0.24 / 10_000)


def test_ranges_of_steps_and_decays_are_options():
    layer = built("mamba2", dt_min=0.01, dt_max=0.02, A_init=(2.0, 3.0))
    steps = torch.nn.functional.softplus(layer.dt_bias.detach())
    assert 0.0099 < steps.min() < 0.011
    assert 0.019 < steps.max() < 0.0201
    assert 2 <= layer.A_log.detach().exp().min() < 2.2
    assert 2.8 < layer.A_log.detach().exp().max() <= 3.0001


@pytest.mark.parametrize("kind", CONFIGS)
def test_draws_do_not_depend_on_the_order_or_torchs_seed(kind):
    torch.manual_seed(1)
    first = built(kind).state_dict()
    torch.manual_seed(2)
    layer = built(kind)
    layer.table = dict(reversed(layer.table.items()))
    layer.init_weights(0, f"{kind}.", N_SUBLAYERS)
    assert all(torch.equal(t, first[k]) for k, t in layer.state_dict().items())


def test_experts_without_a_latent_write_to_the_residual():
    experts = built("moe", d_latent=None).expert_down_weight.detach()
    assert_follows("expert_down_weight", experts, RESIDUAL)


def test_norms_start_as_ones_without_a_shift():
    legend = {"F": {"kind": "mlp", "d_ff": 8}}
    options = {"d_model": 16, "vocab_size": 20, "pattern": "FF", "layers": legend}
    model = HybridLM(HybridConfig.from_dict(options | {"norm": "layer_norm"}))
    for norm in (*(b.norm for b in model.blocks), model.norm):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()


def test_a_model_draws_each_place_for_itself_and_scales_by_its_sublayers():
    letters = {"M": "mamba1", "N": "mamba2", "A": "attention", "F": "mlp", "E": "moe"}
    legend = {letter: {"kind": kind, **CONFIGS[kind]} for letter, kind in letters.items()}
    options = {"d_model": D_MODEL, "vocab_size": 300, "layers": legend, "tie_embeddings": False}
    model = HybridLM(HybridConfig.from_dict(options | {"pattern": "MANMEAFMN"}))
    for name, weight in (("embed.weight", model.embed.weight), ("head.weight", model.head.weight)):
        assert_follows(name, weight.detach(), NORMAL)
    assert not torch.equal(model.embed.weight, model.head.weight)
    for block in model.blocks:
        assert (block.norm.weight == 1).all()
        kind = block.layer.config.kind
        for name, rule in EXPECTED[kind].items():
            assert_follows(name, block.layer.get_parameter(name).detach(), rule)
    mambas = [b.layer.in_proj.weight for b in model.blocks if b.layer.config.kind == "mamba1"]
    assert len(mambas) == 3
    assert not torch.equal(mambas[0], mambas[1])
