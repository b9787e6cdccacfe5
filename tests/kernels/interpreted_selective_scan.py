"""selective_scan's Triton backend in the interpreter."""

from functools import partial

import torch

from hybridzoo.kernels.selective_scan import reference, selective_scan, triton, triton_fwd
from tests.kernels.compare import assert_same, check_backend, pack, run_fwd_bwd
from tests.kernels.interpreted import allow_cpu
from tests.kernels.oracles import naive_selective_scan
from tests.kernels.test_selective_scan import (
    arguments_of,
    check_backward_op,
    check_raw_op,
    check_second_derivative,
    check_split,
    gradients,
    outputs,
    packed_inputs,
    raw_calls,
    scan_inputs,
    small_steps,
)

# b l i g n; lengths round a walk and a tile, channels short of a program's and beyond them, a group
# wider than a block, states that leave a program several blocks
SHAPES = [
    (1, 1, 3, 1, 4),
    (2, 3, 8, 1, 16),
    (1, 4, 5, 1, 5),
    (1, 5, 9, 3, 2),
    (2, 16, 6, 6, 4),
    (2, 17, 22, 2, 3),
    (1, 37, 35, 1, 1),
    (2, 6, 80, 2, 20),
    (1, 5, 9, 1, 70),
]
# an empty one first, last and inside; two that end in a tile of their own; one that is a tile
LENGTHS = [0, 5, 0, 1, 19, 16, 2, 0]

allow_cpu(triton)


SLOW = ("opcheck", "(2, 6, 80, 2, 20)", "(1, 37, 35, 1, 1)", "mixed")


def check(call, dtype=torch.float32):
    """Outputs, final state and every gradient."""
    check_backend(selective_scan, naive_selective_scan, "triton", call, dtype)


def strided():
    """Every input a part of a wider tensor, no two of one stride; a last stride of zero, and two.

    A stride other than one is copied.
    """
    call = scan_inputs((2, 5, 6, 1, 4), torch.float32)
    a = call.arguments
    wide = {n: torch.cat([a[n]] * k, -1) for k, n in enumerate(("x", "dt", "B", "C", "z"), 2)}
    parts = {n: t[..., : a[n].shape[-1]] for n, t in wide.items()}
    columns = {n: a[n].mT.contiguous().mT for n in ("x", "z")}
    want = gradients(call, torch.ones(2, 5, 6), "triton")
    for changed in (parts, columns):
        got = gradients(call.having(**changed), torch.ones(()).expand(2, 5, 6), "triton")
        assert all(map(torch.equal, got, want))


def digits():
    call, truth = small_steps("cpu")
    with torch.no_grad():
        y, _ = triton.run(**call.arguments)
    # the interpreter rounds a fused multiply-add twice
    assert ((y - truth) / truth).abs().max() < 2e-6


def packed(has_state):
    call = scan_inputs((1, sum(LENGTHS), 4, 2, 3), torch.float32, "cpu", has_state, len(LENGTHS))
    check(call.having(cu_seqlens=pack(LENGTHS)))


def nothing():
    """A pack of no sequences, whose weights have gradients of zero."""
    call = scan_inputs((1, 0, 4, 2, 3), torch.float32, has_state=False)
    call = call.having(cu_seqlens=torch.zeros(1, dtype=torch.int32))
    assert_same(run_fwd_bwd(triton.run, call), run_fwd_bwd(reference.run, call), tolerance=0.0)


def stays_in_its_sequence():
    """What is no number, beside a neighbour in one tile."""
    call = scan_inputs((1, 29, 4, 1, 3), torch.float32, n_seqs=2).having(cu_seqlens=pack([21, 8]))
    call.arguments["x"][:, 18] = torch.nan
    got = run_fwd_bwd(triton.run, call)
    assert got["ddt"][:, 18].isnan().all() and not got["ddt"][:, 21:].isnan().any()
    assert not got["dinitial_state"][1].isnan().any()


def mixed():
    """Each gradient has its own input's dtype."""
    half, call = torch.bfloat16, scan_inputs((2, 9, 6, 2, 3), torch.float32)
    call = call.having(**{n: call.arguments[n].to(half) for n in ("x", "B", "z")})
    check(call, half)
    leaves = call.to(None)
    y, final_state = triton.run(**leaves.arguments)
    assert (y.dtype, final_state.dtype) == (half, torch.float32)
    tensors = list(leaves.leaves().values())
    for grad, t in zip(torch.autograd.grad(y.sum(), tensors), tensors, strict=True):
        assert (grad.dtype, grad.shape) == (t.dtype, t.shape)


