"""Mamba-1's one node in training: the general path's function and gradients, from less memory.

Compiled backends have the launchers that it runs; on the CPU, stand-ins do (launchers.py). The
general path is the layer itself without them.
"""

from collections import Counter
from dataclasses import replace
from math import inf

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybridzoo.comm import SINGLE
from hybridzoo.errors import BackendError
from hybridzoo.kernels.dispatch import use
from hybridzoo.layers import Sequence
from hybridzoo.layers.mamba1 import Mamba1Config
from tests import gloo
from tests.layers.cases import D_MODEL, PLAIN, full_weights, randn
from tests.layers.launchers import EVERY, launchers
from tests.layers.tp import joined, run_layer
from tests.models import make_model
from tests.test_recompute import assert_equal_to_the_bit, gradients, one_kind, with_mode

# float64: sums in another order
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
LENGTH = 37
TINY = Mamba1Config.tiny()
CONFIGS = {
    "learned": TINY,
    "weightless": replace(TINY, x_norm="weightless"),
    "no_norm": replace(TINY, x_norm="none"),
    "no_bias": replace(TINY, conv_bias=False, in_proj_bias=False, out_proj_bias=False),
    "published": Mamba1Config(),
    "no_limit": replace(TINY, dt_limit=(0.0, inf)),
}
ends = torch.tensor([0, 5, 5, 6, LENGTH], dtype=torch.int32)
PACK = Sequence.build(LENGTH, cu_seqlens=ends, max_seqlen=31)

every_config = pytest.mark.parametrize("name", CONFIGS)
every_layout = pytest.mark.parametrize("ctx", [PLAIN, PACK], ids=["rows", "pack"])


def make_layer(name="learned", dtype=torch.float64, **where):
    layer = CONFIGS[name].build(D_MODEL, dtype=dtype, **where)
    layer.load_state_dict(full_weights(CONFIGS[name]))
    return layer


def is_one_node(y):
    return y.grad_fn is not None and y.grad_fn.name() == "_InnerBackward"


def outcome(layer, ctx=PLAIN, dtype=torch.float64, *, needs_dx=True, dy=None, device="cpu"):
    """y and every gradient there is, by name."""
    b = 1 if ctx.cu_seqlens is not None else 3
    x = randn(b, LENGTH, D_MODEL).to(device, dtype).requires_grad_(needs_dx)
    layer.zero_grad()
    y = layer(x, None, ctx)
    dy = randn(b, LENGTH, D_MODEL, seed=1).to(device, dtype) if dy is None else dy
    y.backward(dy)
    grads = {k: p.grad for k, p in layer.named_parameters()} | {"x": x.grad}
    return y, {k: g for k, g in grads.items() if g is not None}


def both(layer, *args, **options):
    """The general path's outcome, then the node's."""
    general = outcome(layer, *args, **options)
    with launchers() as runs:
        ours = outcome(layer, *args, **options)
    assert not is_one_node(general[0])
    assert is_one_node(ours[0])
    assert runs == {"conv_forward": 2, "scan_forward": 1, "scan_backward": 1, "conv_backward": 1}
    return general, ours


