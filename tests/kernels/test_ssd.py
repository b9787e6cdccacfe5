"""ssd: every backend against a step-by-step oracle: outputs, all gradients, final state."""

import pytest
import torch

from hybridzoo.errors import BackendError
from hybridzoo.kernels.ssd import ssd
from tests.kernels.compare import (
    Call,
    assert_same,
    assert_within,
    check_backend,
    pack,
    randn,
    run_fwd_bwd,
)
from tests.kernels.oracles import naive_ssd

# b l h p g n chunk; 97: ragged tail
SHAPES = [(1, 16, 1, 8, 1, 4, 16), (2, 64, 4, 6, 2, 8, 16), (3, 97, 6, 8, 3, 16, 32)]
LENGTHS = [0, 5, 0, 1, 31, 2, 64, 0]


def ssd_inputs(shape, dtype=torch.float64, device="cpu", has_state=True, n_seqs=None):
    b, l, h, p, g, n, chunk_size = shape
    wide = torch.promote_types(dtype, torch.float32)

    def made(*size, seed, dtype=dtype):
        return randn(*size, seed=seed, dtype=dtype, device=device)

    return Call(
        {
            "x": made(b, l, h, p, seed=0),
            "dt": made(b, l, h, seed=1),
            "A": -made(h, seed=2, dtype=wide).exp(),
            "B": made(b, l, g, n, seed=3),
            "C": made(b, l, g, n, seed=4),
            "D": made(h, seed=5, dtype=wide),
            "z": made(b, l, h, p, seed=6),
            "dt_bias": made(h, seed=7, dtype=wide),
            "dt_softplus": True,
            "chunk_size": chunk_size,
            "initial_state": made(n_seqs or b, h, p, n, seed=8, dtype=wide) if has_state else None,
        }
    )


def packed_inputs(lengths, has_state=True, chunk_size=16):
    shape = (1, sum(lengths), 4, 3, 2, 5, chunk_size)
    call = ssd_inputs(shape, has_state=has_state, n_seqs=len(lengths))
    return call.having(cu_seqlens=pack(lengths))


@pytest.mark.parametrize("has_state", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "b{}-l{}-h{}-p{}-g{}-n{}-q{}".format(*s))
@pytest.mark.parametrize("backend", ssd.op.backends)
def test_backend_is_the_recurrence(backend, shape, dtype, has_state, device):
    call = ssd_inputs(shape, dtype, device, has_state)
    check_backend(ssd, naive_ssd, backend, call, dtype)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 97])
def test_reference_is_exact_in_float64(length):
    call = ssd_inputs((2, length, 4, 3, 2, 5, 16))
    assert_same(run_fwd_bwd(ssd, call), run_fwd_bwd(naive_ssd, call))


def test_skip_weight_may_differ_by_channel():
    call = ssd_inputs((2, 9, 4, 3, 2, 5, 4)).having(D=randn(4, 3, seed=5, dtype=torch.float64))
    assert_same(run_fwd_bwd(ssd, call), run_fwd_bwd(naive_ssd, call))


def test_chunk_size_is_not_part_of_the_function():
    call = ssd_inputs((2, 37, 4, 3, 2, 5, 128))
    want = run_fwd_bwd(ssd, call)
    for chunk_size in (1, 3, 16, 37):
        assert_same(run_fwd_bwd(ssd, call.having(chunk_size=chunk_size)), want)


