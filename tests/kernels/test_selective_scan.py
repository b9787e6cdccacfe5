"""selective_scan: every backend against a step-by-step oracle, and the adjoint against numbers."""

import functools
import time
from math import inf
from types import SimpleNamespace

import pytest
import torch

from hybridzoo.errors import BackendError
from hybridzoo.kernels.dispatch import use
from hybridzoo.kernels.selective_scan import backward, cuda, reference, selective_scan
from tests.kernels import sass
from tests.kernels.compare import (
    Call,
    assert_same,
    assert_within,
    check_backend,
    pack,
    randn,
    run_fwd_bwd,
    skip_unless_supported,
)
from tests.kernels.oracles import naive_selective_scan

# b l i g n; 97 and 301: no multiple of a run or a block, 301 more than one block
SHAPES = [(1, 16, 8, 1, 4), (2, 97, 6, 3, 5), (1, 301, 4, 2, 16), (2, 2, 3, 1, 2)]
# an empty one first, last and inside; one token; one that fills a block's edge
LENGTHS = [0, 5, 0, 1, 31, 2, 20, 0]

every_backend = pytest.mark.parametrize("backend", selective_scan.op.backends)
compiled_backends = sorted(set(selective_scan.op.backends) - {"reference"})


def scan_inputs(shape, dtype=torch.float64, device="cpu", has_state=True, n_seqs=None):
    b, l, i, g, n = shape
    wide = torch.promote_types(dtype, torch.float32)

    def made(*size, seed, dtype=dtype):
        return randn(*size, seed=seed, dtype=dtype, device=device)

    return Call(
        {
            "x": made(b, l, i, seed=0),
            "dt": made(b, l, i, seed=1),
            "A": -made(i, n, seed=2, dtype=wide).exp(),
            "B": made(b, l, g, n, seed=3),
            "C": made(b, l, g, n, seed=4),
            "D": made(i, seed=5, dtype=wide),
            "z": made(b, l, i, seed=6),
            "dt_bias": made(i, seed=7, dtype=wide),
            "dt_softplus": True,
            "initial_state": made(n_seqs or b, i, n, seed=8, dtype=wide) if has_state else None,
        }
    )


def packed_inputs(has_state=True, dtype=torch.float64, device="cpu"):
    shape = (1, sum(LENGTHS), 4, 2, 3)
    call = scan_inputs(shape, dtype, device, has_state, n_seqs=len(LENGTHS))
    return call.having(cu_seqlens=pack(LENGTHS, device))


def in_pieces(cuts, **arguments):
    """The scan of a sequence cut at these places, each piece from the state before it."""
    state, y, length = arguments.pop("initial_state"), [], arguments["x"].shape[1]
    for start, end in zip((0, *cuts), (*cuts, length), strict=True):
        along = {k: arguments[k][:, start:end] for k in ("x", "dt", "B", "C", "z")}
        part, state = selective_scan(**{**arguments, **along, "initial_state": state})
        y.append(part)
    return torch.cat(y, 1), state


def outputs(call, backend, function=selective_scan):
    with torch.no_grad(), use(selective_scan=backend):
        return function(**call.arguments)


@pytest.fixture
def small_blocks(monkeypatch):
    """Short sequences then cross several blocks, and several runs in each."""
    monkeypatch.setattr(reference, "BLOCK", 8)
    monkeypatch.setattr(reference, "SUB", 3)


