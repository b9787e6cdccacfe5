"""causal_conv1d_step: every backend against causal_conv1d, a token at a time."""

import pytest
import torch

from hybridzoo.errors import BackendError
from hybridzoo.kernels.causal_conv1d import causal_conv1d
from hybridzoo.kernels.causal_conv1d_step import causal_conv1d_step
from hybridzoo.kernels.dispatch import use
from tests.kernels.compare import assert_within, randn, skip_unless_supported
from tests.kernels.test_causal_conv1d import conv_inputs

SHAPES = [(2, 5, 6, 4), (3, 4, 7, 2), (1, 9, 300, 3), (2, 11, 5, 8)]  # b l i w
POOL = 7


def walk(step, call, slots=None):
    """(y, state) of a sequence fed a token at a time; the state is a pool's if there are slots."""
    arguments = dict(call.arguments)
    x, state = arguments.pop("x"), arguments.pop("initial_state").clone()
    if slots is not None:
        pool = state.new_full((POOL, *state.shape[1:]), 2.0)
        pool[slots.long()] = state
        state = pool
    y = [step(x[:, t], state, slots=slots, **arguments) for t in range(x.shape[1])]
    return torch.stack(y, 1), state


def check_steps(step, shape, dtype, device="cpu", has_slots=False):
    """Outputs within twice the error of one pass, states equal, the pool's other rows untouched."""
    call = conv_inputs(shape, dtype, device)
    slots = torch.tensor([5, 0, 3], device=device)[: shape[0]] if has_slots else None
    y, state = walk(step, call, slots)
    with use(causal_conv1d="reference"):
        truth = causal_conv1d(**call.to(torch.float64).arguments)
        plain = causal_conv1d(**call.to(torch.float32).arguments)
        _, final_state = causal_conv1d(**call.arguments)
    found = [{"y": t.detach().cpu()} for t in (y.double(), plain[0].to(dtype).double(), truth[0])]
    assert_within(*found, dtype)
    if has_slots:
        is_other = torch.ones(POOL, dtype=torch.bool, device=device)
        is_other[slots] = False
        assert (state[is_other] == 2.0).all()
        state = state[slots]
    assert torch.equal(state, final_state)


def skipped_step(backend, call):
    x, state = call.arguments["x"], call.arguments["initial_state"]
    arguments = {"x": x[:, 0], "conv_state": state, "weight": call.arguments["weight"]}
    skip_unless_supported(causal_conv1d_step, backend, call.__class__(arguments))

    def step(*args, **kwargs):
        with use(causal_conv1d_step=backend):
            return causal_conv1d_step(*args, **kwargs)

    return step


