"""causal_conv1d: every backend against torch's own depthwise convolution."""

import pytest
import torch

from hybridzoo.errors import BackendError
from hybridzoo.kernels.causal_conv1d import causal_conv1d
from hybridzoo.kernels.dispatch import use
from tests.kernels.compare import (
    Call,
    assert_same,
    check_backend,
    pack,
    randn,
    run_fwd_bwd,
    skip_unless_supported,
)
from tests.kernels.oracles import naive_conv

SHAPES = [(1, 16, 8, 4), (2, 97, 6, 4), (2, 5, 3, 2), (1, 3, 5, 8)]  # b l i w; 3 < 8 - 1
LENGTHS = [0, 5, 0, 1, 31, 2, 20, 0]
# longer than what a program of a backward takes at least, and as short as a tap
LONG_LENGTHS = [70, 0, 1, 2, 3, 64, 33, 129]


def conv_inputs(shape, dtype=torch.float64, device="cpu", has_state=True, n_seqs=None):
    b, l, i, w = shape

    def made(*size, seed):
        return randn(*size, seed=seed, dtype=dtype, device=device)

    return Call(
        {
            "x": made(b, l, i, seed=0),
            "weight": made(i, w, seed=1),
            "bias": made(i, seed=2),
            "activation": "silu",
            "initial_state": made(n_seqs or b, w - 1, i, seed=3) if has_state else None,
        }
    )


@pytest.mark.parametrize("has_state", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "b{}-l{}-i{}-w{}".format(*s))
@pytest.mark.parametrize("backend", causal_conv1d.op.backends)
def test_backend_is_the_convolution(backend, shape, dtype, has_state, device):
    call = conv_inputs(shape, dtype, device, has_state)
    check_backend(causal_conv1d, naive_conv, backend, call, dtype)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("d_conv", [2, 3, 4, 8])
def test_reference_is_exact_in_float64(d_conv, activation):
    call = conv_inputs((2, 11, 3, d_conv)).having(activation=activation)
    assert_same(run_fwd_bwd(causal_conv1d, call), run_fwd_bwd(naive_conv, call))


def test_no_bias_is_a_zero_bias():
    call = conv_inputs((2, 11, 3, 4))
    zero = causal_conv1d(**call.having(bias=torch.zeros(3, dtype=torch.float64)).arguments)
    none = causal_conv1d(**call.having(bias=None).arguments)
    assert torch.equal(zero[0], none[0])