@pytest.mark.parametrize("has_state", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "b{}-l{}-i{}-g{}-n{}".format(*s))
@every_backend
def test_backend_is_the_recurrence(backend, shape, dtype, has_state, device):
    call = scan_inputs(shape, dtype, device, has_state)
    check_backend(selective_scan, naive_selective_scan, backend, call, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_exact_in_float64(shape):
    call = scan_inputs(shape)
    assert_same(run_fwd_bwd(selective_scan, call), run_fwd_bwd(naive_selective_scan, call))


@pytest.mark.parametrize("has_state", [False, True], ids=["cold", "warm"])
def test_packed_is_separate(small_blocks, has_state):
    call = packed_inputs(has_state)
    assert_same(run_fwd_bwd(selective_scan, call), run_fwd_bwd(naive_selective_scan, call))


@pytest.mark.parametrize("cuts", [(1,), (13,), (8, 9), (1, 2, 3, 30)], ids=str)
def test_state_carries_a_split_sequence(small_blocks, cuts):
    call = scan_inputs((2, 37, 4, 2, 3))

    def split(**arguments):
        return in_pieces(cuts, **arguments)

    assert_same(run_fwd_bwd(split, call), run_fwd_bwd(selective_scan, call))


@pytest.mark.parametrize(
    "call",
    [
        scan_inputs((2, 11, 4, 2, 2)),
        scan_inputs((1, 9, 2, 1, 2)).having(D=None, z=None, dt_bias=None, initial_state=None),
        scan_inputs((1, 9, 2, 1, 2)).having(dt_limit=(0.3, 1.5)),
        scan_inputs((1, 1, 2, 1, 2)),
        scan_inputs((1, 12, 2, 1, 2), n_seqs=4).having(cu_seqlens=pack([4, 0, 1, 7])),
    ],
    ids=["all", "bare", "limits", "one-step", "packed"],
)
def test_adjoint_is_the_derivative(small_blocks, call):
    call = call.to(torch.float64)
    leaves = call.leaves()

    def function(*tensors):
        return selective_scan(**call.having(**dict(zip(leaves, tensors, strict=True))).arguments)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), atol=1e-6)


@pytest.mark.parametrize("dt_softplus", [False, True], ids=["raw", "softplus"])
def test_steps_are_clamped_after_softplus(dt_softplus):
    call = scan_inputs((2, 9, 4, 2, 3)).having(dt_limit=(0.3, 1.1), dt_softplus=dt_softplus)
    assert_same(run_fwd_bwd(selective_scan, call), run_fwd_bwd(naive_selective_scan, call))


def test_softplus_is_exact_at_large_steps():
    """A softplus that turns linear at 20 is 2e-9 off there."""
    call = scan_inputs((2, 9, 4, 2, 3))
    call = call.having(dt=call.arguments["dt"] + 20.0, A=call.arguments["A"] * 0.01)
    assert_same(
        run_fwd_bwd(selective_scan, call), run_fwd_bwd(naive_selective_scan, call), tolerance=1e-10
    )


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 127, 129])
@pytest.mark.parametrize("backend", compiled_backends)
def test_lengths_round_a_tile(backend, length):
    call = scan_inputs((2, length, 40, 1, 16), torch.bfloat16, cuda_device())
    check_backend(selective_scan, naive_selective_scan, backend, call, torch.bfloat16)


@pytest.mark.parametrize("n", [8, 16, 32, 64])
@pytest.mark.parametrize(
    "options", [{}, {"z": None}, {"D": None}, {"dt_limit": (0.3, 1.1)}], ids=str
)
@every_backend
def test_options_of_every_backend(backend, options, n, device):
    call = scan_inputs((1, 20, 12, 2, n), torch.float32, device).having(**options)
    check_backend(selective_scan, naive_selective_scan, backend, call, torch.float32)


@pytest.mark.parametrize("has_state", [False, True], ids=["cold", "warm"])
@every_backend
def test_every_backend_packs(backend, has_state, device):
    call = packed_inputs(has_state, torch.float32, device)
    check_backend(selective_scan, naive_selective_scan, backend, call, torch.float32)


@pytest.mark.parametrize("cuts", [(1,), (64,), (63, 65), (1, 2, 3, 130)], ids=str)
@every_backend
def test_every_backend_carries_a_split_sequence(backend, cuts, device):
    call = scan_inputs((2, 150, 12, 2, 16), torch.float32, device)
    skip_unless_supported(selective_scan, backend, call)

    def split(**arguments):
        with use(selective_scan=backend):
            return in_pieces(cuts, **arguments)

    truth = run_fwd_bwd(selective_scan, call.to(torch.float64), "reference")
    same_dtype = run_fwd_bwd(selective_scan, call, "reference")
    assert_within(run_fwd_bwd(split, call), same_dtype, truth, torch.float32)


@every_backend
def test_parts_of_wider_tensors_are_read_where_they_are(backend, device):
    call = scan_inputs((2, 33, 24, 1, 16), torch.bfloat16, device)
    skip_unless_supported(selective_scan, backend, call)
    a = call.arguments
    # no two of one stride
    wide = {n: torch.cat([a[n]] * k, -1) for k, n in enumerate(("x", "dt", "B", "C", "z"), 2)}
    parts = call.having(**{n: t[..., : a[n].shape[-1]] for n, t in wide.items()})
    columns = call.having(x=a["x"].mT.contiguous().mT, z=a["z"].mT.contiguous().mT)
    want = outputs(call, backend)
    for other in (parts, columns):
        got = outputs(other, backend)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("dt", [-30.0, 30.0, None], ids=["frozen", "forgetting", "ramp"])
