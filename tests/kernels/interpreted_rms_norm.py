"""rms_norm's Triton backend in the interpreter."""

import itertools
from functools import partial

import pytest
import torch

from hybridzoo.kernels.rms_norm import reference, rms_norm, triton
from tests.kernels import sass
from tests.kernels.compare import Call, check_backend, randn
from tests.kernels.interpreted import allow_cpu, check_gradient_graphs, check_graphs
from tests.kernels.test_rms_norm import EPS, naive, norm_inputs

# the interpreter truncates to bf16 where a GPU rounds, but rounds to fp16
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


allow_cpu(triton)
# programs of a backward: fewer than its rows, so that they take some in turn
sass.HOPPER.multi_processor_count = 2
torch.cuda.get_device_properties = lambda _: sass.HOPPER


def check(dtype, residual, **changed):
    call = norm_inputs(dtype, residual=residual).having(**changed)
    check_backend(rms_norm, naive, "triton", call, dtype)


def check_rounding(weight, weight_fp32):
    """Every cast of the reference, in its place: a row's sum may still differ in the last bit."""
    arguments = norm_inputs(FP16).having(weight_fp32=weight_fp32).arguments
    arguments["weight"] = arguments["weight"].to(weight)
    (y, h), (want_y, want_h) = triton.run(**arguments), reference.run(**arguments)
    assert (y.dtype, h.dtype) == (want_y.dtype, want_h.dtype)
    assert torch.equal(h, want_h)
    assert (y != want_y).float().mean() < 0.01


def check_narrow_stream():
    """An fp16 stream takes an fp32 x: x is rounded first, then the sum."""
    x, residual = randn(3, 33, seed=0), randn(3, 33, seed=1, dtype=FP16)
    _, h = triton.run(x, eps=EPS, residual=residual)
    assert torch.equal(h, reference.run(x, eps=EPS, residual=residual)[1])


def check_views():
    """Rows, columns and outer dimensions with strides of their own; and a zero that is expanded."""
    wide = randn(5, 2, 7, 40, seed=0)
    cut, residual = wide[1:4, 1, 2:6, 3:36:2], wide[:3, 0, :4, ::2]
    for x in (cut, cut.new_zeros(()).expand(3, 4, 17)):
        for given in ((x, residual[..., :17]), (x[0], residual[0, ..., :17])):
            got = triton.run(given[0], eps=EPS, residual=given[1])
            x_copy, residual_copy = (t.contiguous() for t in given)
            want = triton.run(x_copy, eps=EPS, residual=residual_copy)
            assert all(map(torch.equal, got, want))
            torch.testing.assert_close(got[0], naive(x_copy, None, residual_copy, eps=EPS)[0])


def check_shapes():
    """One row, none, more than a program's rows, four dimensions; rows wider than a program."""
    for shape in ((33,), (0, 33), (131, 17), (2, 3, 4, 5), (2, 2049), (3, 1), (2, 0)):
        x = randn(*shape, seed=0)
        y, h = triton.run(x, eps=EPS)
        assert h is x
        torch.testing.assert_close(y, naive(x, eps=EPS)[0])


def check_gradients(rows, width, dtype, residual):
    """More rows than programs, and a program's of several; widths that are no power of two."""
    x, weight = randn(rows, width, seed=0, dtype=dtype), randn(width, seed=1, dtype=dtype)
    call = Call({"x": x, "weight": weight, "eps": EPS})
    if residual is not None:
        call = call.having(residual=randn(rows, width, seed=2, dtype=residual))
    check_backend(rms_norm, naive, "triton", call, dtype)


def check_late():
    """dh is read last, as it is of the widest rows."""
    least, triton.LATE_BYTES = triton.LATE_BYTES, 1
    check(FP32, FP32)
    triton.LATE_BYTES = least


def check_each_cotangent():
    """Of y or of h alone, and the sum of both; where x and residual differ each has its dtype."""
    for dtype, residual in itertools.product([FP32, FP16], repeat=2):
        call = norm_inputs(dtype, residual=residual).to(None)
        x, weight, stream = call.leaves().values()
        y, h = triton.run(**call.arguments)
        dy, dh = randn(*y.shape, seed=5, dtype=dtype), randn(*h.shape, seed=6, dtype=residual)
        leaves = (x, weight, stream)
        ends = [((y,), (dy,)), ((h,), (dh,)), ((y, h), (dy, dh))]
        of_y, of_h, of_both = (
            torch.autograd.grad(o, leaves, d, retain_graph=True, materialize_grads=True)
            for o, d in ends
        )
        assert torch.equal(of_h[2], dh)
        assert torch.equal(of_h[0], dh.to(dtype))
        assert not of_h[1].any() and torch.equal(of_y[1], of_both[1])
        for leaf, both, *parts in zip(leaves, of_both, of_y, of_h, strict=True):
            assert both.dtype == leaf.dtype
            # a rounding of each
            rounding = 4 * torch.finfo(dtype).eps + 4 * torch.finfo(residual).eps
            torch.testing.assert_close(
                both.float(), sum(p.float() for p in parts), rtol=rounding, atol=rounding
            )


