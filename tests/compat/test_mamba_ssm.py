"""compat.mamba_ssm: the scans in mamba-ssm's layouts, against the formulas it publishes."""

import inspect
import itertools

import pytest
import torch

from hybridzoo.compat import mamba_ssm
from hybridzoo.compat.mamba_ssm import mamba_inner_fn, selective_scan_fn, selective_state_update
from hybridzoo.errors import BackendError
from tests.compat import oracles
from tests.kernels.compare import Call, assert_same, assert_within, randn, run_fwd_bwd

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both_precisions = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
MAPS = ["constant", "variable", 1, 2, 6]


def made(*shape, seed, dtype, device="cpu"):
    return randn(*shape, seed=seed, dtype=dtype, device=device)


def scan_inputs(b, d, l, n, dtype=torch.float64, device="cpu", B="variable", C="variable"):
    """Of maps constant, variable (b, n, l), or with so many groups (b, g, n, l)."""
    wide = torch.promote_types(dtype, torch.float32)

    def a_map(kind, seed):
        # as theirs: constant ones in the weights' dtype
        shape = {"constant": (d, n), "variable": (b, n, l)}.get(kind, (b, kind, n, l))
        of = wide if kind == "constant" else dtype
        return made(*shape, seed=seed, dtype=of, device=device)

    return Call(
        {
            "u": made(b, d, l, seed=0, dtype=dtype, device=device),
            "delta": made(b, d, l, seed=1, dtype=dtype, device=device) * 0.5,
            "A": -made(d, n, seed=2, dtype=wide, device=device).exp(),
            "B": a_map(B, 3),
            "C": a_map(C, 4),
            "D": made(d, seed=5, dtype=wide, device=device),
            "z": made(b, d, l, seed=6, dtype=dtype, device=device),
            "delta_bias": made(d, seed=7, dtype=wide, device=device),
            "delta_softplus": True,
            "return_last_state": True,
        }
    )


def without(call, *names):
    return call.having(**dict.fromkeys(names))


def check(function, oracle, call, dtype, **baseline):
    """Outputs and every gradient within twice the error of the formula in fp32, rounded."""
    truth = run_fwd_bwd(oracle, call.to(torch.float64))
    plain = run_fwd_bwd(oracle, call.to(torch.float32).having(**baseline))
    plain = {name: t.to(dtype).double() for name, t in plain.items()}
    assert_within(run_fwd_bwd(function, call), plain, truth, dtype)


def test_signatures_are_theirs():
    """Positional callers are served: names in mamba-ssm 2.3.2's and causal-conv1d 1.6.1's order."""
    theirs = {
        "selective_scan_fn": "u delta A B C D=None z=None delta_bias=None delta_softplus=False "
        "return_last_state=False",
        "mamba_inner_fn": "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight "
        "out_proj_weight out_proj_bias A B=None C=None D=None delta_bias=None B_proj_bias=None "
        "C_proj_bias=None delta_softplus=True checkpoint_lvl=1 b_rms_weight=None c_rms_weight=None "
        "dt_rms_weight=None b_c_dt_rms_eps=1e-06",
        "selective_state_update": "state x dt A B C D=None z=None dt_bias=None dt_softplus=False "
        "state_batch_indices=None",
        "causal_conv1d_fn": "x weight bias=None seq_idx=None initial_states=None "
        "return_final_states=False final_states_out=None activation=None",
        "causal_conv1d_update": "x conv_state weight bias=None activation=None cache_seqlens=None "
        "conv_state_indices=None",
        "causal_conv1d_varlen_states": "x cu_seqlens state_len",
    }
    assert sorted(theirs) == sorted(mamba_ssm.__all__)
    for name, signature in theirs.items():
        found = inspect.signature(getattr(mamba_ssm, name)).parameters.values()
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in found)
        named = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in found]
        assert " ".join(named) == signature


@pytest.mark.parametrize("softplus", [False, True], ids=["raw", "softplus"])
@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=3)), ids=str)
def test_scan_is_exact_in_float64(options, softplus, device):
    call = scan_inputs(2, 6, 17, 5, device=device).having(delta_softplus=softplus)
    names = itertools.compress(["D", "z", "delta_bias"], options)
    call = without(call, *names)
    want = run_fwd_bwd(oracles.selective_scan, call)
    assert_same(run_fwd_bwd(selective_scan_fn, call), want)