@every_backend
def test_extreme_steps_stay_finite_and_right(backend, dt, device):
    call = scan_inputs((1, 61, 4, 1, 16), torch.float32, device)
    skip_unless_supported(selective_scan, backend, call)
    raw = call.arguments["dt"].clone()
    if dt is None:
        raw += torch.linspace(-30.0, 30.0, 61, device=device)[:, None]
    else:
        raw[:, ::3] = dt
    call = call.having(dt=raw)
    truth = run_fwd_bwd(naive_selective_scan, call.to(torch.float64))
    same_dtype = run_fwd_bwd(naive_selective_scan, call)
    got = run_fwd_bwd(selective_scan, call, backend)
    assert_within(got, same_dtype, truth, torch.float32)


def small_steps(device):
    """The scan's call whose outputs are the step sizes, and these in float64."""
    dt = torch.linspace(-23.0, 20.0, 431, device=device)[None, None]
    one = torch.ones(1, 1, 1, 1, device=device)
    A = -torch.ones(431, 1, device=device)
    # from a state of zeros, one step of ones is its size
    call = Call({"x": torch.ones_like(dt), "dt": dt, "A": A, "B": one, "C": one})
    truth = torch.nn.functional.softplus(dt.double(), threshold=40.0)
    return call.having(dt_softplus=True), truth


@every_backend
def test_small_steps_keep_their_digits(backend, device):
    """log(1 + e^dt), written like that, is off by a tenth at 1e-6 and zero below 6e-8."""
    call, truth = small_steps(device)
    skip_unless_supported(selective_scan, backend, call)
    y, _ = outputs(call, backend)
    assert ((y - truth) / truth).abs().max() < 1e-6


@every_backend
def test_five_runs_give_the_same_bits(backend, device):
    call = scan_inputs((2, 97, 72, 2, 16), torch.bfloat16, device)
    skip_unless_supported(selective_scan, backend, call)
    first = run_fwd_bwd(selective_scan, call, backend)
    for _ in range(4):
        again = run_fwd_bwd(selective_scan, call, backend)
        assert all(torch.equal(again[name], first[name]) for name in first)


def cuda_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("far", ["tokens", "rows"])
@every_backend
def test_inputs_pass_2_to_the_31_elements(backend, far):
    """x, dt and z lie in one buffer whose strides carry them past 2^31 elements."""
    b, l = (1, 70_001) if far == "tokens" else (3, 129)
    call = scan_inputs((b, l, 64, 1, 16), torch.bfloat16, cuda_device())
    skip_unless_supported(selective_scan, backend, call)
    # 9 GB; 7 GB
    buffer = torch.zeros(l * 2**16 if far == "tokens" else b * 1_200_000_128, device="cuda",
                         dtype=torch.bfloat16)  # fmt: skip
    strides = (0, 2**16, 1) if far == "tokens" else (1_200_000_128, 256, 1)
    views = {}
    for k, name in enumerate(("x", "dt", "z")):
        views[name] = buffer.as_strided((b, l, 64), strides, 64 * k)
        views[name].copy_(call.arguments[name])
    got, want = outputs(call.having(**views), backend), outputs(call, backend)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", compiled_backends)
