"""selective_scan_step: every backend against the scan of one token, and what it does to a pool."""

import pytest
import torch

from hybridzoo.errors import BackendError
from hybridzoo.kernels.dispatch import use
from hybridzoo.kernels.selective_scan import selective_scan
from hybridzoo.kernels.selective_scan_step import selective_scan_step
from tests.kernels.compare import Call, assert_within, randn, skip_unless_supported
from tests.kernels.oracles import naive_selective_scan

# b i g n; a width below, at and above a program's; states short of a power of two
SHAPES = [(1, 5, 1, 5), (3, 37, 1, 16), (2, 64, 2, 16), (5, 18, 3, 64)]
# two of five rows dropped, the others in another order than the pool's
SLOTS = [4, -1, 0, 6, -3]


def step_inputs(shape, dtype=torch.float64, device="cpu", slots=None):
    b, i, g, n = shape
    wide = torch.promote_types(dtype, torch.float32)

    def made(*size, seed, dtype=dtype):
        return randn(*size, seed=seed, dtype=dtype, device=device)

    return Call(
        {
            "x": made(b, i, seed=0),
            "ssm_state": made(b if slots is None else 7, i, n, seed=8, dtype=wide),
            "dt": made(b, i, seed=1),
            "A": -made(i, n, seed=2, dtype=wide).exp(),
            "B": made(b, g, n, seed=3),
            "C": made(b, g, n, seed=4),
            "D": made(i, seed=5, dtype=wide),
            "z": made(b, i, seed=6),
            "dt_bias": made(i, seed=7, dtype=wide),
            "dt_softplus": True,
            "slots": None if slots is None else torch.tensor(slots, device=device),
        }
    )


def scanned(scan, ssm_state, slots=None, A_is_log=False, **arguments):
    """y and the pool after one token, by a scan of a sequence of one."""
    along = {k: arguments[k] for k in ("x", "dt", "B", "C", "z")}
    along = {k: None if t is None else t[:, None] for k, t in along.items()}
    if A_is_log:
        arguments["A"] = -arguments["A"].exp()
    real = list(range(len(ssm_state))) if slots is None else [s for s in slots.tolist() if s >= 0]
    rows = [row for row, s in enumerate(real if slots is None else slots.tolist()) if s >= 0]
    y, pool = torch.zeros_like(arguments["x"]), ssm_state.clone()
    along = {k: None if t is None else t[rows] for k, t in along.items()}
    y_real, after = scan(**{**arguments, **along, "initial_state": ssm_state[real]})
    y[rows], pool[real] = y_real[:, 0], after.to(pool.dtype)
    return {"y": y.double().cpu(), "ssm_state": pool.double().cpu()}


def stepped(call, backend=None, run=None):
    given = call.arguments["ssm_state"]
    # a clone would not keep the strides
    pool = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
    pool.copy_(given)
    run = run or selective_scan_step
    with torch.no_grad(), use(**({selective_scan_step.op.name: backend} if backend else {})):
        y = run(**call.having(ssm_state=pool).arguments)
    return {"y": y.double().cpu(), "ssm_state": pool.double().cpu()}


def check(call, dtype, backend=None, run=None):
    """Within twice the error of the scan's reference in the same dtype."""
    with torch.no_grad():
        truth = scanned(naive_selective_scan, **call.to(torch.float64).arguments)
        with use(selective_scan="reference"):
            same = scanned(selective_scan, **call.to(torch.float32).arguments)
    state_dtype = call.arguments["ssm_state"].dtype
    for name, rounded in (("y", dtype), ("ssm_state", state_dtype)):
        part = {name: same[name].to(rounded).double()}
        got = {name: stepped(call, backend, run)[name]}
        assert_within(got, part, {name: truth[name]}, rounded)


def variants(call):
    """The same call with each option changed."""
    bare = {"D": None, "z": None, "dt_bias": None, "dt_softplus": False}
    a = call.arguments
    yield "plain", call
    yield "bare", call.having(**bare)
    yield "limits", call.having(dt_limit=(0.3, 1.1))
    yield "log", call.having(A=(-a["A"]).log(), A_is_log=True)
    for dt in (-30.0, 30.0):
        yield f"dt {dt}", call.having(dt=torch.full_like(a["dt"], dt))
    for dtype in (torch.bfloat16, torch.float16):
        yield f"state {dtype}", call.having(ssm_state=a["ssm_state"].to(dtype))
    # parts of wider tensors, no two of one stride
    names = ("x", "ssm_state", "dt", "A", "B", "C", "z")
    wide = {name: torch.cat([a[name]] * k, -1) for k, name in enumerate(names, 2)}
    yield "strided", call.having(**{n: t[..., : a[n].shape[-1]] for n, t in wide.items()})
    yield "transposed", call.having(x=a["x"].mT.contiguous().mT, A=a["A"].mT.contiguous().mT)


every_backend = pytest.mark.parametrize("backend", selective_scan_step.op.backends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "b{}-i{}-g{}-n{}".format(*s))
@every_backend
def test_backend_is_one_token_of_the_scan(backend, shape, dtype, device):
    call = step_inputs(shape, dtype, device)
    skip_unless_supported(selective_scan_step, backend, call)
    check(call, dtype, backend)


