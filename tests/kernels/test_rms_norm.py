"""rms_norm: every backend against its formula."""

import pytest
import torch

from hybridzoo.kernels.dispatch import use
from hybridzoo.kernels.rms_norm import rms_norm
from tests.kernels.compare import (
    Call,
    assert_same,
    check_backend,
    randn,
    run_fwd_bwd,
    skip_unless_supported,
)

EPS = 0.1  # large enough to show in every value


def norm_inputs(dtype, device="cpu", residual=torch.float32):
    return Call(
        {
            "x": randn(2, 5, 37, seed=0, dtype=dtype, device=device),
            "weight": randn(37, seed=1, dtype=dtype, device=device),
            "residual": residual and randn(2, 5, 37, seed=2, dtype=residual, device=device),
            "eps": EPS,
        }
    )


def naive(x, weight=None, residual=None, *, eps, weight_fp32=False):
    h = x if residual is None else x + residual
    y = h / (h.pow(2).sum(-1, keepdim=True) / h.shape[-1] + eps).sqrt()
    # a view of its own, as two outputs that are one tensor cannot have two cotangents
    return (y if weight is None else y * weight), h.view_as(h)


@pytest.mark.parametrize("weight_fp32", [False, True], ids=["cast-weight", "weight-cast"])
@pytest.mark.parametrize("residual", [None, torch.float32], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", rms_norm.op.backends)
def test_backend_is_the_formula(backend, dtype, residual, weight_fp32, device):
    call = norm_inputs(dtype, device, residual).having(weight_fp32=weight_fp32)
    check_backend(rms_norm, naive, backend, call, dtype)


@pytest.mark.parametrize("width", [1, 64, 1000, 4096, 16384])
@pytest.mark.parametrize("backend", rms_norm.op.backends)
def test_backend_is_the_formula_at_every_width(backend, width, device):
    x, residual = (randn(2, 19, width, seed=k, device=device) for k in range(2))
    call = Call({"x": x.bfloat16(), "residual": residual, "eps": EPS})
    check_backend(rms_norm, naive, backend, call, torch.bfloat16)


def test_a_row_is_what_it_is_alone(device):
    """To the bit, whatever rows a program takes with it; torch's own sums do not promise this."""
    x, residual = (randn(2, 19, 64, seed=k, dtype=torch.bfloat16, device=device) for k in range(2))
    call = Call({"x": x, "residual": residual, "eps": EPS})
    skip_unless_supported(rms_norm, "triton", call)
    with use(rms_norm="triton"):
        y, h = rms_norm(**call.arguments)
        alone = rms_norm(**call.having(x=x[1, 7:9], residual=residual[1, 7:9]).arguments)
    assert torch.equal(y[1, 7:9], alone[0])
    assert torch.equal(h[1, 7:9], alone[1])


@pytest.mark.parametrize("backend", rms_norm.op.backends)
def test_backend_adds_the_zero_of_a_first_block(backend, device):
    residual = randn(2, 5, 64, seed=0, device=device)
    weight = randn(64, seed=1, dtype=torch.bfloat16, device=device)
    call = Call({"x": weight.new_zeros(()).expand(2, 5, 64), "weight": weight, "eps": EPS})
    call = call.having(residual=residual)
    check_backend(rms_norm, naive, backend, call, torch.bfloat16)


@pytest.mark.parametrize("residual", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", rms_norm.op.backends)
def test_gradients_of_many_rows_repeat_themselves(backend, residual, device):
    """More rows than programs; dy and dh are columns of something wider."""
    both = randn(4, 1501, 264, seed=0, dtype=torch.bfloat16, device=device)
    call = Call({"x": both[0, :, :128], "weight": both[1, 0, :128], "eps": EPS})
    call = call.having(residual=None if residual is None else both[1, :, 128:256].to(residual))
    check_backend(rms_norm, naive, backend, call, torch.bfloat16)
    leaves = call.leaves()

    def gradients(dy, dh):
        given = {name: t.detach().requires_grad_() for name, t in leaves.items()}
        with use(rms_norm=backend):
            y, h = rms_norm(**call.having(**given).arguments)
        # without a residual h is x, and its cotangent is nobody's business here
        ends, cotangents = ((y,), (dy,)) if residual is None else ((y, h), (dy, dh.to(residual)))
        return torch.autograd.grad(ends, tuple(given.values()), cotangents)

    dy, dh = both[2, :, 3:131], both[3, :, 5:133]
    want = gradients(dy.contiguous(), dh.contiguous())
    for _ in range(5):
        assert all(map(torch.equal, gradients(dy, dh), want))


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    x = torch.randn(2**19 + 1, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    residual = x.detach().flip(0)
    y, h = rms_norm(x, eps=EPS, residual=residual)
    (dx,) = torch.autograd.grad((y, h), x, (residual, residual))
    some = x.detach()[-3:].clone().requires_grad_()
    with use(rms_norm="reference"):
        want_y, want_h = rms_norm(some, eps=EPS, residual=residual[-3:])
    assert torch.equal(h[-3:], want_h)
    torch.testing.assert_close(y[-3:], want_y, rtol=2**-7, atol=0)
    (want,) = torch.autograd.grad((want_y, want_h), some, (residual[-3:], residual[-3:]))
    # the reference rounds the two parts of the gradient and their sum
    torch.testing.assert_close(dx[-3:], want, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("residual", [None, torch.float64], ids=["plain", "residual"])
def test_reference_is_exact_in_float64(residual):
    call = norm_inputs(torch.float64, residual=residual)
    assert_same(run_fwd_bwd(rms_norm, call), run_fwd_bwd(naive, call))
    call = call.having(weight=None)
    assert_same(run_fwd_bwd(rms_norm, call), run_fwd_bwd(naive, call))


def test_weight_multiplies_after_the_cast():
    x, weight = norm_inputs(torch.bfloat16, residual=None).leaves().values()
    bare, _ = rms_norm(x, eps=EPS)
    y, _ = rms_norm(x, weight, eps=EPS)
    assert torch.equal(y, bare * weight)


def test_weight_multiplies_before_the_cast_where_asked():
    # bf16's halves of the last bit: what a second rounding would move is not moved
    x, weight = norm_inputs(torch.bfloat16, residual=None).leaves().values()
    want, _ = naive(x.double(), weight.double(), eps=EPS)
    y, _ = rms_norm(x, weight, eps=EPS, weight_fp32=True)
    torch.testing.assert_close(y.double(), want, rtol=1.01 * 2**-8, atol=0)
    assert y.dtype == torch.bfloat16
    assert not torch.equal(y, rms_norm(x, weight, eps=EPS)[0])


def test_the_place_of_the_cast_matters_to_halves_only():
    call = norm_inputs(torch.float64).having(weight_fp32=True)
    assert_same(run_fwd_bwd(rms_norm, call), run_fwd_bwd(rms_norm, norm_inputs(torch.float64)))


@pytest.mark.parametrize("residual", [None, torch.float32], ids=["plain", "residual"])
def test_half_inputs_are_rounded_once(residual):
    arguments = norm_inputs(torch.bfloat16, residual=residual).having(weight=None).arguments
    wide = {k: t.double() for k, t in arguments.items() if isinstance(t, torch.Tensor)}
    want, _ = naive(**wide, eps=EPS)
    # bf16 keeps 8 bits, the leading one included: half of the last is at most 2 ** -8 of the value;
    # where the sum cancels, its rounding to fp32 remains
    torch.testing.assert_close(
        rms_norm(**arguments)[0].double(), want, rtol=1.01 * 2**-8, atol=1e-6
    )


def test_sum_keeps_the_dtype_of_the_residual():
    x, weight, residual = norm_inputs(torch.bfloat16).leaves().values()
    y, h = rms_norm(x, weight, eps=EPS, residual=residual)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(h, residual + x.float())


def test_wide_weight_leaves_the_output_narrow():
    x, weight = norm_inputs(torch.bfloat16, residual=None).leaves().values()
    assert rms_norm(x, weight.float(), eps=EPS)[0].dtype == torch.bfloat16
