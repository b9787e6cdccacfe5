"""raw_op: what torch.library.custom_op promises, for less of the host's time."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hybridzoo.kernels.raw_op import raw_op

launches = []


@raw_op("test_scaled")
def scaled(x: Tensor, scale: Tensor | None, power: float) -> tuple[Tensor, Tensor]:
    # a graph that is traced would run this once, for all calls
    launches.append(torch.compiler.is_compiling())
    return x * (1.0 if scale is None else scale) * power, x.sum()[None]


@scaled.register_fake
def _(x, scale, power):
    return x.new_empty(x.shape), x.new_empty(1)


def _backward(ctx, dy, dtotal):
    x, scale = ctx.saved_tensors
    dx = dy * ctx.power * (1.0 if scale is None else scale) + dtotal
    return dx, None if scale is None else (dy * x * ctx.power).sum().reshape(1), None


def _setup_context(ctx, inputs, output):
    *tensors, ctx.power = inputs
    ctx.save_for_backward(*tensors)


scaled.register_autograd(_backward, setup_context=_setup_context)


@raw_op("test_added", mutates=("state",))
def added(x: Tensor, state: Tensor) -> Tensor:
    launches.append(torch.compiler.is_compiling())
    # as a kernel writes, of which torch knows nothing
    state.detach().numpy()[:] += x.numpy()
    return 2 * x


@added.register_fake
def _(x, state):
    return x.new_empty(x.shape)


def inputs(has_scale=True):
    x = torch.arange(6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    scale = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    return x, scale if has_scale else None, 0.5


@pytest.mark.parametrize("has_scale", [False, True])
def test_op_is_a_proper_one(has_scale):
    torch.library.opcheck(torch.ops.hybridzoo.test_scaled.default, inputs(has_scale))


def test_op_in_place_is_a_proper_one():
    op = torch.ops.hybridzoo.test_added.default
    torch.library.opcheck(op, (torch.ones(3), torch.zeros(3)))


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_gradients_are_those_given(compiler):
    def loss(x, scale):
        y, total = scaled(2 * x, scale, 0.5)
        return (y * y).sum() + 3 * total.sum()

    x, scale, _ = inputs()
    call = torch.compile(loss, fullgraph=True, backend=compiler) if compiler else loss
    dx, dscale = torch.autograd.grad(call(x, scale), (x, scale))
    torch.testing.assert_close(dx, 2 * x * scale**2 + 6)
    torch.testing.assert_close(dscale, (2 * x**2 * scale).sum().reshape(1))


def test_result_has_a_gradient_only_where_one_is_wanted():
    x, scale, power = inputs()
    assert scaled(x, scale, power)[0].requires_grad
    assert not scaled(x.detach(), None, power)[0].requires_grad
    with torch.no_grad():
        assert not scaled(x, scale, power)[0].requires_grad
    with torch.inference_mode():
        assert scaled(x, scale, power)[0].is_inference()


@pytest.mark.parametrize("name", ["test_scaled", "test_added"])
def test_launch_is_not_traced_behind_a_graphs_end(name):
    op = getattr(torch.ops.hybridzoo, name).default
    rest = {"test_scaled": (None, 2.0), "test_added": (torch.zeros(2, 3),)}[name]

    @torch.compile(backend="eager")
    def broken(xs):
        # a frame whose graph ends in such a place runs as plain Python, and so does what it calls
        with torch.no_grad():
            for x in xs:
                torch._dynamo.graph_break()
                op(x, *rest)

    launches.clear()
    for _ in range(3):
        broken([torch.ones(2, 3)])
    assert launches == [False] * 3


def test_writing_what_was_saved_is_told_to_autograd():
    weight, state = torch.ones(3, requires_grad=True), torch.ones(3)
    loss = (weight * state).sum()
    added(torch.ones(3), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        state = torch.zeros(3)
        added(torch.ones(3), state)
        assert state.tolist() == [1.0, 1.0, 1.0]


def test_call_does_not_import_the_compiler():
    lines = f"""
        import sys, torch
        sys.path.insert(0, {sys.path[0]!r})
        from tests.kernels.test_raw_op import added, scaled
        x = torch.ones(2, 3, requires_grad=True)
        scaled(x, None, 2.0)[0].sum().backward()
        added(torch.ones(3), torch.ones(3))
        assert x.grad.eq(2).all() and "torch._dynamo" not in sys.modules
    """
    code = "\n".join(line.strip() for line in lines.splitlines())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
