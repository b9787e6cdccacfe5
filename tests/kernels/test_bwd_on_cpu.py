"""The CUDA scan's backward on the CPU: right, without races, and inside its tensors."""

import itertools
import sys
from math import inf, nan
from pathlib import Path

import pytest
import torch

from hybridzoo.errors import BackendError
from hybridzoo.kernels.selective_scan import bwd, cuda, fwd, reference
from hybridzoo.kernels.selective_scan.bwd import Mapping
from tests.kernels import on_cpu, sass
from tests.kernels.compare import pack, randn
from tests.kernels.test_on_cpu import LENGTHS, OPTIONS, check_sanitizer, folder, made

__all__ = ["folder"]

# of n states: those of choose(), but for their warps, with segments and without
MAPPINGS = {
    5: [Mapping(2, 16, 4), Mapping(1, 32, 4, 2), Mapping(1, 32, 2)],
    16: [Mapping(2, 16, 4, channels=4), Mapping(1, 16, 4, 2), Mapping(2, 32, 8)],
    32: [Mapping(2, 32, 8), Mapping(1, 32, 4, 3)],
    64: [Mapping(2, 16, 4, channels=4), Mapping(1, 16, 8, 3)],
    # a thread that has three of its four states
    7: [Mapping(1, 16, 4)],
}
CASES = [(n, mapping) for n, mappings in MAPPINGS.items() for mapping in mappings]
# minutes each: two warps, and every number of states in segments
SANITIZED = [CASES[3], *(c for c in CASES if c[1].n_segments > 1)]
FWD = fwd.Mapping(8, 1, 4, 16)


@pytest.fixture
def kernels(monkeypatch, folder):
    """Launches take CPU tensors."""
    monkeypatch.setattr(fwd.loader, "load", on_cpu.loader(folder))


def cotangents(given):
    rows = given.x.shape[0] if given.cu_seqlens is None else given.cu_seqlens.shape[0] - 1
    return randn(*given.x.shape, seed=9, dtype=given.x.dtype), randn(rows, *given.A.shape, seed=10)


def gradients(given, mapping):
    """By the kernels, by name."""
    given_fwd = FWD if given.A.shape[1] <= 32 else fwd.Mapping(8, 2, 4, 8)
    _, _, checkpoints = fwd.launch(given, given_fwd, mapping.tokens)
    found = bwd.launch(given, *cotangents(given), checkpoints, mapping)
    return dict(zip(fwd.TENSORS, found, strict=False))


def truth(given, given_back=None, dtype=torch.float64):
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in given[:9]]
    x, dt, A, B, C, D, z, dt_bias, initial_state = leaves
    outputs = reference.run(
        x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state,
        cu_seqlens=given.cu_seqlens, dt_softplus=given.dt_softplus,
        dt_limit=(given.dt_min, given.dt_max),
    )  # fmt: skip
    named = {k: t for k, t in zip(fwd.TENSORS, leaves, strict=False) if t is not None}
    grads = torch.autograd.grad(
        outputs, list(named.values()), [t.to(dtype) for t in given_back or cotangents(given)]
    )
    return dict(zip(named, grads, strict=True))


def assert_near(got, want, limit=6e-7):
    """Of fp32's sums of n terms and of tokens, and of exponentials off by 2**-22."""
    assert {name for name, t in got.items() if t.numel()} == {n for n in want if want[n].numel()}
    for name, grad in want.items():
        # a half rounds its own gradient once
        allowed = limit if got[name].dtype == torch.float32 else 2.5e-3
        assert got[name].shape == grad.shape, name
        assert (got[name].double() - grad).norm() <= allowed * grad.norm(), name


@pytest.mark.parametrize(
    ("n", "mapping"),
    [pytest.param(*c, marks=() if c[0] in (7, 16) else pytest.mark.slow) for c in CASES],
    ids=str,
)
def test_walk_back_is_the_adjoint(kernels, n, mapping):
    # 40 and 75: tails of blocks and of tiles
    given = made(1, 75, 40, n)
    assert_near(gradients(given, mapping), truth(given))


@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("n_segments", [1, 2])
def test_options_are_those_of_the_reference(kernels, given, n_segments):
    assert_near(gradients(given, Mapping(1, 32, 8, n_segments)), truth(given))