def test_outputs_pass_2_to_the_31_elements(backend):
    # 2.2e9 elements, 4.5 GB a tensor; the reference would hold several of them in fp32
    i, l, tail = 8192, 272_000, 1000
    device = cuda_device()
    x, dt, z = (torch.randn(1, l, i, device=device, dtype=torch.bfloat16) for _ in range(3))
    B, C = (torch.randn(1, l, 1, 16, device=device, dtype=torch.bfloat16) for _ in range(2))
    A = -torch.rand(i, 16, device=device)
    along = {"x": x, "dt": dt, "B": B, "C": C, "z": z}
    whole = Call({**along, "A": A, "dt_softplus": True})
    skip_unless_supported(selective_scan, backend, whole)
    y, final_state = outputs(whole, backend)
    head = whole.having(**{k: t[:, :-tail] for k, t in along.items()})
    _, state = outputs(head, backend)
    last = whole.having(**{k: t[:, -tail:] for k, t in along.items()}, initial_state=state)
    y_last, final_last = outputs(last, backend)
    torch.testing.assert_close(y[:, -tail:], y_last, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(final_state, final_last, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", compiled_backends)
def test_compiled_graphs_hold_the_scan_whole(backend, compiler, monkeypatch):
    # torch cannot trace the functions that fill what torch.empty returns
    monkeypatch.undo()
    call = packed_inputs(True, torch.bfloat16, cuda_device())
    skip_unless_supported(selective_scan, backend, call)

    def doubled(x, **arguments):
        y, final_state = selective_scan(2 * x, **arguments)
        return y + 1, final_state

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True, backend=compiler)
    with use(selective_scan=backend):
        assert_same(run_fwd_bwd(compiled, call), run_fwd_bwd(doubled, call), tolerance=2e-2)


class Scan(torch.nn.Module):
    def forward(self, **arguments):
        return selective_scan(**arguments)


@every_backend
def test_exported_graphs_hold_the_scan_whole(backend, device, monkeypatch):
    monkeypatch.undo()
    call = scan_inputs((2, 9, 6, 2, 4), torch.float32, device).having(dt_limit=(0.0, 2.0))
    skip_unless_supported(selective_scan, backend, call)
    with torch.no_grad(), use(selective_scan=backend):
        program = torch.export.export(Scan(), (), call.arguments)
        got = program.module()(**call.arguments)
    names = {str(node.target) for node in program.graph.nodes}
    assert backend == "reference" or f"hybridzoo.selective_scan_{backend}.default" in names
    for g, w in zip(got, outputs(call, backend), strict=True):
        torch.testing.assert_close(g, w)


def check_raw_op(op, call):
    """torch's own checks of an op with the signature that backward.register takes."""
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "cu_seqlens")
    given = call.to(None).arguments
    torch.library.opcheck(op, (*(given.get(n) for n in names), True, 0.0, 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"D": None, "initial_state": None}], ids=str)
def test_gradients_without_a_kernel_are_a_proper_op(options, dtype):
    call = scan_inputs((2, 9, 6, 2, 4), dtype).having(**options)
    a, cotangents = call.arguments, outputs(call, "reference")
    inputs = (a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], a["z"], a["dt_bias"])
    rest = (a["initial_state"], None, True, 0.0, 2.0)
    torch.library.opcheck(backward.selective_scan_backward, (*cotangents, *inputs, *rest))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", compiled_backends)
def test_raw_launches_are_proper_ops(backend):
    call = scan_inputs((2, 9, 6, 2, 4), torch.float32, cuda_device())
    skip_unless_supported(selective_scan, backend, call)
    op = getattr(torch.ops.hybridzoo, f"selective_scan_{backend}").default
    for each in (call, call.having(D=None, z=None), packed_inputs(False, torch.bfloat16, "cuda")):
        check_raw_op(op, each)


ALONG = ("x", "dt", "B", "C", "z")
WAVE, MANY = cuda.WAVE, cuda.Mapping(8, 1, 4, 16, min_blocks=4)
TEAM_OF_4, TEAM_OF_2, FEWEST = cuda.TEAM_OF_4, cuda.TEAM_OF_2, cuda.Mapping(4, 1, 4, 32, team=4)
STATES_64 = cuda.Mapping(8, 2, 4, 8, min_blocks=2)
# the shapes that are measured (scripts/bench), (b, i, l, n), and such as bound a branch
CHOICES = {
    (1, 1536, 2048, 16): MANY._replace(n_segments=11),
    (8, 4096, 2048, 16): WAVE,
    (32, 1536, 2048, 16): MANY,
    (64, 1536, 512, 16): MANY,
    (1, 8192, 8192, 16): TEAM_OF_4,
    (1, 8192, 16384, 16): TEAM_OF_4,
    (1, 4096, 65536, 16): TEAM_OF_2,
    (4, 16384, 4096, 16): MANY,
    (4, 2048, 1000, 16): TEAM_OF_4,
    (8, 4096, 100, 16): MANY,
    (2, 256, 2048, 16): FEWEST._replace(n_segments=16),
    (2, 256, 2048, 8): FEWEST._replace(n_segments=16),
    (4, 2048, 2048, 64): STATES_64,
    # one wave, and one block more than it
    (1, 8448, 2048, 16): TEAM_OF_4,
    (1, 8449, 2048, 16): MANY,
    (1, 4224, 2048, 16): TEAM_OF_2,
    (1, 4225, 2048, 16): TEAM_OF_4,
    (1, 2113, 2048, 16): TEAM_OF_2,
    # rows whose last block is partly empty: more than a wave of large ones
    (86, 384, 2048, 16): MANY,
    (80, 96, 2048, 16): MANY,
    # where it would be a wave, of one lane a channel
    (16, 4096, 2048, 8): MANY._replace(min_blocks=3),
    (2, 4096, 2048, 32): MANY,
    (1, 4096, 2048, 32): TEAM_OF_4,
    # as many segments as give two warps a scheduler, of 128 tokens at least
    (1, 2112, 2048, 16): MANY._replace(n_segments=8),
    (1, 1536, 65536, 16): MANY._replace(n_segments=11),
    (1, 512, 65536, 16): MANY._replace(n_segments=33),
    (1, 640, 4096, 16): MANY._replace(n_segments=26),
    (1, 512, 4096, 16): FEWEST._replace(n_segments=32),
    (1, 4096, 255, 16): MANY,
    (1, 4096, 256, 16): TEAM_OF_2,
    (1, 64, 0, 16): MANY,
    (1, 64, 1, 16): MANY,
    (0, 64, 100, 16): MANY,
    (0, 64, 1000, 16): FEWEST._replace(n_segments=7),
    (0, 64, 1000, 64): STATES_64,
}


