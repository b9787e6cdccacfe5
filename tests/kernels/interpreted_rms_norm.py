"""rms_norm's Triton backend in the interpreter."""

import itertools
from functools import partial

import torch

from hybridzoo.kernels.rms_norm import reference, rms_norm, triton
from tests.kernels.compare import check_backend, randn
from tests.kernels.interpreted import allow_cpu, check_graphs
from tests.kernels.test_rms_norm import EPS, naive, norm_inputs

# the interpreter truncates to bf16 where a GPU rounds, but rounds to fp16
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


allow_cpu(triton)


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


def check_op():
    x, weight, residual = norm_inputs(BF16).to(None).leaves().values()
    for given in ((weight, residual), (None, None)):
        torch.library.opcheck(torch.ops.hybridzoo.rms_norm_triton, (x, *given, EPS, True))


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
    yield "opcheck", check_op
    yield "refusals", check_refusals
    for residual in (None, FP32):
        call = norm_inputs(BF16, residual=residual)
        yield f"graphs {residual}", partial(check_graphs, rms_norm, call)
