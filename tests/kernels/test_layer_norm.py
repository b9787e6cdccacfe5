"""layer_norm: every backend against its formula."""

import pytest
import torch

from hybridzoo.kernels.layer_norm import layer_norm
from tests.kernels.compare import (
    Call,
    assert_same,
    check_backend,
    randn,
    run_fwd_bwd,
)

EPS = 0.1  # large enough to show in every value


def norm_inputs(dtype, device="cpu", residual=torch.float32):
    return Call(
        {
            "x": randn(2, 5, 37, seed=0, dtype=dtype, device=device),
            "weight": randn(37, seed=1, dtype=dtype, device=device),
            "bias": randn(37, seed=3, dtype=dtype, device=device),
            "residual": residual and randn(2, 5, 37, seed=2, dtype=residual, device=device),
            "eps": EPS,
        }
    )


def naive(x, weight=None, bias=None, residual=None, *, eps):
    h = x if residual is None else x + residual
    away = h - h.sum(-1, keepdim=True) / h.shape[-1]
    y = away / (away.pow(2).sum(-1, keepdim=True) / h.shape[-1] + eps).sqrt()
    y = y if weight is None else y * weight
    # a view of its own, as two outputs that are one tensor cannot have two cotangents
    return (y if bias is None else y + bias), h.view_as(h)


@pytest.mark.parametrize("residual", [None, torch.float32], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", layer_norm.op.backends)
def test_backend_is_the_formula(backend, dtype, residual, device):
    call = norm_inputs(dtype, device, residual)
    check_backend(layer_norm, naive, backend, call, dtype)


@pytest.mark.parametrize("missing", [(), ("bias",), ("weight",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("residual", [None, torch.float64], ids=["plain", "residual"])
def test_reference_is_exact_in_float64(residual, missing):
    call = norm_inputs(torch.float64, residual=residual).having(**dict.fromkeys(missing))
    assert_same(run_fwd_bwd(layer_norm, call), run_fwd_bwd(naive, call))


@pytest.mark.parametrize("residual", [None, torch.float32], ids=["plain", "residual"])
def test_half_inputs_are_rounded_once(residual):
    # weight and bias too: the parameters of a bf16 model meet the fp32 norm of an fp32 stream
    arguments = norm_inputs(torch.bfloat16, residual=residual).arguments
    wide = {k: t.double() for k, t in arguments.items() if isinstance(t, torch.Tensor)}
    want, _ = naive(**wide, eps=EPS)
    got, _ = layer_norm(**arguments)
    # bf16 keeps 8 bits, the leading one included: half of the last is at most 2 ** -8 of the
    # value; where terms cancel, fp32's rounding of the terms remains
    torch.testing.assert_close(got.double(), want, rtol=1.01 * 2**-8, atol=1e-6)


def test_sum_keeps_the_dtype_of_the_residual():
    x, weight, bias, residual = norm_inputs(torch.bfloat16).leaves().values()
    y, h = layer_norm(x, weight, bias, eps=EPS, residual=residual)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(h, residual + x.float())


def test_parameters_of_another_width_leave_the_output_narrow():
    x, weight, bias = norm_inputs(torch.bfloat16, residual=None).leaves().values()
    assert layer_norm(x, weight.float(), bias.float(), eps=EPS)[0].dtype == torch.bfloat16
    y, _ = layer_norm(x.double(), weight, bias, eps=EPS)
    assert torch.equal(y, layer_norm(x.double(), weight.double(), bias.double(), eps=EPS)[0])