@pytest.mark.parametrize("has_state", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("d_conv", [2, 4, 8])
def test_packed_is_separate(d_conv, has_state):
    shape = (1, sum(LENGTHS), 3, d_conv)
    call = conv_inputs(shape, has_state=has_state, n_seqs=len(LENGTHS))
    call = call.having(cu_seqlens=pack(LENGTHS))
    assert_same(run_fwd_bwd(causal_conv1d, call), run_fwd_bwd(naive_conv, call))


@pytest.mark.parametrize("has_state", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("d_conv", [2, 3, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, LONG_LENGTHS], ids=["short", "long"])
@pytest.mark.parametrize("backend", causal_conv1d.op.backends)
def test_backend_packs(backend, lengths, d_conv, dtype, has_state, device):
    shape = (1, sum(lengths), 264, d_conv)
    call = conv_inputs(shape, dtype, device, has_state, len(lengths))
    call = call.having(cu_seqlens=pack(lengths, device))
    check_backend(causal_conv1d, naive_conv, backend, call, dtype)


@pytest.mark.parametrize("backend", causal_conv1d.op.backends)
def test_backend_takes_views_and_repeats_itself(backend, device):
    """x is the first half of a projection; rows enough for every size of a program."""
    for length in (3, 700, 9000):
        both = randn(2, length, 2 * 1032, seed=0, dtype=torch.bfloat16, device=device)
        call = conv_inputs((2, 1, 1032, 4), torch.bfloat16, device).having(x=both[..., :1032])
        skip_unless_supported(causal_conv1d, backend, call)
        with use(causal_conv1d=backend):
            want = causal_conv1d(**call.having(x=both[..., :1032].contiguous()).arguments)
            for _ in range(5):
                assert all(map(torch.equal, causal_conv1d(**call.arguments), want))


@pytest.mark.parametrize("backend", causal_conv1d.op.backends)
def test_gradients_of_views_repeat_themselves(backend, device):
    """x and dy are halves of something wider; dy is also one number that is expanded."""
    for length in (3, 700):
        both = randn(4, length, 2 * 264, seed=0, dtype=torch.bfloat16, device=device)
        x, dy = both[:2, :, :264], both[2:, :, 264:]
        call = conv_inputs((2, 1, 264, 4), torch.bfloat16, device).having(x=x)
        skip_unless_supported(causal_conv1d, backend, call)
        leaves = call.leaves()

        def gradients(dy, call=call, names=tuple(leaves)):
            given = {n: call.arguments[n].detach().requires_grad_() for n in names}
            with use(causal_conv1d=backend):
                y, _ = causal_conv1d(**call.having(**given).arguments)
            return torch.autograd.grad(y, tuple(given.values()), dy)

        for given in (dy, dy[:1, :1, :1].expand(dy.shape)):
            want = gradients(given.contiguous(), call.having(x=x.contiguous()))
            for _ in range(5):
                assert all(map(torch.equal, gradients(given), want))


@pytest.mark.parametrize("backend", causal_conv1d.op.backends)
def test_backend_carries_gradients_through_a_split(backend, device):
    call = conv_inputs((2, 301, 136, 4), torch.float32, device)
    skip_unless_supported(causal_conv1d, backend, call)

    def in_two(**arguments):
        x, state, y = arguments.pop("x"), arguments.pop("initial_state"), []
        for part in x.split([130, 171], 1):
            part, state = causal_conv1d(part, initial_state=state, **arguments)
            y.append(part)
        return torch.cat(y, 1), state

    with use(causal_conv1d=backend):
        # sums of 602 terms of size one, in fp32 and in another order
        got, want = run_fwd_bwd(in_two, call), run_fwd_bwd(causal_conv1d, call)
    assert_same(got, want, tolerance=1e-4)


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    shape = (3, 2**18, 4096, 4)
    call = conv_inputs((3, 1, 4096, 4), torch.bfloat16, "cuda")
    x = torch.randn(shape[:3], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y, final_state = causal_conv1d(**call.having(x=x).arguments)
    dy = torch.randn(shape[:3], device="cuda", dtype=torch.bfloat16)
    (dx,) = torch.autograd.grad(y, x, dy)
    x, some = x.detach(), x.detach()[2:, -8:].clone().requires_grad_()
    with use(causal_conv1d="reference"):
        tail = {"x": some, "initial_state": x[2:, -11:-8]}
        want = causal_conv1d(**call.having(**tail).arguments)
    torch.testing.assert_close(y[2:, -8:], want[0], rtol=2**-7, atol=1e-5)
    assert torch.equal(final_state[2:], want[1])
    # what reaches these rows comes from no other; each side rounds once, some to either side
    (want,) = torch.autograd.grad(want[0], some, dy[2:, -8:])
    torch.testing.assert_close(dx[2:, -8:], want, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("cuts", [(1,), (2, 3, 4), (5,), (1, 10)], ids=str)
def test_state_carries_a_split_sequence(cuts):
    call = conv_inputs((2, 11, 3, 4))

    def in_pieces(**arguments):
        x, state, y = arguments.pop("x"), arguments.pop("initial_state"), []
        for start, end in zip((0, *cuts), (*cuts, 11), strict=True):
            part, state = causal_conv1d(x[:, start:end], initial_state=state, **arguments)
            y.append(part)
        return torch.cat(y, 1), state

    assert_same(run_fwd_bwd(in_pieces, call), run_fwd_bwd(causal_conv1d, call))


def test_gradients_are_the_derivatives():
    call = conv_inputs((1, 9, 2, 3), n_seqs=4).having(cu_seqlens=pack([4, 0, 1, 4]))
    call = call.to(torch.float64)
    leaves = call.leaves()

    def function(*tensors):
        return causal_conv1d(**call.having(**dict(zip(leaves, tensors, strict=True))).arguments)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("length", [0, 1, 9])
def test_final_state_is_the_last_inputs_and_no_alias(length):
    call = conv_inputs((2, length, 3, 4), torch.bfloat16)
    _, final_state = causal_conv1d(**call.arguments)
    x, state = call.arguments["x"], call.arguments["initial_state"]
    assert torch.equal(final_state, torch.cat([state, x], 1)[:, -3:])
    # its own memory and no more: a view would keep a whole prompt alive
    assert final_state.untyped_storage().nbytes() == final_state.nbytes
    assert final_state.untyped_storage().data_ptr() not in (
        x.untyped_storage().data_ptr(),
        state.untyped_storage().data_ptr(),
    )


def test_widths_and_activations_outside_the_contract_are_refused():
    call = conv_inputs((1, 5, 3, 9))
    with pytest.raises(BackendError, match="weight is 9 wide; it takes 2 to 8"):
        causal_conv1d(**call.arguments)
    call = conv_inputs((1, 5, 3, 4)).having(activation="gelu")
    with pytest.raises(BackendError, match="'gelu' is neither None nor 'silu'"):
        causal_conv1d(**call.arguments)