@pytest.mark.parametrize("shape", CHOICES, ids=str)
def test_mapping_of_a_shape_on_132_multiprocessors(shape, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: sass.HOPPER)
    b, i, l, n = shape
    assert cuda.choose((b, l, i), n, torch.device("cuda")) == CHOICES[shape]


def test_mappings_fit_the_shared_memory_of_a_small_gpu(monkeypatch):
    small = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    for (b, i, l, n), fastest in CHOICES.items():
        mapping = cuda.choose((b, l, i), n, torch.device("cuda"))
        assert cuda._shared_bytes(mapping, n, False) <= 101376
        assert mapping == fastest or cuda._shared_bytes(fastest, n, False) > 101376


MAPPINGS = [
    (WAVE, 16), (MANY, 16), (TEAM_OF_4, 16), (TEAM_OF_2, 16), (FEWEST, 16), (STATES_64, 64),
    (MANY, 5), (TEAM_OF_4, 5), (TEAM_OF_2, 32),
]  # fmt: skip
every_mapping = pytest.mark.parametrize(
    ("mapping", "n"),
    MAPPINGS,
    ids=["wave", "many", "team4", "team2", "fewest", "n64", "n5", "team4-n5", "team2-n32"],
)
LENGTH = 397
# one pack's sequences end on the borders of tiles, of two segments (200, 208, 224) and of five (80
# and 96 tokens each), beside them, and four at one place; another's longest passes all borders
PACKS = {
    "rows": None,
    "short": [0, 8, 8, 0, 0, 0, 16, 31, 1, 16, 16, 1, 63, 32, 1, 7, 8, 16, 15, 1, 48, 0, 1, 31, 64,
              13, 0, 0],
    "long": [5, 388, 0, 4],
}  # fmt: skip
every_layout = pytest.mark.parametrize("layout", PACKS)
every_cut = pytest.mark.parametrize("n_segments", [1, 2, 5])


def scan_arguments(n, lengths, has_state=True, length=LENGTH):
    """Two groups of channels, no multiple of a block's, in two rows or in one pack."""
    assert lengths is None or sum(lengths) == length
    shape = (1 if lengths else 2, length, 2 * 136, 2, n)
    call = scan_inputs(shape, torch.float32, "cpu", has_state, lengths and len(lengths))
    return call.having(cu_seqlens=pack(lengths)) if lengths else call


def launch(call, mapping, checkpoint_every=0):
    """y, final_state and checkpoints of the CUDA kernel, on the CPU."""
    skip_unless_supported(selective_scan, "cuda", on(cuda_device(), call))
    given = on(cuda_device(), call).arguments
    limits = given.get("dt_limit", (0.0, inf))
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "cu_seqlens")
    arguments = cuda.Arguments(*(given.get(k) for k in names), given["dt_softplus"], *limits)
    return tuple(t.cpu() for t in cuda.launch(arguments, mapping, checkpoint_every))


def on(device, call):
    moved = {k: t.to(device) for k, t in call.arguments.items() if isinstance(t, torch.Tensor)}
    return call.having(**moved)