@pytest.mark.parametrize(("B", "C"), list(itertools.product(MAPS, MAPS)))
def test_every_kind_of_map_is_exact_in_float64(B, C):
    call = scan_inputs(2, 6, 9, 5, B=B, C=C)
    want = run_fwd_bwd(oracles.selective_scan, call)
    assert_same(run_fwd_bwd(selective_scan_fn, call), want)


@both_precisions
@pytest.mark.parametrize("l", [1, 63, 129])
@pytest.mark.parametrize(("B", "C"), [("variable", 1), (2, 2), ("constant", "variable")], ids=str)
def test_scan_in_each_dtype(B, C, l, dtype, device):
    call = scan_inputs(2, 34, l, 16, dtype, device, B=B, C=C)
    check(selective_scan_fn, oracles.selective_scan, call, dtype)


@pytest.mark.parametrize("layout", ["time", "channels"])
def test_out_has_the_inputs_dtype_and_the_state_fp32(layout, device):
    call = scan_inputs(2, 6, 9, 5, torch.bfloat16, device)
    if layout == "channels":
        call = call.having(**{k: call.arguments[k].mT.contiguous().mT for k in ("u", "delta", "z")})
    out, state = selective_scan_fn(**call.arguments)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (out.shape, state.shape) == ((2, 6, 9), (2, 6, 5))
    alone = selective_scan_fn(*list(call.arguments.values())[:9])
    assert torch.equal(alone, out)
    # far from the 4e-3 of bf16
    _, truth = oracles.selective_scan(**call.to(torch.float64).arguments)
    torch.testing.assert_close(state.double(), truth.detach(), rtol=1e-5, atol=1e-5)


def test_the_kernel_gets_views(monkeypatch):
    seen = []

    def spy(*args, **kwargs):
        seen.extend([*args, kwargs["z"]])
        return args[0], None

    monkeypatch.setattr(mamba_ssm, "selective_scan", spy)
    call = scan_inputs(2, 6, 9, 5, B="constant", C="variable")
    selective_scan_fn(**call.arguments)
    given = [call.arguments[k] for k in ("u", "delta", "A", "B", "C", "z")]
    assert [t.data_ptr() for t in seen] == [t.data_ptr() for t in given]
    seen.clear()
    call = call.having(**{k: call.arguments[k].mT.contiguous().mT for k in ("u", "delta", "z")})
    selective_scan_fn(**call.arguments)
    assert all(seen[k].is_contiguous() for k in (0, 1, 5))
    seen.clear()
    selective_scan_fn(**scan_inputs(2, 6, 9, 5, B=2, C=2).arguments)
    # a group a channel only where the two differ
    assert seen[3].shape == seen[4].shape == (2, 9, 2, 5)


@pytest.mark.parametrize("name", ["A", "B", "C"])
@pytest.mark.parametrize("function", [selective_scan_fn, mamba_inner_fn, selective_state_update])
def test_complex_systems_are_refused_before_any_work(function, name):
    arguments = dict.fromkeys(inspect.signature(function).parameters)
    arguments[name] = torch.ones(2, 3, dtype=torch.complex64)
    message = f"^{function.__name__}: {name} is torch.complex64; the scans of hybridzoo are real. "
    with pytest.raises(BackendError, match=f"{message}Pass a real {name}, or keep mamba-ssm's"):
        function(**arguments)


def test_maps_that_do_not_fit_are_refused():
    call = scan_inputs(2, 6, 9, 5)
    for shape in [(2, 9, 5), (2, 4, 5, 9), (2, 0, 5, 9), (5, 6), (2, 5, 18), (1, 5, 9), (9,)]:
        for name in ("B", "C"):
            with pytest.raises(BackendError) as caught:
                selective_scan_fn(**call.having(**{name: torch.ones(shape)}).arguments)
            assert str(caught.value) == (
                f"selective_scan_fn: {name} is {shape}; for 2 sequences of 9 tokens, 6 channels "
                "and 5 states it is (6, 5), (2, 5, 9) or (2, g, 5, 9), g a divisor of 6. "
                "Transpose or cut it."
            )


