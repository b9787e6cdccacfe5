"""The CUDA scan's source on the CPU: right, without races, and inside its tensors."""

import os
import re
import shutil
import subprocess
import sys
from math import inf, nan
from pathlib import Path

import pytest
import torch

from hybridzoo.errors import BackendError
from hybridzoo.kernels.selective_scan import fwd, reference
from hybridzoo.kernels.selective_scan.fwd import Arguments, Mapping
from tests.kernels import on_cpu
from tests.kernels.compare import pack, randn

ROOT = Path(__file__).parents[2]
# those of choose(), with segments and without
MAPPINGS = [
    fwd.WAVE, Mapping(8, 1, 4, 16), Mapping(8, 1, 4, 16, 2), fwd.TEAM_OF_4, fwd.TEAM_OF_2,
    Mapping(4, 1, 4, 32, 2, team=4), Mapping(4, 1, 4, 16, 3, team=4), Mapping(8, 2, 4, 8),
]  # fmt: skip
# empty ones first, last and inside; ends on borders of tiles (16, 32) and of segments
LENGTHS = [0, 5, 0, 11, 16, 1, 31, 32, 0]


def made(b, l, i, n, g=1, dtype=torch.float32, rows=None, **changed):
    """Arguments of the op; `changed` replaces some."""

    def t(*shape, seed, dtype=dtype):
        return randn(*shape, seed=seed, dtype=dtype)

    wide = torch.float32
    given = Arguments(
        x=t(b, l, i, seed=0), dt=t(b, l, i, seed=1), A=-t(i, n, seed=2, dtype=wide).exp(),
        B=t(b, l, g, n, seed=3), C=t(b, l, g, n, seed=4), D=t(i, seed=5, dtype=wide),
        z=t(b, l, i, seed=6), dt_bias=t(i, seed=7, dtype=wide),
        initial_state=t(rows or b, i, n, seed=8, dtype=wide), cu_seqlens=None, dt_softplus=True,
        dt_min=0.0, dt_max=inf,
    )  # fmt: skip
    return given._replace(**changed)


OPTIONS = {
    "groups": made(2, 33, 24, 16, g=3),
    "bf16": made(2, 33, 24, 16, g=3, dtype=torch.bfloat16),
    "bare": made(1, 40, 8, 16, D=None, z=None, dt_bias=None, initial_state=None),
    "limits": made(1, 40, 8, 16, dt_min=0.3, dt_max=1.1),
    # without softplus, and with the widest limits, a step may be negative
    "negative": made(
        1, 40, 8, 16, dt_softplus=False, dt_bias=None, dt=-0.01 * randn(1, 40, 8, seed=1).abs()
    ),
    "empty": made(1, 0, 8, 16),
    "one": made(1, 1, 8, 16),
}


def truth(given, dtype=torch.float64):
    x, dt, A, B, C, D, z, dt_bias, initial_state = (
        None if t is None else t.to(dtype) for t in given[:9]
    )
    return reference.run(
        x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state,
        cu_seqlens=given.cu_seqlens, dt_softplus=given.dt_softplus,
        dt_limit=(given.dt_min, given.dt_max),
    )  # fmt: skip


def assert_near(got, want, limit):
    assert (got.double() - want).norm() <= limit * want.norm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    return tmp_path_factory.mktemp("on_cpu")


@pytest.fixture
def launch(monkeypatch, folder):
    """fwd.launch on CPU tensors."""
    monkeypatch.setattr(fwd.loader, "load", on_cpu.loader(folder))
    return fwd.launch


@pytest.mark.parametrize("mapping", MAPPINGS, ids=str)
@pytest.mark.parametrize("n", [16, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 64))])
def test_walk_is_the_recurrence(launch, mapping, n):
    # 40 and 75: tails of blocks and of tiles
    given = made(1, 75, 40, n)
    y, final_state, _ = launch(given, mapping)
    want_y, want_state = truth(given)
    # fp32 sums of n terms, and approximate exponentials of 2**-22
    assert_near(y, want_y, 1e-6)
    assert_near(final_state, want_state, 1e-6)


