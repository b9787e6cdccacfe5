"""compat.causal_conv1d: the convolution in causal-conv1d's layouts, against its formula."""

import itertools

import pytest
import torch

from hybridzoo.compat import causal_conv1d as facade
from hybridzoo.compat.mamba_ssm import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from hybridzoo.errors import BackendError
from tests.compat import oracles
from tests.kernels.compare import Call, assert_same, assert_within, pack, randn, run_fwd_bwd

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
# three documents, padding behind the second; and a row of one
SEQ_IDX = [[0, 0, 0, 1, -1, -1, 2, 2, 2, 2, 2], [3] * 11]


def conv_inputs(b=2, d=6, l=11, w=4, dtype=torch.float64, device="cpu"):
    def made(*shape, seed):
        return randn(*shape, seed=seed, dtype=dtype, device=device)

    return Call(
        {
            "x": made(b, d, l, seed=0),
            "weight": made(d, w, seed=1),
            "bias": made(d, seed=2),
            "initial_states": made(b, d, w - 1, seed=3),
            "return_final_states": True,
            "activation": "silu",
        }
    )


def packed(call, rows, device="cpu"):
    seq_idx = torch.tensor(rows, device=device, dtype=torch.int32)
    return call.having(seq_idx=seq_idx, initial_states=None, return_final_states=False)


def check(function, oracle, call, dtype):
    truth = run_fwd_bwd(oracle, call.to(torch.float64))
    plain = run_fwd_bwd(oracle, call.to(torch.float32))
    plain = {name: t.to(dtype).double() for name, t in plain.items()}
    assert_within(run_fwd_bwd(function, call), plain, truth, dtype)


@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_fn_is_exact_in_float64(activation, options):
    call = conv_inputs().having(activation=activation, return_final_states=options[0])
    call = call.having(bias=call.arguments["bias"] if options[1] else None)
    call = call.having(initial_states=call.arguments["initial_states"] if options[2] else None)
    want = run_fwd_bwd(oracles.conv, call)
    assert_same(run_fwd_bwd(causal_conv1d_fn, call), want)


@each_dtype
@pytest.mark.parametrize("layout", ["time", "channels"])
@pytest.mark.parametrize(("l", "w"), [(1, 4), (2, 4), (129, 3), (65, 2)])
def test_fn_in_each_dtype(l, w, layout, dtype, device):
    call = conv_inputs(2, 37, l, w, dtype, device)
    if layout == "channels":
        call = call.having(x=call.arguments["x"].mT.contiguous().mT)
    check(causal_conv1d_fn, oracles.conv, call, dtype)
    y, final = causal_conv1d_fn(**call.arguments)
    assert (y.dtype, final.dtype) == (dtype, dtype)


def test_final_states_go_where_they_are_wanted():
    call = conv_inputs()
    y, want = causal_conv1d_fn(**call.arguments)
    place = torch.full((2, 6, 6), 7.0, dtype=torch.float64)[:, :, ::2]
    again, given = causal_conv1d_fn(**call.having(final_states_out=place).arguments)
    assert given is place
    assert torch.equal(place, want)
    assert torch.equal(y, again)
    untouched = torch.full((2, 6, 3), 7.0, dtype=torch.float64)
    causal_conv1d_fn(**call.having(final_states_out=untouched, return_final_states=False).arguments)
    assert (untouched == 7).all()


def test_gradients_flow_through_final_states_out():
    call = conv_inputs()

    def into_a_buffer(**arguments):
        place = torch.zeros(2, 6, 3, dtype=torch.float64)
        return causal_conv1d_fn(**arguments, final_states_out=place)

    assert_same(run_fwd_bwd(into_a_buffer, call), run_fwd_bwd(oracles.conv, call))


@pytest.mark.parametrize("rows", [SEQ_IDX, [[5] * 11] * 2, [[*range(11)], [-1] * 11]], ids=str)
def test_packs_are_exact_in_float64(rows):
    call = packed(conv_inputs(), rows)
    want = run_fwd_bwd(oracles.conv, call)
    assert_same(run_fwd_bwd(causal_conv1d_fn, call), want)