def inner_inputs(dtype=torch.float64, device="cpu", l=17, d=12, n=5, r=3, w=3, maps="BC"):
    """Weights of 1 / sqrt(fan in); `maps` are those that x_proj makes."""
    b, d_model = 2, 8
    wide = torch.promote_types(dtype, torch.float32)

    def weight(*shape, seed, fan=1, of=dtype):
        return made(*shape, seed=seed, dtype=of, device=device) / fan**0.5

    call = Call(
        {
            "xz": made(b, 2 * d, l, seed=0, dtype=dtype, device=device),
            "conv1d_weight": weight(d, 1, w, seed=1, fan=w),
            "conv1d_bias": weight(d, seed=2),
            "x_proj_weight": weight(r + len(maps) * n, d, seed=3, fan=d),
            "delta_proj_weight": weight(d, r, seed=4, fan=r),
            "out_proj_weight": weight(d_model, d, seed=5, fan=d),
            "out_proj_bias": weight(d_model, seed=6),
            "A": -weight(d, n, seed=7, of=wide).exp(),
            "B": None if "B" in maps else weight(d, n, seed=8, of=wide),
            "C": None if "C" in maps else weight(d, n, seed=9, of=wide),
            "D": weight(d, seed=10, of=wide),
            "delta_bias": weight(d, seed=11, of=wide),
            "B_proj_bias": weight(n, seed=12) if "B" in maps else None,
            "C_proj_bias": weight(n, seed=13) if "C" in maps else None,
        }
    )
    return call


def norms(call, dtype, device="cpu"):
    """With weights of three norms."""
    d, n = call.arguments["A"].shape
    sizes = {"b_rms_weight": n, "c_rms_weight": n, "dt_rms_weight": d}
    weights = {
        name: 1 + 0.3 * made(size, seed=20 + k, dtype=dtype, device=device)
        for k, (name, size) in enumerate(sizes.items())
    }
    return call.having(**weights, b_c_dt_rms_eps=1e-2)


BIASES = ["conv1d_bias", "out_proj_bias", "D", "delta_bias", "B_proj_bias", "C_proj_bias"]


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("drop", [[], BIASES, *([name] for name in BIASES)], ids=str)
def test_inner_is_exact_in_float64(drop, normed):
    call = without(inner_inputs(), *drop)
    call = norms(call, torch.float64) if normed else call
    want = run_fwd_bwd(oracles.mamba_inner, call)
    assert_same(run_fwd_bwd(mamba_inner_fn, call), want)


@pytest.mark.parametrize("maps", ["", "B", "C"], ids=lambda m: f"x_proj makes {m or 'none'}")
def test_inner_takes_constant_maps(maps):
    call = inner_inputs(maps=maps)
    want = run_fwd_bwd(oracles.mamba_inner, call)
    assert_same(run_fwd_bwd(mamba_inner_fn, call), want)


def test_inner_without_a_softplus_and_at_either_checkpoint_level():
    call = inner_inputs().having(delta_softplus=False)
    want = run_fwd_bwd(oracles.mamba_inner, call)
    for level in (0, 1):
        assert_same(run_fwd_bwd(mamba_inner_fn, call.having(checkpoint_lvl=level)), want)


@both_precisions
@pytest.mark.parametrize("l", [1, 65])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_inner_in_each_dtype(normed, l, dtype, device):
    call = inner_inputs(dtype, device, l=l)
    call = norms(call, dtype, device) if normed else call
    # what lies between the ops is stored in the input's dtype, and so is a product's operand
    check(mamba_inner_fn, oracles.mamba_inner, call, dtype, stored=dtype)


def test_inner_refuses_what_would_have_no_effect():
    for name, maps in (("B", "C"), ("C", "B")):
        for beside in (f"{name}_proj_bias", f"{name.lower()}_rms_weight"):
            call = inner_inputs(maps=maps).having(**{beside: torch.ones(5, dtype=torch.float64)})
            message = f"^mamba_inner_fn: {name} is given beside a bias or norm of x_proj's {name};"
            with pytest.raises(BackendError, match=message):
                mamba_inner_fn(**call.arguments)
    with pytest.raises(BackendError, match=r"^mamba_inner_fn: checkpoint_lvl \(2\) is neither 0"):
        mamba_inner_fn(**inner_inputs().having(checkpoint_lvl=2).arguments)