@pytest.mark.slow
def test_a_block_of_eight_warps_adds_up_its_parts(kernels):
    given = made(1, 40, 136, 16)
    assert_near(gradients(given, Mapping(8, 32, 8)), truth(given))


@pytest.mark.parametrize("room", [232448, 166912, 101376])
@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("is_lean", [False, True], ids=["dense", "lean"])
def test_every_mapping_fits(is_lean, is_packed, room):
    """In an H100's, an A100's and a 4090's shared memory; the forward's tiles fit in its own."""
    for n, shape in itertools.product(
        range(1, 65), [(8, 2048, 4096), (1, 4096, 1536), (2, 300, 64)]
    ):
        mapping = bwd._choose(*shape, n, 1, is_packed, is_lean, 132, room)
        assert bwd._shared_bytes(mapping, n) <= room
        tokens = bwd.distance(n, is_lean=is_lean)
        assert mapping.tokens == tokens and mapping.vector(n) >= 1
        # a tile of the forward, or half of one
        assert 2 * tokens % fwd._choose(*shape, n, 1, 132, room).tokens == 0


@pytest.mark.parametrize("has_state", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("n_segments", [1, 3])
def test_packed_is_separate(kernels, n_segments, has_state):
    given = made(1, sum(LENGTHS), 8, 16, rows=len(LENGTHS), cu_seqlens=pack(LENGTHS))
    given = given if has_state else given._replace(initial_state=None)
    assert_near(gradients(given, Mapping(1, 32, 4, n_segments)), truth(given))


@pytest.mark.parametrize(
    "lengths", [[96], [40, 56], [70, 26], [64, 32], [40, 24, 32], [40, 30, 26]], ids=str
)
@pytest.mark.parametrize("channels", [2, 4])
def test_segments_hand_on_what_is_of_their_sequence(kernels, channels, lengths):
    """Of 32 tokens, with steps so small that it is not forgotten on the way."""
    given = made(1, 96, 8, 16, rows=len(lengths), cu_seqlens=pack(lengths))
    given = given._replace(dt=given.dt - 6)
    mapping = Mapping(1, 16, 4, 3, channels=channels)
    assert_near(gradients(given, mapping), truth(given))


def test_pack_of_nothing(kernels):
    given = made(1, 0, 8, 16, initial_state=None, cu_seqlens=torch.zeros(1, dtype=torch.int32))
    assert_near(gradients(given, Mapping(1, 32, 4)), truth(given))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dt", "limits"),
    [
        *itertools.product(
            [torch.finfo(torch.float32).min, -inf, -30.0, 30.0], [(0.0, inf), (0.001, 0.1)]
        ),
        # torch's clamp has a gradient of zero for what is not a number; here it is none either
        (nan, (0.0, inf)),
    ],
    ids=str,
)
@pytest.mark.parametrize("n_segments", [1, 2])
def test_extreme_steps_are_those_of_the_reference(kernels, dt, limits, n_segments):
    given = made(1, 48, 8, 16, dt_min=limits[0], dt_max=limits[1])
    given.dt[:, 20] = dt
    got, want = gradients(given, Mapping(1, 32, 8, n_segments)), truth(given, dtype=torch.float32)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=2e-4, equal_nan=True, msg=name)


def test_a_batch_of_no_rows_launches_nothing(monkeypatch):
    monkeypatch.setattr(fwd.loader, "load", lambda *_: pytest.fail("it launches"))
    given = made(0, 40, 8, 16)
    found = bwd.launch(given, *cotangents(given), torch.zeros(0, 2, 8, 16), Mapping(1, 32, 8))
    assert [t.shape for t in found] == [t.shape for t in given[:9]]
    assert not found[2].any()


def test_gradients_are_read_where_they_are(kernels):
    """Parts of a wider dy, and one number for all, as a sum gives it."""
    given, mapping = made(1, 40, 8, 16), Mapping(1, 32, 8)
    dy, dfinal_state = cotangents(given)
    _, _, checkpoints = fwd.launch(given, FWD, 32)
    wide = torch.cat([dy, dy, dy], -1)[..., 8:16]
    for whole, other in ((dy, wide), (torch.ones_like(dy), torch.ones(()).expand_as(dy))):
        want = bwd.launch(given, whole, dfinal_state, checkpoints, mapping)
        got = bwd.launch(given, other, dfinal_state, checkpoints, mapping)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_long_sums_lose_nothing(kernels, monkeypatch):
    """One in each of eight parts, behind 2**24, to which adding one changes nothing in fp32."""
    monkeypatch.setattr(bwd, "SUM_TOKENS", 32)
    bwd._plan.cache_clear()
    given = made(1, 9 * 32, 8, 16, z=None)
    dy = torch.zeros_like(given.x)
    dy[:, ::32] = 1 / given.x[:, ::32]
    # of the tile that is walked first, and the same lane's
    dy[:, 8 * 32] *= 2**24
    _, _, checkpoints = fwd.launch(given, FWD, 32)
    dD = bwd.launch(given, dy, None, checkpoints, Mapping(1, 32, 8))[5]
    bwd._plan.cache_clear()
    # the products are off by half a unit, which is one
    assert (dD.double() - 2**24 - 8).abs().max() <= 3