@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("n_segments", [1, 2])
def test_options_are_those_of_the_reference(launch, given, n_segments):
    y, final_state, _ = launch(given, Mapping(8, 1, 4, 16, n_segments))
    want_y, want_state = truth(given)
    # bf16 rounds y once
    assert_near(y, want_y, 1e-6 if given.x.dtype == torch.float32 else 2.5e-3)
    assert_near(final_state, want_state, 1e-6)


@pytest.mark.parametrize("mapping", [fwd.TEAM_OF_2, fwd.TEAM_OF_4], ids=str)
@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_teams_read_halves(launch, mapping, is_packed):
    lengths = {"rows": len(LENGTHS), "cu_seqlens": pack(LENGTHS)} if is_packed else {}
    given = made(1, sum(LENGTHS), 40, 16, dtype=torch.bfloat16, **lengths)
    y, final_state, _ = launch(given, mapping)
    want_y, want_state = truth(given)
    # bf16 rounds y once
    assert_near(y, want_y, 2.5e-3)
    assert_near(final_state, want_state, 1e-6)


@pytest.mark.parametrize("n_segments", [1, 2, 6])
def test_packed_is_separate(launch, n_segments):
    given = made(1, sum(LENGTHS), 8, 16, rows=len(LENGTHS), cu_seqlens=pack(LENGTHS))
    y, final_state, _ = launch(given, Mapping(8, 1, 4, 16, n_segments))
    want_y, want_state = truth(given)
    assert_near(y, want_y, 1e-6)
    assert_near(final_state, want_state, 1e-6)


def test_pack_of_nothing(launch):
    given = made(1, 0, 8, 16, initial_state=None, cu_seqlens=torch.zeros(1, dtype=torch.int32))
    y, final_state, _ = launch(given, Mapping(8, 1, 4, 16))
    assert (y.shape, final_state.shape) == ((1, 0, 8), (0, 8, 16))


# of two tiles, and of half a one
DISTANCES = [(Mapping(8, 1, 4, 16), 32), (Mapping(4, 1, 2, 32, team=2), 16)]


