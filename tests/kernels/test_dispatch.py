"""dispatch: the first backend that can runs, the one asked for runs or says why it cannot."""

import os
import subprocess
import sys
import types

import pytest
import torch

from hybridzoo.errors import BackendError
from hybridzoo.kernels import dispatch
from hybridzoo.kernels.attention import attention
from hybridzoo.kernels.dispatch import Op, Row, explain, find_op, list_ops, use
from hybridzoo.kernels.rms_norm import rms_norm
from hybridzoo.kernels.selective_scan import selective_scan
from hybridzoo.kernels.ssd import ssd
from hybridzoo.layers.init import seeded

CPU = torch.device("cpu")
OPS = [
    "attention",
    "causal_conv1d",
    "causal_conv1d_step",
    "cross_entropy",
    "gated_rms_norm",
    "grouped_mm",
    "layer_norm",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
    "ssd",
]


def add_backend(monkeypatch, name, factor, limit=None, device_type=None):
    """A module toy_<name>: multiplies by `factor`, takes widths up to `limit`."""
    module = types.ModuleType(f"toy_{name}")

    def available(device):
        if device_type is not None and device.type != device_type:
            return f"it needs {device_type}"
        return None

    def why_not(x, scale=1.0):
        reason = available(x.device)
        if reason is None and limit is not None and x.shape[-1] > limit:
            reason = f"width ({x.shape[-1]}) exceeds its limit ({limit})"
        return reason

    def run(x, scale=1.0):
        return x * factor * scale

    module.available, module.why_not, module.run = available, why_not, run
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def toy(monkeypatch):
    """Runs `gpu` on CUDA, else `narrow` (times 2) up to 4 wide, else `any` (times 3)."""
    monkeypatch.setattr(dispatch, "_OPS", dict(dispatch._OPS))
    monkeypatch.setattr(dispatch, "_asked", {})
    add_backend(monkeypatch, "gpu", 1, device_type="cuda")
    add_backend(monkeypatch, "narrow", 2, limit=4)
    add_backend(monkeypatch, "any", 3)
    return Op("toy", {"gpu": "toy_gpu", "narrow": "toy_narrow", "any": "toy_any"})


def test_first_backend_that_can_runs(toy):
    assert toy(torch.ones(4)).tolist() == [2.0] * 4
    assert toy(torch.ones(5), scale=2.0).tolist() == [6.0] * 5
    assert toy.backends == ("gpu", "narrow", "any")


def test_backend_asked_for_runs_until_the_block_ends(toy):
    with use(toy="any"):
        assert toy(torch.ones(1)).item() == 3.0
        with use(toy="narrow"):
            assert toy(torch.ones(1)).item() == 2.0
        assert toy(torch.ones(1)).item() == 3.0
    assert toy(torch.ones(1)).item() == 2.0


def test_choice_ends_with_the_block_that_raised(toy):
    with pytest.raises(ZeroDivisionError), use(toy="any"):
        raise ZeroDivisionError
    assert toy.pick(torch.ones(1)) == "narrow"


def test_backend_asked_for_that_cannot_is_an_error_with_the_way_out(toy):
    with use(toy="narrow"), pytest.raises(BackendError) as error:
        toy(torch.ones(5))
    assert str(error.value) == (
        "toy: backend 'narrow' was asked for but width (5) exceeds its limit (4). "
        "Drop the request; 'any' supports it."
    )


def test_no_backend_at_all_gives_every_reason(toy, monkeypatch):
    only = Op("toy", {"gpu": "toy_gpu", "narrow": "toy_narrow"})
    want = (
        "toy: no backend supports these inputs; "
        "'gpu': it needs cuda; 'narrow': width (5) exceeds its limit (4)."
    )
    with pytest.raises(BackendError) as error:
        only(torch.ones(5))
    assert str(error.value) == want
    with use(toy="gpu"), pytest.raises(BackendError) as error:
        only(torch.ones(5))
    assert str(error.value) == want


def test_explanation_says_what_runs_and_why_not_the_others(toy):
    assert toy.explain(torch.ones(5)) == [
        Row("toy", "gpu", "it needs cuda", False),
        Row("toy", "narrow", "width (5) exceeds its limit (4)", False),
        Row("toy", "any", None, True),
    ]
    assert [row.chosen for row in toy.explain_device(CPU)] == [False, True, False]
    with use(toy="any"):
        assert [row.chosen for row in toy.explain_device(CPU)] == [False, False, True]
    with use(toy="gpu"):
        assert [row.chosen for row in toy.explain_device(CPU)] == [False, False, False]


def test_every_op_of_the_package_is_explained():
    rows = explain("cpu")
    assert sorted({row.op for row in rows} & set(OPS)) == OPS
    for name in OPS:
        own = [row for row in rows if row.op == name]
        assert [row.backend for row in own] == list(find_op(name).backends)
        assert sum(row.chosen for row in own) == 1
        assert own[-1].backend == "reference"