def assert_rows_near(got, want, limit=1e-5):
    """Each row by its norm: one that is wrong would hide in the norm of all."""
    assert got.shape == want.shape
    error = (got.double() - want).flatten(1).norm(dim=1)
    allowed = limit * want.flatten(1).norm(dim=1)
    # not error > allowed, so that a NaN fails
    wrong = ~(error <= allowed)
    assert not wrong.any(), f"rows {wrong.nonzero().flatten().tolist()} of {len(wrong)}"


def true_states(call, length=LENGTH):
    """The reference's states in float64 before every 32nd token, (b, k, i, n).

    In a pack that is the state of the token before, of whatever sequence has it.
    """
    wide, states = call.to(torch.float64).arguments, []
    ends = wide.get("cu_seqlens")
    for place in range(0, length, 32):
        head = Call({**wide, **{k: wide[k][:, :place] for k in ALONG}})
        if ends is None:
            states.append(outputs(head, "reference")[1])
        else:
            _, final = outputs(head.having(cu_seqlens=ends.clamp(max=place)), "reference")
            # the first whose end is not before the place
            states.append(final[(ends[1:] < place).sum()][None])
    if not states:
        return wide["A"].new_empty(wide["x"].shape[0], 0, *wide["A"].shape)
    return torch.stack(states, 1)