@pytest.mark.parametrize("has_state", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("lengths", [LENGTHS, [103], [1, 1, 1], [16, 32, 16]], ids=str)
def test_packed_is_separate(lengths, has_state):
    call = packed_inputs(lengths, has_state)
    assert_same(run_fwd_bwd(ssd, call), run_fwd_bwd(naive_ssd, call))


@pytest.mark.parametrize("cuts", [(1,), (16,), (8, 9), (1, 2, 3, 30)], ids=str)
def test_state_carries_a_split_sequence(cuts):
    call = ssd_inputs((2, 37, 4, 3, 2, 5, 8))

    def in_pieces(**arguments):
        state, y = arguments.pop("initial_state"), []
        for start, end in zip((0, *cuts), (*cuts, 37), strict=True):
            along = {k: arguments[k][:, start:end] for k in ("x", "dt", "B", "C", "z")}
            part, state = ssd(**{**arguments, **along, "initial_state": state})
            y.append(part)
        return torch.cat(y, 1), state

    assert_same(run_fwd_bwd(in_pieces, call), run_fwd_bwd(ssd, call))


@pytest.mark.parametrize(
    "call",
    [
        ssd_inputs((2, 7, 2, 2, 1, 2, 3)),
        ssd_inputs((1, 7, 2, 1, 2, 2, 4)).having(dt_limit=(0.3, 1.5), z=None),
        ssd_inputs((1, 9, 2, 1, 1, 2, 3), n_seqs=4).having(cu_seqlens=pack([4, 0, 1, 4])),
    ],
    ids=["all", "limits", "packed"],
)
def test_gradients_are_the_derivatives(call):
    call = call.to(torch.float64)
    leaves = call.leaves()

    def function(*tensors):
        return ssd(**call.having(**dict(zip(leaves, tensors, strict=True))).arguments)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), atol=1e-6)


@pytest.mark.parametrize("dt_softplus", [False, True], ids=["raw", "softplus"])
def test_steps_are_clamped_after_softplus(dt_softplus):
    call = ssd_inputs((2, 9, 4, 3, 2, 5, 4)).having(dt_limit=(0.3, 1.1), dt_softplus=dt_softplus)
    assert_same(run_fwd_bwd(ssd, call), run_fwd_bwd(naive_ssd, call))


def test_softplus_is_exact_at_large_steps():
    """A softplus that turns linear at 20 is 2e-9 off there."""
    call = ssd_inputs((2, 9, 4, 3, 2, 5, 4))
    call = call.having(dt=call.arguments["dt"] + 20.0, A=call.arguments["A"] * 0.01)
    assert_same(run_fwd_bwd(ssd, call), run_fwd_bwd(naive_ssd, call), 1e-10)


@pytest.mark.parametrize("dt", [-30.0, 30.0], ids=["frozen", "forgetting"])
def test_extreme_steps_stay_finite_and_right(dt):
    call = ssd_inputs((1, 64, 4, 3, 2, 8, 32), torch.float32)
    raw = call.arguments["dt"].clone()
    raw[:, ::3] = dt
    call = call.having(dt=raw, A=call.arguments["A"] * 10)
    truth = run_fwd_bwd(naive_ssd, call.to(torch.float64))
    same_dtype = run_fwd_bwd(naive_ssd, call)
    assert_within(run_fwd_bwd(ssd, call), same_dtype, truth, torch.float32)


def test_gentle_steps_after_forgetting_ones_keep_their_precision():
    """Differences of prefix sums lose five digits here; sums of the steps between lose none."""
    call = ssd_inputs((1, 128, 2, 3, 1, 4, 128), torch.float32)
    raw = call.arguments["dt"] * 0.1 - 4.0
    raw[:, :100] = 30.0
    call = call.having(dt=raw, A=torch.tensor([-16.0, -8.0]), D=None, dt_bias=None)
    truth = run_fwd_bwd(naive_ssd, call.to(torch.float64))
    same_dtype = run_fwd_bwd(naive_ssd, call)
    assert_within(run_fwd_bwd(ssd, call), same_dtype, truth, torch.float32)


@pytest.mark.parametrize("length", [0, 1])
def test_final_state_is_no_alias(length):
    call = ssd_inputs((2, length, 4, 3, 2, 5, 16))
    _, final_state = ssd(**call.arguments)
    before = call.arguments["initial_state"].clone()
    final_state.add_(1.0)
    assert torch.equal(call.arguments["initial_state"], before)
    if length == 0:
        assert torch.equal(final_state, before + 1.0)


def test_states_are_wide_and_outputs_are_not():
    y, final_state = ssd(**ssd_inputs((1, 3, 2, 1, 1, 2, 16), torch.bfloat16).arguments)
    assert (y.dtype, final_state.dtype) == (torch.bfloat16, torch.float32)


def test_pack_of_two_rows_is_refused():
    call = ssd_inputs((2, 8, 2, 1, 1, 2, 16)).having(cu_seqlens=pack([3, 5]))
    with pytest.raises(BackendError, match="ssd: x has 2 rows with cu_seqlens"):
        ssd(**call.arguments)