@pytest.mark.parametrize(
    ("choice", "want"),
    [
        ({"sdd": "reference"}, "kernels: op 'sdd' does not exist; .* Did you mean 'ssd'?"),
        ({"ssd": "referense"}, "ssd: backend 'referense' does not exist; .* 'reference'?"),
        ({"toy": "anny"}, "toy: backend 'anny' does not exist; there are: gpu, narrow, any."),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_unknown_names_are_refused_with_the_nearest(toy, choice, want):
    with pytest.raises(BackendError, match=want), use(**choice):
        pass
    assert dispatch._asked == {}


def test_command_line_choices_are_read(toy):
    assert dispatch.parse_backends("ssd=reference, toy=any,") == {"ssd": "reference", "toy": "any"}
    with pytest.raises(BackendError, match="--kernels: 'ssd' is not op=backend"):
        dispatch.parse_backends("ssd")
    dispatch.set_backends({"toy": "any"})
    assert toy(torch.ones(1)).item() == 3.0


def test_nothing_is_set_when_one_name_is_wrong(toy):
    with pytest.raises(BackendError):
        dispatch.set_backends({"toy": "any", "ssd": "cuda13"})
    assert dispatch._asked == {}


def test_environment_is_read_once():
    code = (
        "import os, torch\n"
        "from hybridzoo.kernels.attention import attention\n"
        "os.environ['HYBRIDZOO_KERNELS'] = 'attention=sdpa'\n"
        "x = torch.ones(1, 2, 1, 8)\n"
        "print(attention.op.pick(x, x, x))\n"
    )
    environ = {**os.environ, "HYBRIDZOO_KERNELS": "attention=reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.stdout == "reference\n", done.stderr


def test_environment_is_checked(toy, monkeypatch):
    monkeypatch.setenv("HYBRIDZOO_KERNELS", "atention=sdpa")
    with pytest.raises(BackendError, match="HYBRIDZOO_KERNELS: op 'atention' does not exist"):
        dispatch._read_environment()
    # an op's backends are not known before it is imported: its first call complains
    monkeypatch.setenv("HYBRIDZOO_KERNELS", "rms_norm=tritn")
    monkeypatch.setattr(dispatch, "_asked", dispatch._read_environment())
    with pytest.raises(BackendError, match="rms_norm: backend 'tritn' does not exist"):
        rms_norm(torch.ones(2, 3), eps=1e-5)


def test_missing_module_of_ours_is_an_error(toy):
    broken = Op("toy", {"gone": "hybridzoo.kernels.gone", "any": "toy_any"})
    with pytest.raises(ModuleNotFoundError, match=r"hybridzoo\.kernels\.gone"):
        broken(torch.ones(1))


def test_compiled_graphs_trace_through_the_choice(toy):
    """The first call of the op is the compiled one: its modules are imported while tracing."""
    compiled = torch.compile(lambda x: toy(x, scale=2.0), fullgraph=True, backend="eager")
    assert compiled(torch.ones(5)).tolist() == [6.0] * 5
    assert compiled(torch.ones(4)).tolist() == [4.0] * 4
    with use(toy="any"):
        assert compiled(torch.ones(4)).tolist() == [6.0] * 4


@pytest.mark.parametrize("is_cast", [True, False], ids=["autocast", "plain"])
def test_compiled_graphs_trace_through_autocast(is_cast):
    x, weight = torch.randn(3, 8), torch.randn(8)
    compiled = torch.compile(
        lambda x: rms_norm(x, weight, eps=1e-5)[0] @ weight, fullgraph=True, backend="eager"
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
        got = compiled(x)
    # the op itself stays fp32, the product after it does not
    assert got.dtype == (torch.bfloat16 if is_cast else torch.float32)
    normed = rms_norm(x, weight, eps=1e-5)[0].to(got.dtype)
    assert torch.equal(got, normed @ weight.to(got.dtype))


def test_compiled_graphs_trace_through_a_real_op():
    x, weight = torch.randn(3, 8), torch.randn(8)
    compiled = torch.compile(
        lambda x: rms_norm(x, weight, eps=1e-5), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x)[0], rms_norm(x, weight, eps=1e-5)[0])


def run_ssd():
    made = seeded(0, "ssd")
    x, B, C = (torch.randn(1, 9, 2, 4, generator=made) for _ in range(3))
    dt = torch.randn(1, 9, 2, generator=made)
    return ssd(x, dt, -torch.ones(2), B, C, dt_softplus=True, chunk_size=4)[0]


def run_selective_scan():
    made = seeded(0, "scan")
    x, dt = (torch.randn(1, 9, 4, generator=made) for _ in range(2))
    B, C = (torch.randn(1, 9, 1, 3, generator=made) for _ in range(2))
    return selective_scan(x, dt, -torch.ones(4, 3), B, C, dt_softplus=True)[0]


def run_attention():
    made = seeded(0, "attention")
    q, k, v = (torch.randn(1, 9, 2, 4, generator=made) for _ in range(3))
    with use(attention="reference"):
        return attention(q, k, v)


@pytest.mark.parametrize("call", [run_ssd, run_selective_scan, run_attention])
def test_autocast_rounds_nothing_inside_an_op(call):
    with torch.autocast("cpu", torch.bfloat16):
        got = call()
    assert torch.equal(got, call())


def test_ops_are_the_folders():
    assert set(OPS) <= set(list_ops())