@each_dtype
def test_packs_in_each_dtype(dtype, device):
    call = packed(conv_inputs(d=37, dtype=dtype, device=device), SEQ_IDX, device)
    check(causal_conv1d_fn, oracles.conv, call, dtype)


def test_padding_may_hold_anything():
    call = packed(conv_inputs(), SEQ_IDX)
    x = call.arguments["x"].clone()
    x[0, :, 4:6] = torch.nan
    assert torch.equal(
        causal_conv1d_fn(**call.having(x=x).arguments), causal_conv1d_fn(**call.arguments)
    )


def test_a_number_that_comes_back_is_another_sequence():
    """Theirs would let the last taps reach back over the 1."""
    back, other = (packed(conv_inputs(b=1, l=3), [row]) for row in ([0, 1, 0], [0, 1, 2]))
    assert torch.equal(causal_conv1d_fn(**back.arguments), causal_conv1d_fn(**other.arguments))


def update_inputs(l, s, w=4, d=6, dtype=torch.float64, device="cpu", circular=False, slots=True):
    """Of five sequences; `l` None is x without a length."""
    shape = (5, d) if l is None else (5, d, l)
    ints = {"device": device, "dtype": torch.int32}
    return {
        "x": randn(*shape, seed=0, dtype=dtype, device=device),
        "conv_state": randn(7 if slots else 5, d, s, seed=1, dtype=dtype, device=device),
        "weight": randn(d, w, seed=2, dtype=dtype, device=device),
        "bias": randn(d, seed=3, dtype=dtype, device=device),
        "activation": "silu",
        "cache_seqlens": torch.tensor([0, 9, 2, 5, 31], **ints) if circular else None,
        "conv_state_indices": torch.tensor([4, -1, 0, 6, -3], **ints) if slots else None,
    }


def updated(inputs):
    given = inputs["conv_state"]
    # a clone would not keep the strides
    state = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
    state.copy_(given)
    y = causal_conv1d_update(*{**inputs, "conv_state": state}.values())
    assert y.dtype == inputs["x"].dtype
    return {"y": y.detach().cpu().double(), "state": state.cpu().double()}


def wanted(inputs, dtype):
    wide = {k: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t
            for k, t in inputs.items()}  # fmt: skip
    wide["x"] = wide["x"].view(*wide["x"].shape[:2], -1)
    y, state = oracles.conv_update(*wide.values())
    return {"y": y.view(inputs["x"].shape).cpu().double(), "state": state.cpu().double()}


LENGTHS = [None, 1, 2, 7]
SIZES = [3, 4, 6]


@pytest.mark.parametrize("slots", [False, True], ids=["rows", "slots"])
@pytest.mark.parametrize("circular", [False, True], ids=["shifted", "circular"])
@pytest.mark.parametrize("s", SIZES)
@pytest.mark.parametrize("l", LENGTHS)
def test_update_is_exact_in_float64(l, s, circular, slots, device):
    inputs = update_inputs(l, s, circular=circular, slots=slots, device=device)
    assert_same(updated(inputs), wanted(inputs, torch.float64))


@each_dtype
@pytest.mark.parametrize("layout", ["time", "channels"])
@pytest.mark.parametrize("circular", [False, True], ids=["shifted", "circular"])
@pytest.mark.parametrize(("l", "s"), [(None, 3), (1, 4), (5, 4)])
def test_update_in_each_dtype(l, s, circular, layout, dtype, device):
    inputs = update_inputs(l, s, d=37, dtype=dtype, device=device, circular=circular)
    if layout == "channels":
        inputs["conv_state"] = inputs["conv_state"].mT.contiguous().mT
    truth, plain, got = (
        wanted(inputs, torch.float64),
        wanted(inputs, torch.float32),
        updated(inputs),
    )
    # inputs are moved, not computed
    assert torch.equal(got.pop("state"), truth.pop("state"))
    assert_within(got, {"y": plain["y"].to(dtype).double()}, truth, dtype)


@pytest.mark.parametrize("activation", [None, "swish"])
@pytest.mark.parametrize(("l", "circular"), [(None, False), (3, False), (1, True)])
def test_update_takes_each_activation_and_no_bias(activation, l, circular):
    inputs = update_inputs(l, 4, circular=circular) | {"activation": activation, "bias": None}
    assert_same(updated(inputs), wanted(inputs, torch.float64))