@pytest.mark.parametrize("n_segments", [1, 2])
@pytest.mark.parametrize(("mapping", "distance"), DISTANCES, ids=str)
def test_checkpoints_are_the_states_on_the_way(launch, mapping, distance, n_segments):
    given = made(2, 75, 8, 16)
    _, _, checkpoints = launch(given, mapping._replace(n_segments=n_segments), distance)
    assert checkpoints.shape == (2, -(-75 // distance), 8, 16)
    for k in range(checkpoints.shape[1]):
        part = {n: getattr(given, n)[:, : distance * k] for n in ("x", "dt", "B", "C", "z")}
        assert_near(checkpoints[:, k], truth(given._replace(**part))[1], 1e-6)


def test_a_packs_checkpoints_are_those_of_other_tiles(launch):
    given = made(1, sum(LENGTHS), 8, 16, rows=len(LENGTHS), cu_seqlens=pack(LENGTHS))
    want, got = (launch(given, Mapping(4, 1, 4, t), 16)[2] for t in (16, 32))
    starts = {sum(LENGTHS[:k]) for k in range(len(LENGTHS))}
    for k in range(want.shape[1]):
        # before a sequence's first token either is whatever came before
        if 16 * k not in starts:
            assert_near(got[:, k], want[:, k], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("limits", [(0.0, inf), (0.001, 0.1)], ids=str)
@pytest.mark.parametrize("dt", [torch.finfo(torch.float32).min, -inf, inf, nan, -30.0, 30.0])
@pytest.mark.parametrize("n_segments", [1, 3])
def test_extreme_steps_are_those_of_the_reference(launch, dt, limits, n_segments):
    given = made(1, 48, 8, 16, dt_min=limits[0], dt_max=limits[1])
    # an infinite step without a limit is no number in some states, and which ones depends on order
    given.dt[:, 20] = nan if dt == inf == limits[1] else dt
    y, final_state, _ = launch(given, Mapping(8, 1, 4, 16, n_segments))
    want_y, want_state = truth(given, torch.float32)
    torch.testing.assert_close(y, want_y, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(final_state, want_state, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_what_is_not_a_number_stays_in_its_sequence(launch):
    given = made(1, 96, 8, 16, rows=2, cu_seqlens=pack([70, 26]))
    given.x[:, 48] = nan
    y, final_state, _ = launch(given, Mapping(8, 1, 4, 16, 6))
    assert not y[:, :48].isnan().any() and not y[:, 70:].isnan().any()
    assert final_state[0].isnan().all() and not final_state[1].isnan().any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"D": torch.ones(1)}, r"selective_scan: D is \(1,\); beside x \(1, 4, 8\) it is \(8,\)"),
        ({"z": torch.ones(1, 1, 8)}, r"z is \(1, 1, 8\)"),
        ({"initial_state": torch.ones(2, 8, 16)}, r"initial_state is \(2, 8, 16\)"),
        ({"B": torch.ones(1, 4, 3, 16), "C": torch.ones(1, 4, 3, 16)}, "B has 3 groups for 8"),
    ],
    ids=["D", "z", "initial_state", "groups"],
)
def test_shapes_of_others_are_refused(launch, changed, message):
    with pytest.raises(BackendError, match=message):
        launch(made(1, 4, 8, 16, **changed), Mapping(8, 1, 4, 16))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "address"])
def test_sanitizers_find_nothing(folder, kind):
    """Races between lanes, and accesses outside the tensors."""
    check_sanitizer("tests.kernels.test_on_cpu", folder, kind, f"{len(MAPPINGS)} mappings")


def check_sanitizer(module, folder, kind, said):
    """Run a module's main under it, which must say so much and be told nothing."""
    runtime = subprocess.run(
        ["g++", f"-print-file-name=lib{kind[0]}san.so"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip(f"g++ has no {kind} sanitizer")
    log = folder / f"{kind}.log"
    options = f"log_path={log}:exitcode=66:detect_leaks=0:alloc_dealloc_mismatch=0"
    kinds = {"thread": "TSAN_OPTIONS", "address": "ASAN_OPTIONS"}
    done = subprocess.run(
        # without it ThreadSanitizer may not find its own addresses free
        ["setarch", "-R", sys.executable, "-m", module, str(folder), kind],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": runtime, kinds[kind]: options, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    found = "".join(path.read_text() for path in folder.glob(f"{kind}.log*"))
    assert not re.search("WARNING|ERROR", found), found[:3000]
    assert done.returncode == 0 and said in done.stdout, done.stderr[-3000:]


def main(folder, kind):
    fwd.loader.load = on_cpu.loader(Path(folder), "-O1", "-g", f"-fsanitize={kind}")
    for mapping in MAPPINGS:
        fwd.launch(made(1, 75, 40, 64 if mapping.channels > 1 else 16), mapping)
        if mapping.channels == 1 and mapping.warps < 16:
            given = made(1, sum(LENGTHS), 8, 16, rows=len(LENGTHS), cu_seqlens=pack(LENGTHS))
            fwd.launch(given, mapping, checkpoint_every=32)
    # a pack that ends too early, and one of nothing, have no tensor behind them
    for cu_seqlens in ([0, 10, 30], [0]):
        given = made(1, 40 if len(cu_seqlens) > 1 else 0, 8, 16, initial_state=None)
        fwd.launch(given._replace(cu_seqlens=torch.tensor(cu_seqlens).int()), MAPPINGS[0])
    sys.stdout.write(f"{len(MAPPINGS)} mappings\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
