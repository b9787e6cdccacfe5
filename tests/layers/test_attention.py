"""Attention's convolution and parallel units against mamba_ssm's MHA, written out."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.layers import Sequence
from tests.layers.cases import CASES, D_MODEL, PLAIN, full_weights, make_layer, randn

# float64: sums in another order
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
LENGTH = 11


def rotated(x, theta, width):
    """(b, l, h, p) by complex numbers: channels j and j + width / 2 are one number's parts."""
    half = width // 2
    number = torch.complex(x[..., :half], x[..., half:width])
    angle = torch.arange(x.shape[1])[:, None, None] * theta ** (-torch.arange(half) / half).double()
    number = number * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([number.real, number.imag, x[..., width:]], -1)


def mha(config, w, x):
    """Project, convolve q, k and v without activation, turn, attend; silu(gate) * up beside it."""
    h, hk, p = config.widths(D_MODEL)
    widths = [h * p, hk * p, hk * p, config.parallel_d_ff, config.parallel_d_ff]
    rows = F.linear(x, w["qkv_proj.weight"], w.get("qkv_proj.bias")).split(widths, -1)
    qkv = torch.cat(rows[:3], -1).mT
    taps, past = w["conv_weight"][:, None], config.d_conv - 1
    conv = F.conv1d(F.pad(qkv, (past, 0)), taps, w.get("conv_bias"), groups=qkv.shape[1]).mT
    q, k, v = (t.unflatten(-1, (-1, p)) for t in conv.split(widths[:3], -1))
    turn = (config.rope_theta, config.rotary_dim(D_MODEL))
    q, k = (rotated(t, *turn) for t in (q, k))
    k, v = (t.repeat_interleave(h // hk, 2) for t in (k, v))
    scores = torch.einsum("blhp,bmhp->bhlm", q, k) * config.softmax_scale
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    scores = scores.masked_fill((distance < 0) | (distance >= config.window_size), -torch.inf)
    heads = torch.einsum("bhlm,bmhp->blhp", scores.softmax(-1), v).flatten(2)
    hidden = F.silu(rows[3]) * rows[4]
    return F.linear(torch.cat([heads, hidden], -1), w["out_proj.weight"], w.get("out_proj.bias"))


@pytest.mark.parametrize("name", ["attention-conv", "attention-conv_mqa"])
def test_it_is_the_formula(name):
    x = randn(2, LENGTH, D_MODEL)
    expected = mha(CASES[name], full_weights(CASES[name]), x)
    torch.testing.assert_close(make_layer(name)(x, None, PLAIN), expected, **TOLERANCE)


def test_the_state_keeps_what_enters_the_convolution():
    # mamba_ssm keeps what leaves it, and so decodes another function than it trains
    layer, x = make_layer("attention-conv"), randn(2, LENGTH, D_MODEL)
    state = layer.init_state(2, LENGTH)
    layer(x, state, PLAIN)
    inputs = layer.qkv_proj(x)[:, -2:, : 8 * 6]
    torch.testing.assert_close(state.tensors["conv_state"], inputs, **TOLERANCE)


def test_padding_enters_no_convolution():
    layer, x = make_layer("attention-conv"), randn(1, LENGTH, D_MODEL)
    state = layer.init_state(1, LENGTH)
    mask = torch.ones(1, LENGTH)
    mask[:, : LENGTH - 1] = 0
    layer(x, state, Sequence.build(LENGTH, attention_mask=mask))
    # one token: the input before it is nothing, although qkv_proj has a bias
    assert not state.tensors["conv_state"][:, 0].any()
    assert state.tensors["conv_state"][:, 1].any()


def test_parallel_units_beside_a_convolution_are_independent_options():
    full = CASES["attention-conv"]
    for change in ({"d_conv": None}, {"parallel_d_ff": None}):
        config = replace(full, **change)
        layer = config.build(D_MODEL, dtype=torch.float64)
        layer.load_state_dict(full_weights(config))
        x, state = randn(2, LENGTH, D_MODEL), layer.init_state(2, LENGTH)
        assert ("conv_state" in state.tensors) == (config.d_conv is not None)
        chunks = torch.cat([layer(c, state, PLAIN) for c in x.split([5, 1, 5], 1)], 1)
        torch.testing.assert_close(chunks, layer(x, None, PLAIN), **TOLERANCE)