def update_inputs(h, p, n, g, dtype=torch.float64, device="cpu", rows=7, tied=False, b=5):
    """With heads; `tied`: what mamba_ssm's Mamba2 passes, one number a head expanded."""
    wide = torch.promote_types(dtype, torch.float32)

    def a_head(*shape, seed, of=dtype):
        if not tied:
            return made(*shape, p, seed=seed, dtype=of, device=device)
        return made(*shape, seed=seed, dtype=of, device=device)[..., None].expand(*shape, p)

    A = -made(h, p, n, seed=3, dtype=wide, device=device).exp()
    return {
        "state": made(rows, h, p, n, seed=0, dtype=wide, device=device),
        "x": made(b, h, p, seed=1, dtype=dtype, device=device),
        "dt": a_head(b, h, seed=2),
        "A": A[:, :1, :1].expand(h, p, n) if tied else A,
        "B": made(b, g, n, seed=4, dtype=dtype, device=device),
        "C": made(b, g, n, seed=5, dtype=dtype, device=device),
        "D": a_head(h, seed=6, of=wide),
        "z": made(b, h, p, seed=7, dtype=dtype, device=device),
        "dt_bias": a_head(h, seed=8, of=wide),
        "dt_softplus": True,
        "state_batch_indices": torch.tensor([4, -1, 0, 6, -3], device=device, dtype=torch.int32),
    }


def updated(inputs):
    """The output, and the states, that were written where they were."""
    state = inputs["state"].clone()
    y = selective_state_update(**{**inputs, "state": state})
    assert y.dtype == inputs["x"].dtype
    return {"y": y.detach().cpu().double(), "state": state.cpu().double()}


def wanted(inputs, dtype):
    values = [t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t
              for t in inputs.values()]  # fmt: skip
    y, state = oracles.state_update(*values)
    return {"y": y.cpu().double(), "state": state.cpu().double()}


def check_update(inputs, want_of, dtype):
    truth, plain = wanted(want_of, torch.float64), wanted(want_of, torch.float32)
    got = updated(inputs)
    got = {name: t.view(truth[name].shape) for name, t in got.items()}
    for name, of in (("y", dtype), ("state", inputs["state"].dtype)):
        rounded = {name: plain[name].to(of).double()}
        assert_within({name: got[name]}, rounded, {name: truth[name]}, of)


def merged(inputs):
    """The same as channels without heads: state (rows, d, n)."""
    flat = {k: t.flatten(-2) for k, t in inputs.items() if k in ("x", "dt", "D", "z", "dt_bias")}
    flat["state"], flat["A"] = inputs["state"].flatten(1, 2), inputs["A"].flatten(0, 1)
    return {**inputs, **flat}


@both_precisions
@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize("heads", ["tied", "untied", "none"])
def test_update_in_each_dtype(heads, g, dtype, device):
    inputs = update_inputs(4, 9, 16, g, dtype, device, tied=heads == "tied")
    check_update(merged(inputs) if heads == "none" else inputs, inputs, dtype)


@pytest.mark.parametrize("dropped", ["D", "z", "dt_bias", "dt_softplus", "state_batch_indices"])
def test_update_without_an_option_is_exact_in_float64(dropped):
    inputs = update_inputs(2, 3, 5, 1, rows=5)
    inputs |= {"state_batch_indices": torch.tensor([1, 4, -1, 0, 3])}
    inputs[dropped] = False if dropped == "dt_softplus" else None
    assert_same(updated(inputs), wanted(inputs, torch.float64))


def test_update_takes_maps_without_groups():
    inputs = update_inputs(2, 3, 5, 1)
    bare = {**inputs, "B": inputs["B"][:, 0], "C": inputs["C"][:, 0]}
    assert_same(updated(bare), wanted(inputs, torch.float64))


def test_negative_rows_touch_nothing(device):
    inputs = update_inputs(2, 3, 5, 1, torch.float32, device)
    inputs["x"][[1, 4]] = torch.nan
    got = updated(inputs)
    assert torch.equal(got["state"][[1, 2, 3, 5]], inputs["state"][[1, 2, 3, 5]].cpu().double())
    assert not got["y"][[1, 4]].any()


def test_update_keeps_the_states_dtype(device):
    inputs = update_inputs(4, 9, 16, 1, torch.bfloat16, device)
    inputs["state"] = inputs["state"].bfloat16()
    check_update(inputs, inputs, torch.bfloat16)


def test_update_gives_no_gradient_as_theirs():
    inputs = update_inputs(2, 3, 5, 1)
    y = selective_state_update(**{**inputs, "A": inputs["A"].requires_grad_()})
    assert not y.requires_grad


def test_update_refuses_heads_it_cannot_write_in_place():
    inputs = update_inputs(2, 3, 5, 1)
    apart = torch.zeros(7, 2, 4, 5, dtype=torch.float64)[:, :, :3]
    with pytest.raises(BackendError, match=r"^selective_state_update: state has strides .*its"):
        selective_state_update(**{**inputs, "state": apart})
    with pytest.raises(BackendError, match="has 7 rows for 5 sequences"):
        selective_state_update(**{**inputs, "state_batch_indices": None})
