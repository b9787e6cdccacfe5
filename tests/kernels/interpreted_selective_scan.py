"""selective_scan's Triton backend in the interpreter."""

from functools import partial

import torch

from hybridzoo.kernels.selective_scan import reference, triton
from tests.kernels.compare import assert_same, assert_within, pack, run_fwd_bwd
from tests.kernels.test_selective_scan import (
    check_raw_op,
    packed_inputs,
    scan_inputs,
    small_steps,
)

# b l i g n; lengths round a group of steps, channels short of a block, a group wider than a block
SHAPES = [
    (1, 1, 3, 1, 4),
    (2, 3, 8, 1, 16),
    (1, 4, 5, 1, 5),
    (1, 5, 9, 3, 2),
    (1, 9, 6, 6, 4),
    (2, 6, 22, 2, 3),
]


def outputs(run, call):
    y, final_state = run(**call.arguments)
    assert y.dtype == call.arguments["x"].dtype
    assert final_state.dtype == torch.promote_types(y.dtype, torch.float32)
    return {"y": y.double(), "final_state": final_state.double()}


def check(call, dtype=torch.float32):
    truth = outputs(reference.run, call.to(torch.float64))
    same_dtype = outputs(reference.run, call.to(torch.float32))
    same_dtype = {k: t.to(dtype).double() for k, t in same_dtype.items()}
    with torch.no_grad():
        got = outputs(triton.run, call)
    assert_within(got, same_dtype, truth, dtype)


def strided():
    """Every input a part of a wider tensor, no two of one stride."""
    call = scan_inputs((2, 5, 6, 1, 4), torch.float32)
    a = call.arguments
    wide = {n: torch.cat([a[n]] * k, -1) for k, n in enumerate(("x", "dt", "B", "C", "z"), 2)}
    check(call.having(**{n: t[..., : a[n].shape[-1]] for n, t in wide.items()}))


def transposed():
    """A last stride other than one is copied."""
    call = scan_inputs((2, 5, 6, 1, 4), torch.float32)
    check(call.having(x=call.arguments["x"].mT.contiguous().mT))


def digits():
    call, truth = small_steps("cpu")
    with torch.no_grad():
        y, _ = triton.run(**call.arguments)
    # the interpreter rounds a fused multiply-add twice
    assert ((y - truth) / truth).abs().max() < 2e-6


def packed(has_state):
    lengths = [0, 5, 0, 1, 9, 2, 0]
    call = scan_inputs((1, sum(lengths), 4, 2, 3), torch.float32, "cpu", has_state, len(lengths))
    check(call.having(cu_seqlens=pack(lengths)))


def gradients(call):
    want = run_fwd_bwd(reference.run, call)
    assert_same(run_fwd_bwd(triton.run, call), want, tolerance=1e-5)


def compiled():
    call = scan_inputs((2, 5, 6, 2, 4), torch.float32)
    run = torch.compile(triton.run, fullgraph=True, backend="aot_eager")
    assert_same(run_fwd_bwd(run, call), run_fwd_bwd(triton.run, call), tolerance=1e-6)


def cases():
    for shape in SHAPES:
        yield f"{shape}", partial(check, scan_inputs(shape, torch.float32))
    for dtype in (torch.bfloat16, torch.float16):
        yield f"{dtype}", partial(check, scan_inputs((1, 5, 6, 1, 4), dtype), dtype)
    plain = scan_inputs((1, 6, 5, 1, 3), torch.float32)
    bare = plain.having(D=None, z=None, dt_bias=None, initial_state=None, dt_softplus=False)
    limited = plain.having(dt_limit=(0.3, 1.1))
    some = {"plain": plain, "bare": bare, "limited": limited}
    for dt in (-30.0, 30.0):
        raw = plain.arguments["dt"].clone()
        raw[:, ::3] = dt
        some[f"dt {dt}"] = plain.having(dt=raw)
    some["empty"] = scan_inputs((2, 0, 5, 1, 3), torch.float32)
    for name, call in some.items():
        yield name, partial(check, call)
    for case in (strided, transposed, digits, compiled):
        yield case.__name__, case
    for has_state in (False, True):
        yield f"packed {has_state}", partial(packed, has_state)
    for call in (plain, bare, limited, packed_inputs(True, torch.float32)):
        yield "gradients", partial(gradients, call)
        yield "opcheck", partial(check_raw_op, triton.selective_scan_triton, call)