@pytest.mark.parametrize(("l", "circular"), [(None, False), (3, False), (1, True)])
def test_negative_rows_touch_nothing(l, circular, device):
    inputs = update_inputs(l, 5, circular=circular, device=device)
    inputs["x"][[1, 4]] = torch.nan
    got = updated(inputs)
    assert torch.equal(got["state"][[1, 2, 3, 5]], inputs["conv_state"][[1, 2, 3, 5]].cpu())
    assert not got["y"][[1, 4]].any()


def test_one_token_of_a_short_state_is_one_op(monkeypatch):
    """A view of the user's state, not a copy, is what the step mutates."""
    seen = []

    def step(x, conv_state, *args, **kwargs):
        seen.append(conv_state)
        return x

    monkeypatch.setattr(facade, "causal_conv1d_step", step)
    monkeypatch.delattr(facade, "read_rows")
    inputs = update_inputs(None, 3)
    causal_conv1d_update(**inputs)
    assert seen[0].shape == (7, 3, 6)
    assert seen[0].data_ptr() == inputs["conv_state"].data_ptr()


def test_update_gives_no_gradient_as_theirs():
    for l in (None, 3):
        inputs = update_inputs(l, 4)
        inputs["weight"].requires_grad_()
        assert not causal_conv1d_update(**inputs).requires_grad


@each_dtype
@pytest.mark.parametrize("state_len", [1, 4, 9])
def test_varlen_states_are_the_last_inputs(state_len, dtype, device):
    lengths = [0, 5, 1, 20, 0]
    x = randn(26, 37, seed=0, dtype=dtype, device=device).requires_grad_()
    states = causal_conv1d_varlen_states(x, pack(lengths, device), state_len)
    want = [
        torch.cat([x.new_zeros(state_len, 37), part])[-state_len:].mT for part in x.split(lengths)
    ]
    want = torch.stack(want)
    assert torch.equal(states, want)
    cotangent = randn(*want.shape, seed=1, dtype=dtype, device=device)
    got, wished = (torch.autograd.grad(s, x, cotangent)[0] for s in (states, want))
    assert torch.equal(got, wished)


def test_varlen_states_of_no_tokens_are_zero():
    states = causal_conv1d_varlen_states(torch.randn(0, 6), pack([0, 0]), 3)
    assert torch.equal(states, torch.zeros(2, 6, 3))


def test_mistakes_are_one_sentence():
    call = conv_inputs()
    message = r"^causal_conv1d_fn: activation 'gelu' is not known; it is None, 'silu' or 'swish'\."
    with pytest.raises(BackendError, match=message):
        causal_conv1d_fn(**call.having(activation="gelu").arguments)
    with pytest.raises(
        BackendError, match=r"^causal_conv1d_update: activation 'gelu' is not known"
    ):
        causal_conv1d_update(**{**update_inputs(None, 4), "activation": "gelu"})
    for name in ("initial_states", "return_final_states"):
        beside = packed(call, SEQ_IDX).having(**{name: call.arguments[name]})
        with pytest.raises(BackendError, match=r"^causal_conv1d_fn: seq_idx beside initial_states"):
            causal_conv1d_fn(**beside.arguments)
    short = (
        r"^causal_conv1d_update: conv_state is \(7, 6, 2\); beside x \(5, 6\) and 4 taps it holds "
        r"3 inputs or more, and 5 rows unless conv_state_indices names them\. Pass one that does\.$"
    )
    with pytest.raises(BackendError, match=short):
        causal_conv1d_update(**update_inputs(None, 2))
    with pytest.raises(BackendError, match=r"conv_state is \(7, 6, 4\); beside x \(5, 6, 3\)"):
        causal_conv1d_update(**{**update_inputs(3, 4), "conv_state_indices": None})


def test_a_refused_update_leaves_the_state():
    for l in (None, 3):
        inputs = update_inputs(l, 9, w=9)
        before = inputs["conv_state"].clone()
        with pytest.raises(BackendError, match="weight is 9 wide; it takes 2 to 8"):
            causal_conv1d_update(**inputs)
        assert torch.equal(inputs["conv_state"], before)