def test_D_gets_little_error_from_512_tokens(kernels):
    """Of one sign, added by eighths first: 4e-8 in norm; one after another, 1e-7."""
    given = made(1, 512, 32, 4, z=None)._replace(x=randn(1, 512, 32, seed=20).abs())
    dy = randn(1, 512, 32, seed=30).abs()
    _, _, checkpoints = fwd.launch(given, FWD, 32)
    dD = bwd.launch(given, dy, None, checkpoints, Mapping(1, 32, 4))[5]
    want = (given.x.double() * dy.double()).sum((0, 1))
    assert (dD.double() - want).norm() <= 6e-8 * want.norm()


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_a_layer_gets_y_again_and_dz_where_it_wants_it(kernels, is_packed):
    rows = {"rows": len(LENGTHS), "cu_seqlens": pack(LENGTHS)} if is_packed else {}
    given = made(1, sum(LENGTHS), 8, 16, dtype=torch.bfloat16, **rows)
    want, _, checkpoints = fwd.launch(given, FWD, 32)
    known = bwd.launch(given, *cotangents(given), checkpoints, Mapping(1, 32, 4))
    y, wide = torch.empty_like(want), torch.zeros(1, sum(LENGTHS), 16, dtype=want.dtype)
    found = bwd.launch(
        given, *cotangents(given), checkpoints, Mapping(1, 32, 4), dz=wide[..., 8:], y=y
    )
    # sums in another order round to other halves at times
    torch.testing.assert_close(y, want, rtol=2**-7, atol=1e-6)
    assert torch.equal(wide[..., 8:], known[6]) and not wide[..., :8].any()
    assert all(torch.equal(f, k) for f, k in zip(found, known, strict=True))


@pytest.mark.parametrize("name", ["dy", "B"])
def test_tokens_too_far_apart_are_refused(kernels, name):
    given = made(1, 2, 8, 16)
    # 512 MiB, which nothing touches
    far = torch.empty(2**27 + 16).as_strided((1, 2, 16), (2**28, 2**27, 1))
    dy = far[..., :8] if name == "dy" else given.x
    given = given._replace(B=far[:, :, None]) if name == "B" else given
    with pytest.raises(BackendError, match=rf"{name}'s tokens lie \(134217728\) elements"):
        bwd.launch(given, dy, None, torch.zeros(1, 1, 8, 16), Mapping(1, 16, 4))


def test_what_is_not_a_number_stays_in_its_sequence(kernels):
    """Of three in segments of 32, the second is not a number in the last of them."""
    given = made(1, 96, 8, 16, rows=3, cu_seqlens=pack([40, 30, 26]))
    given.x[:, 66] = nan
    got = gradients(given, Mapping(1, 32, 4, 3))
    assert got["dt"][:, 66].isnan().all()
    assert not got["dt"][:, :40].isnan().any() and not got["dt"][:, 70:].isnan().any()
    # and what the gradient is not
    given = given._replace(x=given.x.nan_to_num(), z=None)
    dy, dfinal_state = cotangents(given)
    dy[:, 66] = nan
    _, _, checkpoints = fwd.launch(given, FWD, 32)
    dx, *_, dinitial_state = bwd.launch(given, dy, dfinal_state, checkpoints, Mapping(1, 32, 4, 3))
    assert dx[:, 40:67].isnan().all()
    assert not dx[:, :40].isnan().any() and not dx[:, 67:].isnan().any()
    assert dinitial_state.isnan().all((1, 2)).tolist() == [False, True, False]