def assert_same(got, expected):
    # the same products and ops in the same order
    assert torch.equal(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert grad.any(), name
        assert got[1][name].dtype == grad.dtype
        torch.testing.assert_close(
            got[1][name], grad, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_layout
@every_config
def test_it_is_the_general_paths_function(name, ctx):
    general, ours = both(make_layer(name), ctx)
    assert ours[1].keys() == {"x", *dict(make_layer(name).named_parameters())}
    assert_same(ours, general)


@every_config
def test_y_is_equal_to_the_bit_in_float32(name):
    general, ours = both(make_layer(name).float(), PLAIN, torch.float32)
    assert torch.equal(ours[0], general[0])


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@every_layout
@pytest.mark.parametrize("name", ["learned", "no_norm"])
@pytest.mark.parametrize("is_autocast", [False, True], ids=["bf16", "autocast"])
def test_half_precision_costs_no_more_than_in_the_general_path(name, ctx, is_autocast):
    narrow = make_layer(name, torch.float32 if is_autocast else torch.bfloat16)
    exact = CONFIGS[name].build(D_MODEL, dtype=torch.float64)
    exact.load_state_dict(narrow.state_dict())
    _, truth = outcome(exact, ctx, dy=randn(*shape(ctx), seed=1).bfloat16().double())
    dtype = torch.float32 if is_autocast else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        dy = randn(*shape(ctx), seed=1).bfloat16()
        general, ours = both(narrow, ctx, dtype, dy=dy)
    assert ours[0].dtype == torch.bfloat16
    assert torch.equal(ours[0], general[0])
    for key, grad in general[1].items():
        assert ours[1][key].dtype == grad.dtype
        # a gradient of few numbers may be lucky: half a bf16 unit is 2e-3
        assert error(ours[1][key], truth[key]) < 1.2 * error(grad, truth[key]) + 2e-3, key


@pytest.mark.parametrize("name", ["learned", "no_norm"])
def test_the_backwards_own_autocast_changes_nothing(name):
    """Many call backward() within the context that the forward was outside of."""
    layer = make_layer(name, torch.float32)
    with launchers():
        _, plain = outcome(layer, dtype=torch.float32)
        x = randn(3, LENGTH, D_MODEL).float().requires_grad_()
        layer.zero_grad()
        y = layer(x, None, PLAIN)
        with torch.autocast("cpu", torch.bfloat16):
            y.backward(randn(3, LENGTH, D_MODEL, seed=1).float())
    inner = {k: p.grad for k, p in layer.named_parameters() if not k.startswith("in_proj")}
    for key, grad in inner.items():
        assert torch.equal(grad, plain[key]), key


def shape(ctx):
    return (3 if ctx.cu_seqlens is None else 1, LENGTH, D_MODEL)


@every_config
def test_it_takes_any_gradients_layout(name):
    dy = randn(D_MODEL, LENGTH, 3, seed=1).permute(2, 1, 0)
    for given in (dy, torch.ones((), dtype=torch.float64).expand(3, LENGTH, D_MODEL)):
        general, ours = both(make_layer(name), dy=given)
        assert_same(ours, general)


@every_config
def test_an_input_may_need_no_gradient(name):
    general, ours = both(make_layer(name), needs_dx=False)
    assert "x" not in ours[1]
    assert_same(ours, general)


class Ops(TorchDispatchMode):
    """Names of the ops that run, and elements of what each gives."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # what the tests' torch.empty adds is not counted, nor what computes nothing
        is_idle = func.is_view or func.name().startswith(("aten::fill_", "aten::_unsafe_view"))
        if isinstance(out, torch.Tensor) and not is_idle:
            self.ran.append((func.name(), out.numel()))
        return out

    def count(self, *names):
        return sum(name in names for name, _ in self.ran)


@every_config
@pytest.mark.parametrize("only", dict(make_layer().named_parameters()))
def test_one_trained_parameter_alone_has_its_gradient(name, only):
    layer = make_layer(name)
    if only not in dict(layer.named_parameters()):
        pytest.skip(f"this layer has no {only}")
    for key, p in layer.named_parameters():
        p.requires_grad_(key == only)
    general = outcome(layer, needs_dx=False)
    with launchers():
        ours = outcome(layer, needs_dx=False)
    assert is_one_node(ours[0])
    assert ours[1].keys() == {only}
    assert_same(ours, general)


def test_frozen_weights_cost_no_products():
    layer, x = make_layer(), randn(3, LENGTH, D_MODEL).requires_grad_()
    n = {}
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        with launchers():
            y = layer(x, None, PLAIN)
            with Ops() as ops:
                y.sum().backward()
        n[frozen] = ops.count("aten::mm", "aten::addmm", "aten::addmm_")
    # dt, dy, the gradients of dt | B | C, x's by x_proj and by in_proj; else four weights' as well
    assert n == {True: 5, False: 9}


def test_nothing_as_wide_as_the_channels_is_joined_or_added_up():
    layer = replace(CONFIGS["published"], d_inner=64).build(D_MODEL, dtype=torch.float64)
    layer.init_weights(0, "", 1)
    x = randn(3, LENGTH, D_MODEL).requires_grad_()
    with launchers():
        y = layer(x, None, PLAIN)
        with Ops() as ops:
            y.backward(randn(*y.shape))
    wide = Counter(name for name, n in ops.ran if n >= 3 * LENGTH * 64)
    # xz's gradient and y; dt and dy; x_proj's product, which is added in place
    assert wide == {"aten::new_empty": 2, "aten::mm": 2, "aten::addmm_": 1}


def test_frozen_layers_behind_record_nothing():
    layer, x = make_layer().requires_grad_(False), randn(3, LENGTH, D_MODEL)
    with launchers() as runs:
        assert not layer(x, None, PLAIN).requires_grad
    assert not runs


def test_a_second_derivative_is_refused():
    layer, x = make_layer(), randn(3, LENGTH, D_MODEL).requires_grad_()
    with launchers():
        y = layer(x, None, PLAIN)
        with pytest.raises(BackendError, match="create_graph is on"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_two_backwards_add_up():
    layer, x = make_layer(), randn(3, LENGTH, D_MODEL).requires_grad_()
    with launchers():
        y = layer(x, None, PLAIN)
        y.sum().backward(retain_graph=True)
        once = {k: p.grad.clone() for k, p in layer.named_parameters()}
        y.sum().backward()
    for key, p in layer.named_parameters():
        assert torch.equal(p.grad, 2 * once[key]), key


def test_hooks_of_parameters_run_once():
    layer, seen = make_layer(), []
    for key, p in layer.named_parameters():
        p.register_hook(lambda grad, key=key: seen.append(key))
    with launchers():
        outcome(layer)
    assert sorted(seen) == sorted(dict(layer.named_parameters()))


@every_config
def test_it_keeps_what_cannot_be_computed_again(name):
    layer, x = make_layer(name), randn(3, 64, D_MODEL)
    (i, r), n = CONFIGS[name].widths(D_MODEL), CONFIGS[name].d_state
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with launchers(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x, None, PLAIN)
    assert is_one_node(y)
    for t in (x, *layer.parameters()):
        kept.pop(t.untyped_storage().data_ptr(), None)
    xz, dtBC, A = (8 * size for size in (3 * 64 * 2 * i, 3 * 64 * (r + 2 * n), i * n))
    checkpoints = 4 * 3 * (64 // EVERY) * i * n
    assert sum(kept.values()) == xz + dtBC + A + checkpoints


@pytest.mark.parametrize("mode", ["mixer", "full"])
@pytest.mark.parametrize("name", ["mamba1", "mamba1-no_norm"])
def test_recomputing_it_changes_no_bit(name, mode):
    config = one_kind(name, dropout=0.2)
    with launchers() as runs:
        plain = gradients(make_model(config, dtype=torch.float32))
        assert runs["scan_backward"]
        again = gradients(with_mode(make_model(config, dtype=torch.float32), mode))
    assert runs["scan_forward"] == 3 * runs["scan_backward"] / 2
    assert_equal_to_the_bit(again, plain)


def run_rank(parallel, *args):
    with launchers() as runs:
        return run_layer(parallel, *args), runs["scan_backward"]


@pytest.mark.parametrize("world", [2, 4])
@every_config
def test_ranks_compute_one_ranks_function(name, world):
    config, weights = CONFIGS[name], full_weights(CONFIGS[name])
    args = (config, weights, randn(2, 11, D_MODEL), randn(2, 11, D_MODEL, seed=1))
    one = run_layer(SINGLE, *args)
    ranks = []
    for rank, n_backwards in gloo.run(world, run_rank, *args):
        assert n_backwards == 1
        ranks.append(rank)
        for what in ("y", "dx"):
            torch.testing.assert_close(rank.outputs[what], one.outputs[what], **TOLERANCE)
    for key, grad in joined(config.params(D_MODEL), [r.grads for r in ranks]).items():
        torch.testing.assert_close(
            grad, one.grads[key], **TOLERANCE, msg=lambda m, k=key: f"{k}: {m}"
        )


class Doubled(nn.Module):
    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x):
        return 2 * self.wrapped(x)


class Marked(torch.Tensor):
    """A tensor that is not torch's own, as a distributed or quantised one."""


def hooked(layer, name):
    getattr(layer, name).register_forward_hook(lambda module, given, y: 2 * y)


def before(layer, name):
    getattr(layer, name).register_forward_pre_hook(lambda module, given: (2 * given[0],))


def behind(layer, name):
    getattr(layer, name).register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))