def checkpoints():
    """With them the outputs are the same, and they are the states of the sequences so far."""
    for call in (scan_inputs((2, 35, 6, 2, 3), torch.float32), packed_inputs(True, torch.float32)):
        given = arguments_of(call)
        y, final_state, found = triton_fwd.launch(given, has_checkpoints=True)
        *plain, none = triton_fwd.launch(given)
        assert all(map(torch.equal, plain, (y, final_state))) and len(none) == 0
        cu, (b, l, _) = call.arguments.get("cu_seqlens"), given.x.shape
        ends = [(row, 0, l) for row in range(b)] if cu is None else [
            (0, first, last) for first, last in zip(cu.tolist(), cu.tolist()[1:], strict=False)
        ]  # fmt: skip
        for sequence, (row, first, last) in enumerate(ends):
            slot = row * (l // triton_fwd.TILE) + first // triton_fwd.TILE + sequence
            for k, end in enumerate(range(first, last, triton_fwd.TILE)):
                names = ("x", "dt", "B", "C", "z")
                along = {n: call.arguments[n][row : row + 1, first:end] for n in names}
                state = call.arguments["initial_state"][sequence : sequence + 1]
                cut = call.having(
                    **along, initial_state=state, cu_seqlens=None, dt_limit=(0.0, 2.0)
                )
                (want,) = outputs(cut, "triton")[1]
                assert torch.equal(found[slot + k], want)


def only_gradients_need_checkpoints():
    known, asked = triton.selective_scan_triton, []

    def scan(*given):
        asked.append(given[-1])
        return known(*given)

    triton.selective_scan_triton = scan
    call = scan_inputs((1, 5, 3, 1, 2), torch.float32)
    triton.run(**call.arguments)
    with torch.no_grad():
        triton.run(**call.to(None).arguments)
    triton.run(**call.to(None).arguments)
    triton.selective_scan_triton = known
    assert asked == [False, False, True]


def compiled():
    call = scan_inputs((2, 5, 6, 2, 4), torch.float32)
    run = torch.compile(triton.run, fullgraph=True, backend="aot_eager")
    assert_same(run_fwd_bwd(run, call), run_fwd_bwd(triton.run, call), tolerance=1e-6)


def variants():
    plain = scan_inputs((1, 18, 5, 1, 3), torch.float32)
    yield "plain", plain
    yield "bare", plain.having(D=None, z=None, dt_bias=None, initial_state=None, dt_softplus=False)
    # some steps lie at either
    yield "limited", plain.having(dt_limit=(0.3, 1.1))
    # without softplus, and with the widest limits, a step may be negative
    dt = -0.1 * plain.arguments["dt"].abs()
    yield "negative", plain.having(dt_softplus=False, dt_bias=None, dt=dt)
    for dt in (-30.0, 30.0):
        raw = plain.arguments["dt"].clone()
        raw[:, ::3] = dt
        yield f"dt {dt}", plain.having(dt=raw)
    yield "empty", scan_inputs((2, 0, 5, 1, 3), torch.float32)


def cases():
    for shape in SHAPES:
        yield f"{shape}", partial(check, scan_inputs(shape, torch.float32))
    for dtype in (torch.bfloat16, torch.float16):
        yield f"{dtype}", partial(check, scan_inputs((1, 21, 6, 1, 4), dtype), dtype)
    for name, call in variants():
        yield name, partial(check, call)
    for case in (
        strided, digits, nothing, stays_in_its_sequence, mixed, checkpoints,
        only_gradients_need_checkpoints, compiled,
    ):  # fmt: skip
        yield case.__name__, case
    for has_state in (False, True):
        yield f"packed {has_state}", partial(packed, has_state)
    for cuts in ((1,), (16,), (3, 18)):
        yield f"split {cuts}", partial(check_split, "triton", (1, 21, 4, 2, 3), cuts, "cpu")
    yield "second derivative", partial(check_second_derivative, "triton", "cpu")
    for call in raw_calls("cpu"):
        forward, backward = triton.selective_scan_triton, triton.selective_scan_triton_backward
        yield "opcheck", partial(check_raw_op, forward, call)
        yield "opcheck", partial(check_backward_op, forward, backward, call)