@pytest.fixture
def hopper(monkeypatch, kernels):
    """The backend as on an H200."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: sass.HOPPER)


def options_of(given):
    names = ("D", "z", "dt_bias", "initial_state", "cu_seqlens", "dt_softplus")
    return {name: getattr(given, name) for name in names}


def scan(given, leaves):
    x, dt, A, B, C, *_ = leaves
    return cuda.run(x, dt, A, B, C, **options_of(given))


def test_gradients_flow_through_the_backend(hopper):
    given = made(1, 75, 8, 16)
    leaves = [t.clone().requires_grad_() for t in given[:9]]
    options = options_of(given) | dict(zip(fwd.TENSORS[5:9], leaves[5:], strict=True))
    outputs = cuda.run(*leaves[:5], **options)
    found = torch.autograd.grad(outputs, leaves, cotangents(given))
    assert_near(dict(zip(fwd.TENSORS, found, strict=False)), truth(given))


@pytest.mark.parametrize("output", [0, 1], ids=["y", "state"])
@pytest.mark.parametrize("length", [0, 20])
def test_gradients_flow_from_one_output(hopper, output, length):
    given = made(1, length, 8, 16)
    leaves = [t.clone().requires_grad_() for t in given[:9]]
    options = options_of(given) | dict(zip(fwd.TENSORS[5:9], leaves[5:], strict=True))
    given_back = [torch.zeros_like(t) for t in cotangents(given)]
    given_back[output] = cotangents(given)[output]
    outputs = cuda.run(*leaves[:5], **options)
    found = torch.autograd.grad(outputs[output], leaves, given_back[output])
    assert_near(dict(zip(fwd.TENSORS, found, strict=False)), truth(given, given_back))


def test_no_gradient_needs_no_checkpoints(hopper, monkeypatch):
    distances = []
    known = fwd.launch

    def launch(given, mapping, checkpoint_every=0):
        distances.append(checkpoint_every)
        return known(given, mapping, checkpoint_every)

    monkeypatch.setattr(fwd, "launch", launch)
    given = made(1, 5, 8, 16)
    scan(given, given)
    leaves = [t.clone().requires_grad_() for t in given[:5]]
    with torch.no_grad():
        scan(given, leaves)
    scan(given, leaves)
    assert distances == [0, 0, bwd.distance(16)]


def test_second_derivatives_are_refused(hopper):
    given = made(1, 5, 8, 16)
    leaves = [t.clone().requires_grad_() for t in given[:5]]
    y, _ = scan(given, leaves)
    (dx,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


@pytest.mark.slow
def test_compiled_graphs_hold_the_scan_whole(monkeypatch, folder):
    given = made(2, 20, 8, 16)
    leaves = [t.clone().requires_grad_() for t in given[:5]]
    # torch cannot trace the functions that fill what torch.empty returns
    monkeypatch.undo()
    monkeypatch.setattr(fwd.loader, "load", on_cpu.loader(folder))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: sass.HOPPER)

    def doubled(x, *rest):
        y, final_state = scan(given, (2 * x, *rest))
        return y + 1, final_state

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True, backend="aot_eager")
    want, got = (
        torch.autograd.grad(f(*leaves), leaves, cotangents(given)) for f in (doubled, compiled)
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{}, {"D": None, "z": None, "initial_state": None}], ids=str)
def test_ops_are_proper(hopper, changed):
    given = made(2, 9, 8, 16, **changed)
    checked = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(cuda.selective_scan_cuda, (*given, True), test_utils=checked)
    _, _, checkpoints = cuda.selective_scan_cuda(*given, True)
    inputs = (*cotangents(given), *given[:10], checkpoints, *given[10:])
    torch.library.opcheck(cuda.selective_scan_cuda_backward, inputs, test_utils=checked)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "address"])
def test_sanitizers_find_nothing(folder, kind):
    """Races between lanes, and accesses outside the tensors."""
    check_sanitizer("tests.kernels.test_bwd_on_cpu", folder, kind, f"{len(SANITIZED)} mappings")


def main(folder, kind):
    fwd.loader.load = on_cpu.loader(Path(folder), "-O1", "-g", f"-fsanitize={kind}")
    for n, mapping in SANITIZED:
        gradients(made(1, 75, 40, n), mapping)
        given = made(1, sum(LENGTHS), 8, n, rows=len(LENGTHS), cu_seqlens=pack(LENGTHS))
        gradients(given, mapping)
    sys.stdout.write(f"{len(SANITIZED)} mappings\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