def wrapped(layer, name):
    setattr(layer, name, Doubled(getattr(layer, name)))


def patched(layer, name):
    module = getattr(layer, name)
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def parametrized(layer, name):
    nn.utils.parametrize.register_parametrization(getattr(layer, name), "weight", Twice())


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def biased(layer, name):
    module = getattr(layer, name)
    module.bias = nn.Parameter(torch.ones(module.weight.shape[0], dtype=torch.float64))


def marked(layer, name):
    module = getattr(layer, name)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Marked))


changes = [hooked, before, behind, wrapped, patched, parametrized, biased, marked]


@pytest.mark.parametrize("change", changes, ids=lambda f: f.__name__)
@pytest.mark.parametrize("child", ["x_proj", "dt_proj", "out_proj", "B_norm"])
def test_a_changed_module_is_called(child, change):
    if child == "B_norm" and change in (hooked, wrapped, patched, biased):
        pytest.skip("a norm gives a pair, which this change would not, and has no bias")
    if child == "out_proj" and change is biased:
        pytest.skip("it may have a bias")
    layer = make_layer()
    change(layer, child)
    expected = outcome(layer)
    with launchers() as runs:
        got = outcome(layer)
    assert not runs
    assert_same(got, expected)


def test_a_wrapped_in_proj_keeps_the_node():
    layer = make_layer()
    wrapped(layer, "in_proj")
    general, ours = both(layer)
    assert_same(ours, general)


