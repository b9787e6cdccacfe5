"""The CUDA backend of selective_scan beneath its op: mappings, segments, checkpoints and plans.

What the op promises, and every backend with it, is in test_selective_scan.py.
"""

import functools
from math import inf
from types import SimpleNamespace

import pytest
import torch

from hybridzoo.kernels.selective_scan import fwd, selective_scan
from tests.kernels import sass
from tests.kernels.compare import Call, pack, skip_unless_supported
from tests.kernels.oracles import naive_selective_scan
from tests.kernels.test_selective_scan import cuda_device, outputs, scan_inputs

ALONG = ("x", "dt", "B", "C", "z")
WAVE, MANY = fwd.WAVE, fwd.Mapping(8, 1, 4, 16, min_blocks=4)
TEAM_OF_4, TEAM_OF_2, FEWEST = fwd.TEAM_OF_4, fwd.TEAM_OF_2, fwd.Mapping(4, 1, 4, 32, team=4)
STATES_64 = fwd.Mapping(8, 2, 4, 8, min_blocks=2)
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
    assert fwd.choose((b, l, i), n, torch.device("cuda")) == CHOICES[shape]


def test_mappings_fit_the_shared_memory_of_a_small_gpu(monkeypatch):
    small = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    for (b, i, l, n), fastest in CHOICES.items():
        mapping = fwd.choose((b, l, i), n, torch.device("cuda"))
        assert fwd._shared_bytes(mapping, n, False) <= 101376
        assert mapping == fastest or fwd._shared_bytes(fastest, n, False) > 101376


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
    given = arguments_of(on(cuda_device(), call))
    return tuple(t.cpu() for t in fwd.launch(given, mapping, checkpoint_every))


def arguments_of(call):
    given = call.arguments
    limits = given.get("dt_limit", (0.0, inf))
    return fwd.Arguments(*(given.get(k) for k in fwd.TENSORS), given["dt_softplus"], *limits)


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
    want = (-dt.double().sum(1)).exp()[..., None]
    assert (left / want - 1).mean().abs() < 1.2e-5


def test_a_plan_is_kept_for_what_is_laid_out_alike_and_for_nothing_else(monkeypatch):
    loaded, launched = [], []

    def load(source, name, defines, device):
        loaded.append(defines)
        return lambda *args: launched.append(args)

    monkeypatch.setattr(fwd.loader, "load", load)
    wide = torch.zeros(2, 48, 72)
    call = scan_inputs((2, 32, 64, 1, 16), torch.float32).having(x=wide[:, :32, :64])
    given = arguments_of(call)
    half = {k: getattr(given, k).bfloat16() for k in ALONG}
    short = {k: getattr(given, k)[:, :24].contiguous() for k in ALONG}
    others = {
        "address": ((given._replace(x=wide[:, :32, 1:65]), MANY), {"ALIGNED": 0}),
        "stride": ((given._replace(x=wide[:, :32, :64].contiguous()), MANY), {}),
        "dtype": ((given._replace(**half), MANY), {"DTYPE": 1}),
        "length": ((given._replace(**short), MANY), {}),
        "absent": ((given._replace(z=None), MANY), {"GATED": 0}),
        "softplus": ((given._replace(dt_softplus=False), MANY), {"SOFTPLUS": 0}),
        "limits": ((given._replace(dt_max=2.0), MANY), {"LIMITS": 1}),
        "mapping": ((given, WAVE), {"WARPS": 16, "MIN_BLOCKS": 1}),
        "checkpoints": ((given, MANY, 16), {"CHECKPOINTS": 1}),
    }
    fwd.launch(given, MANY)
    usual = loaded[0]
    for name, (other, defines) in others.items():
        fwd.launch(given, MANY)
        assert len(loaded) == 1, name
        fwd.launch(*other)
        assert loaded.pop() == {**usual, **defines}, name
        fwd.launch(*other)
        assert len(loaded) == 1, name
        # grid, threads, bytes; 15 tensors, x first; numbers, the length first
        assert launched[-1][3] is launched[-2][3] is other[0].x
        assert launched[-1][18:] == launched[-2][18:]
        assert launched[-1][18] == other[0].x.shape[1]
        assert (launched[-1][18:] == launched[0][18:]) == (
            name in ("address", "softplus", "mapping")
        )