@pytest.mark.parametrize("variant", [name for name, _ in variants(step_inputs((5, 18, 3, 5)))])
@every_backend
def test_options_are_those_of_the_scan(backend, variant, device):
    call = step_inputs((5, 18, 3, 5), torch.float32, device, SLOTS)
    skip_unless_supported(selective_scan_step, backend, call)
    check(dict(variants(call))[variant], torch.float32, backend)


@pytest.mark.parametrize("slots", [SLOTS, [-1, -2], [0, 2]], ids=str)
@every_backend
def test_negative_slots_touch_nothing(backend, slots, device):
    call = step_inputs((len(slots), 18, 3, 16), torch.float32, device, slots)
    skip_unless_supported(selective_scan_step, backend, call)
    check(call, torch.float32, backend)
    got, before = stepped(call, backend), call.arguments["ssm_state"].double().cpu()
    others = sorted(set(range(7)) - set(slots))
    assert torch.equal(got["ssm_state"][others], before[others])
    assert not got["y"][[s < 0 for s in slots]].any()


@every_backend
def test_a_dropped_row_may_hold_anything(backend, device):
    call = step_inputs((5, 18, 3, 16), torch.float32, device, SLOTS)
    skip_unless_supported(selective_scan_step, backend, call)
    x = call.arguments["x"].clone()
    x[[1, 4]] = torch.nan
    got, want = stepped(call.having(x=x), backend), stepped(call, backend)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_reference_is_exact_in_float64():
    for name, call in variants(step_inputs((5, 18, 3, 5), slots=SLOTS)):
        if not name.startswith("state"):
            want = scanned(naive_selective_scan, **call.having(dt_softplus=True).arguments)
            got = stepped(call.having(dt_softplus=True))
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, msg=name)


@every_backend
def test_five_runs_give_the_same_bits(backend, device):
    call = step_inputs((5, 300, 3, 16), torch.bfloat16, device, SLOTS)
    skip_unless_supported(selective_scan_step, backend, call)
    first = stepped(call, backend)
    for _ in range(4):
        assert all(torch.equal(t, first[name]) for name, t in stepped(call, backend).items())


@every_backend
def test_compiled_graphs_hold_the_step_whole(backend, device):
    call = step_inputs((5, 18, 3, 16), torch.bfloat16, device, SLOTS)
    skip_unless_supported(selective_scan_step, backend, call)
    compiled = torch.compile(selective_scan_step, fullgraph=True, backend="aot_eager")
    got, want = stepped(call, backend, compiled), stepped(call, backend)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.gpu
@every_backend
def test_a_captured_step_replays(backend):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: a CUDA graph cannot be captured")
    call = step_inputs((5, 300, 3, 16), torch.bfloat16, "cuda", SLOTS)
    skip_unless_supported(selective_scan_step, backend, call)
    want, pool = stepped(call, backend), call.arguments["ssm_state"]
    before, held = pool.clone(), call.having(ssm_state=pool)
    with torch.no_grad(), use(selective_scan_step=backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            selective_scan_step(**held.arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = selective_scan_step(**held.arguments)
        pool.copy_(before)
        graph.replay()
    assert torch.equal(y.double().cpu(), want["y"])
    assert torch.equal(pool.double().cpu(), want["ssm_state"])


def check_raw_op(op, call):
    """torch's own checks of an op with the signature of the Triton one."""
    names = ("x", "ssm_state", "dt", "A", "B", "C", "D", "z", "dt_bias", "slots")
    pool = call.arguments["ssm_state"].clone()
    given = call.having(ssm_state=pool).arguments
    torch.library.opcheck(op, (*(given[n] for n in names), True, 0.0, 2.0, False))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", sorted({*selective_scan_step.op.backends} - {"reference"}))
def test_raw_launches_are_proper_ops(backend):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    call = step_inputs((5, 18, 3, 16), torch.bfloat16, "cuda", SLOTS)
    skip_unless_supported(selective_scan_step, backend, call)
    check_raw_op(getattr(torch.ops.hybridzoo, f"selective_scan_step_{backend}").default, call)


@pytest.mark.gpu
@every_backend
def test_pools_pass_2_to_the_31_elements(backend):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    call = step_inputs((2, 4096, 1, 16), torch.float32, "cuda", [0, 1])
    skip_unless_supported(selective_scan_step, backend, call)
    pool = torch.zeros(33000, 4096, 16, device="cuda", dtype=torch.bfloat16)
    small = call.arguments["ssm_state"][:2].bfloat16()
    slots = torch.tensor([32999, 3], device="cuda")
    pool[slots] = small
    want = stepped(call.having(ssm_state=small), backend)
    with torch.no_grad(), use(selective_scan_step=backend):
        y = selective_scan_step(**call.having(ssm_state=pool, slots=slots).arguments)
    assert torch.equal(y.double().cpu(), want["y"])
    assert torch.equal(pool[slots].double().cpu(), want["ssm_state"])
    assert not pool[4:32999].any()


def test_rows_that_do_not_fit_are_refused():
    call = step_inputs((3, 4, 1, 2))
    call = call.having(ssm_state=call.arguments["ssm_state"][:2])
    with pytest.raises(BackendError, match="ssm_state has 2 rows for 3 sequences; without slots"):
        selective_scan_step(**call.arguments)


def test_gradients_are_refused():
    call = step_inputs((3, 4, 1, 2)).to(torch.float64)
    with pytest.raises(
        BackendError, match="an input requires a gradient; a step in place has none"
    ):
        selective_scan_step(**call.arguments)
