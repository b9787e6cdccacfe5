"""Stand-ins for what compiled backends launch: the reference ops and their autograd, on the CPU."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from hybridzoo.kernels.causal_conv1d import reference as conv
from hybridzoo.kernels.selective_scan import reference as scan

# as the cuda backend's lean checkpoints
EVERY = 32


@contextmanager
def launchers() -> Iterator[Counter[str]]:
    """The reference backends have launchers until the block ends; how often each has run."""
    runs: Counter[str] = Counter()

    def counted(function):
        def run(*args, **kwargs):
            runs[function.__name__] += 1
            # a kernel is no op: modes that watch the caller's do not see it
            with torch.no_grad(), _disable_current_modes():
                return function(*args, **kwargs)

        return run

    with (
        mock.patch.multiple(
            conv, create=True, launch_forward=counted(conv_forward),
            launch_backward=counted(conv_backward),
        ),
        mock.patch.multiple(
            scan, create=True, launch_forward=counted(scan_forward),
            launch_backward=counted(scan_backward),
        ),
    ):  # fmt: skip
        yield runs


def conv_forward(x, weight, bias, initial_state, cu_seqlens, silu):
    return conv.run(x, weight, bias, **_conv_options(initial_state, cu_seqlens, silu))


def conv_backward(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu, *, dx=None):
    assert dfinal_state is None and initial_state is None
    given = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        y, _ = conv.run(*given, **_conv_options(None, cu_seqlens, silu))
    found, dweight, dbias = _gradients(y, given, dy)
    return _written(found, dx), dweight, dbias, x.new_empty(0)


def _conv_options(initial_state, cu_seqlens, silu):
    activation = "silu" if silu else None
    return {"activation": activation, "initial_state": initial_state, "cu_seqlens": cu_seqlens}


def scan_forward(given, is_lean):
    assert is_lean
    y, final_state = _scan(given)
    return y, final_state, _checkpoints(given)


def scan_backward(given, dy, dfinal_state, checkpoints, *, dz=None, y=None):
    assert dfinal_state is None and given.initial_state is None
    assert torch.equal(checkpoints, _checkpoints(given))
    leaves = [None if t is None else t.detach().requires_grad_() for t in given[:9]]
    with torch.enable_grad():
        again, _ = _scan(given._replace(**dict(zip(given._fields, leaves, strict=False))))
    grads = _gradients(again, leaves, dy)
    if y is not None:
        assert y.is_contiguous() and y.shape == again.shape
        y.copy_(again)
    grads[6] = _written(grads[6], dz)
    return grads


def _scan(given):
    x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, softplus, *limit = given
    return scan.run(
        x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=softplus, dt_limit=tuple(limit),
        initial_state=initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _checkpoints(given):
    """Of the kernel's shape; what they hold is of the inputs, so that others' would be seen."""
    b, l, i = given.x.shape
    n = given.A.shape[1]
    shape = (b, math.ceil(l / EVERY), i, n)
    return given.dt.float().sum((1, 2))[:, None, None, None].expand(shape).contiguous()


def _gradients(y, leaves, dy):
    present = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(y, present, dy, allow_unused=True))
    return [y.new_empty(0) if t is None else next(grads) for t in leaves]


def _written(grad, place):
    if place is None:
        return grad
    assert place.stride(-1) == 1 and place.shape == grad.shape
    return place.copy_(grad)