@pytest.mark.parametrize("lengths", [PACKS["short"], PACKS["long"]], ids=["short", "long"])
def test_states_before_tokens_of_a_pack_are_those_of_sequences_cut_there(lengths):
    """The truth that checkpoints are held to; it needs no GPU."""
    shape = (1, LENGTH, 4, 2, 3)
    call = scan_inputs(shape, n_seqs=len(lengths)).having(cu_seqlens=pack(lengths))
    a, got, start = call.arguments, true_states(call), 0
    seen = {0}
    torch.testing.assert_close(got[0, 0], a["initial_state"][0])
    for s, length in enumerate(lengths):
        for place in range(start + 1, start + length + 1):
            if place % 32 == 0 and place < LENGTH:
                alone = {k: a[k][:, start:place] for k in ALONG}
                state = a["initial_state"][s : s + 1]
                cut = call.having(**alone, initial_state=state, cu_seqlens=None)
                _, want = naive_selective_scan(**cut.arguments)
                torch.testing.assert_close(got[:, place // 32], want)
                seen.add(place // 32)
        start += length
    assert seen == set(range(got.shape[1]))


@functools.cache
def truth(n, layout, has_state=True, length=LENGTH):
    """A call; in float64 its outputs, and its states before every 32nd token."""
    call = scan_arguments(n, PACKS[layout], has_state, length)
    return call, *outputs(call.to(torch.float64), "reference"), true_states(call, length)


def check_mapping(mapping, checkpoint_every, *case):
    call, y, final_state, states = truth(*case)
    got_y, got_state, checkpoints = launch(call, mapping, checkpoint_every)
    assert_rows_near(got_y.flatten(0, 1), y.flatten(0, 1))
    assert_rows_near(got_state, final_state)
    if checkpoint_every:
        assert checkpoints.shape == states.shape
        assert_rows_near(checkpoints.flatten(0, 1), states.flatten(0, 1))
    else:
        assert checkpoints.shape[1] == 0


@pytest.mark.gpu
@every_layout
@every_cut
@every_mapping
def test_mappings_and_segments_change_nothing(mapping, n, n_segments, layout):
    check_mapping(mapping._replace(n_segments=n_segments), 0, n, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("has_state", [False, True], ids=["cold", "warm"])
@every_layout
@every_cut
@every_mapping
def test_checkpoints_are_the_states_before(mapping, n, n_segments, layout, has_state):
    check_mapping(mapping._replace(n_segments=n_segments), 32, n, layout, has_state)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [0, 1, 31, 32, 33])
@every_mapping
def test_short_rows_have_fewer_segments(mapping, n, length):
    check_mapping(mapping._replace(n_segments=5), 32, n, "rows", True, length)


@pytest.mark.gpu
def test_errors_of_many_decays_do_not_add_up():
    """The exponential unit's, 6e-9 too small on average, would make 2e-5 of 4,096 tokens."""
    dt = 2e-4 + 8e-4 * torch.rand(4, 4096, 64, generator=torch.Generator().manual_seed(0))
    zeros, A = torch.zeros(4, 4096, 1, 16), -torch.ones(64, 16)
    call = Call({"x": torch.zeros_like(dt), "dt": dt, "A": A, "B": zeros, "C": zeros})
    call = call.having(dt_softplus=False, initial_state=torch.ones(4, 64, 16))
    _, left, _ = launch(call, MANY)
    truth = (-dt.double().sum(1)).exp()[..., None]
    assert (left / truth - 1).mean().abs() < 1.2e-5


def test_a_plan_is_kept_for_what_is_laid_out_alike_and_for_nothing_else(monkeypatch):
    loaded, launched = [], []

    def load(source, name, defines, device):
        loaded.append(defines)
        return lambda *args: launched.append(args)

    monkeypatch.setattr(cuda.loader, "load", load)
    wide = torch.zeros(2, 48, 72)
    call = scan_inputs((2, 32, 64, 1, 16), torch.float32).having(x=wide[:, :32, :64])
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "cu_seqlens")
    given = cuda.Arguments(*(call.arguments.get(k) for k in names), True, 0.0, inf)
    half = {k: getattr(given, k).bfloat16() for k in ("x", "dt", "B", "C", "z")}
    length = {k: getattr(given, k)[:, :24].contiguous() for k in ("x", "dt", "B", "C", "z")}
    others = {
        "address": ((given._replace(x=wide[:, :32, 1:65]), MANY), {"ALIGNED": 0}),
        "stride": ((given._replace(x=wide[:, :32, :64].contiguous()), MANY), {}),
        "dtype": ((given._replace(**half), MANY), {"DTYPE": 1}),
        "length": ((given._replace(**length), MANY), {}),
        "absent": ((given._replace(z=None), MANY), {"GATED": 0}),
        "softplus": ((given._replace(dt_softplus=False), MANY), {"SOFTPLUS": 0}),
        "limits": ((given._replace(dt_max=2.0), MANY), {"LIMITS": 1}),
        "mapping": ((given, WAVE), {"WARPS": 16, "MIN_BLOCKS": 1}),
        "checkpoints": ((given, MANY, 16), {"CHECKPOINTS": 1}),
    }
    cuda.launch(given, MANY)
    usual = loaded[0]
    for name, (other, defines) in others.items():
        cuda.launch(given, MANY)
        assert len(loaded) == 1, name
        cuda.launch(*other)
        assert loaded.pop() == {**usual, **defines}, name
        cuda.launch(*other)
        assert len(loaded) == 1, name
        # grid, threads, bytes; 15 tensors, x first; numbers, the length first
        assert launched[-1][3] is launched[-2][3] is other[0].x
        assert launched[-1][18:] == launched[-2][18:]
        assert launched[-1][18] == other[0].x.shape[1]
        assert (launched[-1][18:] == launched[0][18:]) == (
            name in ("address", "softplus", "mapping")
        )


@pytest.mark.parametrize("length", [0, 1])
def test_final_state_is_no_alias(length):
    call = scan_inputs((2, length, 4, 1, 3))
    _, final_state = selective_scan(**call.arguments)
    before = call.arguments["initial_state"].clone()
    final_state.add_(1.0)
    assert torch.equal(call.arguments["initial_state"], before)
    if length == 0:
        assert torch.equal(final_state, before + 1.0)


def test_states_are_wide_and_outputs_are_not():
    y, final_state = selective_scan(**scan_inputs((1, 3, 2, 1, 2), torch.bfloat16).arguments)
    assert (y.dtype, final_state.dtype) == (torch.bfloat16, torch.float32)


def test_pack_of_two_rows_is_refused():
    call = scan_inputs((2, 8, 2, 1, 2)).having(cu_seqlens=pack([3, 5]))
    with pytest.raises(BackendError, match="x has 2 rows with cu_seqlens; a pack is one row"):
        selective_scan(**call.arguments)


def test_state_with_the_wrong_rows_is_refused():
    call = scan_inputs((1, 8, 2, 1, 2)).having(cu_seqlens=pack([3, 5]))
    with pytest.raises(BackendError, match="initial_state has 1 rows; it takes 2, one a sequence"):
        selective_scan(**call.arguments)


def test_1024_tokens_take_half_a_second():
    call = scan_inputs((1, 1024, 256, 1, 16), torch.float32, has_state=False)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        run_fwd_bwd(selective_scan, call)
        seconds.append(time.perf_counter() - begin)
    # the best, as the median of a shared machine measures its other users
    assert min(seconds) < 0.5