def test_hooks_on_every_module_are_called():
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, x, y: seen.append(m))
    layer = make_layer()
    with launchers() as runs:
        layer(randn(1, 5, D_MODEL), None, PLAIN)
    hook.remove()
    assert layer.x_proj in seen
    assert not runs


def test_parameters_replaced_by_function_have_their_gradients():
    layer, x = make_layer(), randn(2, 7, D_MODEL)

    def run():
        leaves = {k: w.requires_grad_() for k, w in full_weights(TINY).items()}
        others = {k: w * 1.5 for k, w in leaves.items()}
        y = torch.func.functional_call(layer, others, (x, None, PLAIN))
        y.square().sum().backward()
        return y, {k: w.grad for k, w in leaves.items()}

    expected = run()
    with launchers():
        got = run()
    assert is_one_node(got[0])
    assert_same(got, expected)


def padded(length):
    mask = torch.arange(length) >= torch.tensor([[2], [0]])
    return Sequence.build(length, attention_mask=mask)


def test_states_padding_and_inference_take_the_general_path():
    layer, x = make_layer(), randn(2, 9, D_MODEL)
    with launchers() as runs:
        layer(x, layer.init_state(2, 16), PLAIN)
        layer(x, None, padded(9))
        replace(TINY, activation="gelu").build(D_MODEL, dtype=x.dtype)(x, None, PLAIN)
        with torch.no_grad():
            layer(x, None, PLAIN)
            layer(x[:, :1], layer.init_state(2, 16), PLAIN)
    assert not runs


def test_weights_of_another_dtype_are_refused_as_in_the_general_path():
    layer, x = make_layer(), randn(2, 9, D_MODEL)
    layer.out_proj.float()
    with launchers(), pytest.raises(RuntimeError, match="dtype"):
        layer(x, None, PLAIN)


def test_a_backend_without_launchers_takes_the_general_path():
    layer, x = make_layer(), randn(2, 9, D_MODEL)
    with use(selective_scan="reference", causal_conv1d="reference"):
        assert not is_one_node(layer(x, None, PLAIN))


def test_a_graph_being_traced_takes_the_general_path(monkeypatch):
    layer, x = make_layer(), randn(2, 9, D_MODEL)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with launchers() as runs:
        assert not is_one_node(layer(x, None, PLAIN))
    assert not runs