def check_gradient_views():
    """dy, dh and x with strides of their own, and of stride 0."""
    dy = randn(5, 2, 7, 40, seed=0)[1:4, 1, 2:6, 3:36:2]
    h = randn(4, 3, 17, seed=1).transpose(0, 1)
    dh = randn(3, 9, 33, seed=2)[:, ::2, 5:22][:, :4]
    weight = randn(17, seed=3)
    for given in ((dy, dh, h), (h, dy, dh), (dh, dy.new_ones(()).expand(3, 4, 17), dy)):
        got = triton._backward(*given, weight, EPS)
        want = triton._backward(*(t.contiguous() for t in given), weight, EPS)
        assert all(map(torch.equal, got, want))


def check_empty():
    for shape in ((0, 33), (2, 0)):
        x, weight = torch.empty(shape, requires_grad=True), torch.ones(shape[-1]).requires_grad_()
        y, _ = triton.run(x, weight, eps=EPS)
        dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
        assert dx.shape == shape
        assert torch.equal(dweight, torch.zeros(shape[-1]))


def check_second_derivatives():
    """They raise, whether or not the gradient that comes in has one of its own."""
    for residual, needs in itertools.product([None, FP32], [False, True]):
        call = norm_inputs(FP32, residual=residual).to(None)
        x, weight = call.arguments["x"], call.arguments["weight"]
        y, _ = triton.run(**call.arguments)
        (dx,) = torch.autograd.grad(y, x, y.detach().requires_grad_(needs), create_graph=True)
        with pytest.raises(RuntimeError, match=r"rms_norm_triton_backward.* no autograd"):
            # a loss that is differentiable otherwise as well
            torch.autograd.grad(dx.sum() + weight.square().sum(), weight)


def check_op():
    """Schema and fake of both ops; a formula they have not."""
    x, weight, residual = norm_inputs(BF16).leaves().values()
    for given in ((weight, residual), (None, None)):
        torch.library.opcheck(torch.ops.hybridzoo.rms_norm_triton, (x, *given, EPS, True))
    backward = torch.ops.hybridzoo.rms_norm_triton_backward
    for given in ((residual, residual, weight), (None, residual, None), (x, x, weight)):
        torch.library.opcheck(backward, (x.flip(0), *given, EPS))


def check_refusals():
    """What it leaves to the reference."""
    x = torch.empty(1, triton.MAX_WIDTH)
    assert rms_norm.op.pick(x, eps=EPS) == "triton"
    assert rms_norm.op.pick(torch.empty(1, triton.MAX_WIDTH + 1), eps=EPS) == "reference"
    assert rms_norm.op.pick(x, eps=EPS, residual=x.double()) == "reference"


def cases():
    for given in itertools.product([FP32, BF16], [None, FP32], [False, True]):
        yield str(given), partial(check, *given[:2], weight_fp32=given[2])
    yield "no weight", partial(check, BF16, FP32, weight=None)
    for given in itertools.product([FP16, FP32], [False, True]):
        yield f"rounding {given}", partial(check_rounding, *given)
    yield "narrow stream", check_narrow_stream
    yield "views", check_views
    yield "shapes", check_shapes
    for shape in ((131, 17), (5, 2049), (19, 64)):
        for dtype, residual in ((FP32, FP32), (BF16, FP32), (BF16, None)):
            yield (
                f"gradients {shape} {dtype} {residual}",
                partial(check_gradients, *shape, dtype, residual),
            )
    yield "late", check_late
    yield "each cotangent", check_each_cotangent
    yield "gradients of views", check_gradient_views
    yield "empty", check_empty
    yield "second derivatives", check_second_derivatives
    yield "opcheck", check_op
    yield "refusals", check_refusals
    for residual in (None, FP32):
        call = norm_inputs(BF16, residual=residual)
        yield f"graphs {residual}", partial(check_graphs, rms_norm, call)
        call = norm_inputs(FP32, residual=residual)
        yield f"gradients in graphs {residual}", partial(check_gradient_graphs, rms_norm, call)