@pytest.mark.parametrize("has_slots", [False, True], ids=["rows", "slots"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "b{}-l{}-i{}-w{}".format(*s))
@pytest.mark.parametrize("backend", causal_conv1d_step.op.backends)
def test_steps_are_the_sequence(backend, shape, dtype, has_slots, device):
    step = skipped_step(backend, conv_inputs(shape, dtype, device))
    check_steps(step, shape, dtype, device, has_slots)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", causal_conv1d_step.op.backends)
def test_negative_slots_write_nothing(backend, index, device):
    call = conv_inputs((4, 1, 6, 4), torch.float32, device)
    check_negative_slots(skipped_step(backend, call), index, device)


def check_negative_slots(step, index, device="cpu"):
    # row 0 is a sequence's: what a negative slot is clamped to must not undo it
    slots = torch.tensor([-1, 0, -7, 4], device=device, dtype=index)
    pool = randn(POOL, 3, 6, seed=4, device=device)
    x, weight = randn(4, 6, seed=5, device=device), randn(6, 4, seed=6, device=device)
    want = pool.clone()
    want[[0, 4], :2], want[[0, 4], 2] = pool[[0, 4], 1:], x[[1, 3]]
    alone, bias = pool[[0, 4]], randn(6, seed=7, device=device)
    y = step(x, pool, weight, bias, activation="silu", slots=slots)
    assert torch.equal(pool, want)
    assert (y[[0, 2]] == 0).all()
    assert torch.equal(y[[1, 3]], step(x[[1, 3]], alone, weight, bias, activation="silu"))


@pytest.mark.parametrize("backend", causal_conv1d_step.op.backends)
def test_views_are_read_and_written_in_place(backend, device):
    call = conv_inputs((2, 1, 6, 4), torch.bfloat16, device)
    check_views(skipped_step(backend, call), device)


def check_views(step, device="cpu"):
    """x and the state are strided, rows and channels alike; the state is wider than x."""
    x = randn(3, 20, seed=0, dtype=torch.bfloat16, device=device)[:, 3:15:2]
    wide = randn(3, 2, 5, 12, seed=1, device=device)
    state, weight = wide[:, 1, 1:4, ::2], randn(6, 4, seed=2, device=device)
    kept, copy = wide.clone(), state.contiguous()
    y = step(x, state, weight)
    assert torch.equal(y, step(x.contiguous(), copy, weight))
    assert torch.equal(state, copy)
    wide[:, 1, 1:4, ::2] = kept[:, 1, 1:4, ::2]
    assert torch.equal(wide, kept)


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    pool = torch.zeros(180_000, 3, 4096, device="cuda", dtype=torch.bfloat16)
    x = randn(2, 4096, seed=0, dtype=torch.bfloat16, device="cuda")
    weight = randn(4096, 4, seed=1, device="cuda")
    slots = torch.tensor([179_999, 1], device="cuda")
    y = causal_conv1d_step(x, pool, weight, slots=slots)
    assert torch.equal(pool[slots, 2], x)
    assert torch.equal(pool.count_nonzero(), x.count_nonzero())
    torch.testing.assert_close(y.float(), x.float() * weight[:, 3], rtol=2**-7, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", causal_conv1d_step.op.backends)
def test_cuda_graphs_hold_the_step(backend):
    """Captured, it reads slots as they are at each replay, and never waits for the host."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    x, pool = randn(3, 264, seed=0, device="cuda"), randn(POOL, 3, 264, seed=1, device="cuda")
    weight, slots = randn(264, 4, seed=2, device="cuda"), torch.tensor([2, -1, 0], device="cuda")
    kept, twin, graph = pool.clone(), pool.clone(), torch.cuda.CUDAGraph()
    with use(causal_conv1d_step=backend):
        causal_conv1d_step(x, pool, weight, slots=slots)
        with torch.cuda.graph(graph):
            y = causal_conv1d_step(x, pool, weight, slots=slots)
        pool.copy_(kept)
        slots.copy_(torch.tensor([-1, 5, 6]))
        graph.replay()
        assert torch.equal(y, causal_conv1d_step(x, twin, weight, slots=slots))
    assert torch.equal(pool, twin)


def test_compiled_graphs_hold_the_step():
    x, weight = randn(2, 6, seed=0), randn(6, 4, seed=1)
    state, twin = (randn(2, 3, 6, seed=2) for _ in range(2))
    compiled = torch.compile(
        lambda x, state: causal_conv1d_step(x, state, weight), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x, state), causal_conv1d_step(x, twin, weight))
    assert torch.equal(state, twin)


def test_gradients_are_refused_while_they_are_on():
    x, state, weight = torch.ones(2, 6), torch.ones(2, 3, 6), torch.ones(6, 4, requires_grad=True)
    with pytest.raises(BackendError, match="weight requires a gradient; a step in place has none"):
        causal_conv1d_step(x, state, weight)
    with torch.no_grad():
        assert causal_conv1d_step(x, state, weight).unique().tolist() == [4.0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.ones(6, 9)}, "weight is 9 wide; it takes 2 to 8"),
        ({"activation": "gelu"}, "'gelu' is neither None nor 'silu'"),
        ({"conv_state": torch.ones(3, 3, 6)}, "conv_state has 3 rows, x has 2; without slots"),
    ],
    ids=["width", "activation", "rows"],
)
def test_what_the_contract_excludes_is_refused(changed, message):
    given = {"x": torch.ones(2, 6), "conv_state": torch.ones(2, 3, 6), "weight": torch.ones(6, 4)}
    with pytest.raises(BackendError, match=message):
        causal_conv1d_step(**{**given, **changed})