@pytest.mark.parametrize("length", [0, 1, 2, 33])
def test_rows_of_any_length(length):
    layer = make_layer()

    def run():
        layer.zero_grad()
        x = randn(2, length, D_MODEL).requires_grad_()
        y = layer(x, None, PLAIN)
        y.square().sum().backward()
        return y, {k: p.grad for k, p in layer.named_parameters()} | {"x": x.grad}

    (y, grads), _ = run(), layer.zero_grad()
    with launchers():
        ours = run()
    assert is_one_node(ours[0])
    assert torch.equal(ours[0], y)
    torch.testing.assert_close(ours[1], grads, **TOLERANCE)


def on_gpu(name, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    layer = CONFIGS[name].build(D_MODEL, device="cuda", dtype=dtype)
    layer.load_state_dict(full_weights(CONFIGS[name]))
    return layer


@pytest.mark.gpu
@every_layout
@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_kernels_give_the_general_paths_gradients(name, ctx, dtype, monkeypatch):
    layer = on_gpu(name, dtype)
    if ctx.cu_seqlens is not None:
        ctx = replace(ctx, cu_seqlens=ctx.cu_seqlens.cuda())
    dy = randn(*shape(ctx), seed=1).to("cuda", dtype)
    ours = outcome(layer, ctx, dtype, dy=dy, device="cuda")
    assert is_one_node(ours[0])
    monkeypatch.setattr("hybridzoo.layers.mamba1.find_launchers", lambda *_: None)
    general = outcome(layer, ctx, dtype, dy=dy, device="cuda")
    assert not is_one_node(general[0])
    exact = CONFIGS[name].build(D_MODEL, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    # the input that the others had, rounded
    x = randn(*shape(ctx)).to(dtype).double().requires_grad_()
    cpu = ctx if ctx.cu_seqlens is None else replace(ctx, cu_seqlens=ctx.cu_seqlens.cpu())
    y = exact(x, None, cpu)
    y.backward(dy.cpu().double())
    truth = {k: p.grad for k, p in exact.named_parameters()} | {"x": x.grad}
    # a gradient of few numbers may be lucky: half a unit of bf16 is 2e-3, of fp32 3e-8
    floor = 2e-3 if dtype == torch.bfloat16 else 1e-6
    pairs = {"y": (ours[0], general[0], y)}
    pairs |= {k: (ours[1][k], general[1][k], truth[k]) for k in truth}
    for key, (got, other, expected) in pairs.items():
        assert error(got.cpu(), expected) < 1.5 * error(other.cpu(), expected) + floor, key


@pytest.mark.gpu
@every_config
def test_forward_and_backward_are_captured(name):
    layer = on_gpu(name, torch.bfloat16)
    x = randn(3, LENGTH, D_MODEL).to("cuda", torch.bfloat16).requires_grad_()
    dy = randn(3, LENGTH, D_MODEL, seed=1).to("cuda", torch.bfloat16)
    inputs = [x, *layer.parameters()]

    def run():
        y = layer(x, None, PLAIN)
        return y, *torch.autograd.grad(y, inputs, dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # warm up: kernels are compiled, libraries allocate their workspaces
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.copy_(randn(3, LENGTH, D_MODEL, seed=2))
    graph.replay()
    eager = run()
    assert is_one_node(eager[0])
    for got, expected in zip(captured, eager, strict=True):
        # sums go in a fixed order
        assert torch.equal(got, expected)


@pytest.mark.gpu
def test_it_keeps_two_halves_and_little_else_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    layer = Mamba1Config().build(256, device="cuda", dtype=torch.bfloat16)
    layer.init_weights(0, "", 1)
    x = randn(2, 1024, 256).to("cuda", torch.bfloat16).requires_grad_()
    layer(x, None, PLAIN)  # warm up: libraries allocate their workspaces
    before = torch.cuda.memory_allocated()
    y = layer(x, None, PLAIN)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    one = 2 * 1024 * 512 * 2
    # xz; a state every 32 tokens, in fp32, is one more; 48 of 512 channels, and A
    assert kept < 3.2 * one
