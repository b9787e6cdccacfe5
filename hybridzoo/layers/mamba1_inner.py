"""Mamba-1 from in_proj's output to out_proj's as one node of autograd, which keeps little for it.

    x | z = xz      x = silu(conv(x))      dt | B | C = norms(x_proj(x))
    out_proj(scan(x, dt_proj(dt), B, C) * silu(z))

Kept are xz, x_proj's output and the scan's checkpoints. The backward computes x and dt again, and
its scan gives y once more. The gradients of both halves of xz are written where they belong, and
x_proj's product is added to the scan's gradient of x: nothing is joined or summed afterwards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from torch.nn.modules import module as torch_module

from hybridzoo.comm import Axis
from hybridzoo.errors import BackendError
from hybridzoo.kernels.causal_conv1d import causal_conv1d
from hybridzoo.kernels.dispatch import autocast_dtype, needs_gradient, no_autocast
from hybridzoo.kernels.packing import check_packed
from hybridzoo.kernels.rms_norm import rms_norm
from hybridzoo.kernels.selective_scan import selective_scan
from hybridzoo.kernels.selective_scan.fwd import Arguments
from hybridzoo.layers.linear import RankLinear
from hybridzoo.layers.norm import RMSNorm


class Weights(NamedTuple):
    """The parameters in the order in which they are used, or of each whether it needs a gradient.

    None is what the layer has not; each rank has a share of out_bias.
    """

    conv: Any
    conv_bias: Any
    x_proj: Any
    dt_norm: Any
    B_norm: Any
    C_norm: Any
    dt_proj: Any
    dt_bias: Any
    A_log: Any
    D: Any
    out_proj: Any
    out_bias: Any


class Launchers(NamedTuple):
    """Two backends' modules: what their `launch_forward` and `launch_backward` run is no op."""

    conv: Any
    scan: Any


class Options(NamedTuple):
    """What is no tensor.

    Attributes:
        launchers: of the backends that run here.
        dt_limit: bounds of dt after softplus.
        norm_eps: of the norms of dt, B and C; None: there are none.
        tp: the ranks that share the channels.
    """

    launchers: Launchers
    dt_limit: tuple[float, float]
    norm_eps: float | None
    tp: Axis


def find_launchers(xz: Tensor, weights: Weights) -> Launchers | None:
    """What `inner` is to run; None where no gradient is wanted or it cannot compute it."""
    tensors = [t for t in (xz, *weights) if t is not None]
    # distributed, quantised and fake tensors have classes of their own
    if not needs_gradient(*tensors) or any(type(t) not in (Tensor, Parameter) for t in tensors):
        return None
    cast = autocast_dtype(xz.device)
    read = (
        [cast] if cast else [t.dtype for t in (weights.x_proj, weights.dt_proj, weights.out_proj)]
    )
    if any(dtype != xz.dtype for dtype in read):
        return None
    conv, scan = causal_conv1d.op, selective_scan.op
    # why_not reads dtypes and static widths: xz stands for what will be computed of it
    found = Launchers(
        conv.load(conv.pick(xz, weights.conv, weights.conv_bias)),
        scan.load(scan.pick(xz, xz, weights.A_log, xz, xz, z=xz)),
    )
    return found if all(hasattr(backend, "launch_backward") for backend in found) else None


def are_plain(*modules: Module) -> bool:
    """Whether to read their weights is as good as to call them: no adapter, hook or own forward."""
    return not torch_module._has_any_global_hook() and all(
        type(module) in (Linear, RankLinear, RMSNorm)
        and not (
            module._forward_pre_hooks
            or module._forward_hooks
            or module._backward_pre_hooks
            or module._backward_hooks
            or "forward" in vars(module)
        )
        for module in modules
    )


def inner(
    xz: Tensor, A: Tensor, weights: Weights, cu_seqlens: Tensor | None, options: Options
) -> Tensor:
    """This rank's share of out_proj's output, (b, l, d).

    Args:
        xz: in_proj's output, (b, l, 2 i).
        A: -exp(A_log), without gradients: those of A_log are multiples of it.
        weights: see Weights; matrices are cast to xz.dtype.
        cu_seqlens: ends of packed sequences, (s + 1,) int32.
        options: see Options.
    """
    check_packed("causal_conv1d", xz, cu_seqlens)
    with no_autocast(xz.device):
        return _Inner.apply(options, A, cu_seqlens, xz, *weights)


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: Options, A: Tensor, cu_seqlens: Tensor | None, xz: Tensor, *given: Any
    ) -> Tensor:
        w, (conv, scan), (before, z) = Weights(*given), options.launchers, xz.chunk(2, -1)
        x, _ = conv.launch_forward(before, w.conv, w.conv_bias, None, cu_seqlens, True)
        # of all channels, of which each rank has some
        projected = options.tp.sum_out(F.linear(x, w.x_proj.to(xz.dtype)))
        dtBC = _normed(projected, w, options.norm_eps)
        scanned = _scanned(x, dtBC, A, z, cu_seqlens, w, options)
        y, _, checkpoints = scan.launch_forward(scanned, True)
        ctx.save_for_backward(A, cu_seqlens, xz, projected, checkpoints, *given)
        ctx.options = options
        bias = None if w.out_bias is None else w.out_bias.to(xz.dtype)
        return F.linear(y, w.out_proj.to(xz.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise BackendError(
                "mamba1: create_graph is on (True); its backward has no derivative. Drop it."
            )
        needs_xz, *needed = ctx.needs_input_grad[3:]
        needs = Weights(*needed)
        # the caller may be under another autocast than the forward was
        with no_autocast(dout.device):
            dxz, grads = _gradients(ctx.saved_tensors, dout, needs_xz, needs, ctx.options)
        found = (grads[name] if need else None for name, need in needs._asdict().items())
        return None, None, None, dxz, *found


def _gradients(
    saved: tuple[Any, ...], dout: Tensor, needs_xz: bool, needs: Weights, options: Options
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Of xz, and of those weights that need one, maybe of others."""
    A, cu_seqlens, xz, projected, checkpoints, *given = saved
    w, (conv, scan), (before, z) = Weights(*given), options.launchers, xz.chunk(2, -1)
    dxz = xz.new_empty(xz.shape) if needs_xz else None
    dbefore, dz = (None, None) if dxz is None else dxz.chunk(2, -1)
    x, _ = conv.launch_forward(before, w.conv, w.conv_bias, None, cu_seqlens, True)
    normed = _NormedAgain(projected, w, needs, options.norm_eps)
    dout = dout.reshape(-1, dout.shape[-1])
    dy = (dout @ w.out_proj.to(xz.dtype)).view(x.shape)
    y = x.new_empty(x.shape) if needs.out_proj else None
    scanned = _scanned(x, normed.dtBC, A, z, cu_seqlens, w, options)
    dx, ddt, dA, dB, dC, dD, _, ddt_bias, _ = scan.launch_backward(
        scanned, dy, None, checkpoints, dz=dz, y=y
    )
    grads = {"dt_bias": ddt_bias, "D": dD}
    if needs.A_log:
        grads["A_log"] = dA * A
    if y is not None:
        grads["out_proj"] = dout.t() @ _rows(y)
    if needs.out_bias:
        grads["out_bias"] = dout.sum(0)
    if needs.dt_proj:
        grads["dt_proj"] = _rows(ddt).t() @ _rows(normed.dtBC)[:, : w.dt_proj.shape[1]]
    if needs_xz or any(needs[:6]):
        ddt_low = _rows(ddt) @ w.dt_proj.to(xz.dtype)
        # a rank used them for its own channels
        ddtBC = options.tp.sum_out(torch.cat([ddt_low, _rows(dB), _rows(dC)], 1))
        dprojected = normed.backward(ddtBC, grads)
        if needs.x_proj:
            grads["x_proj"] = dprojected.t() @ _rows(x)
        if needs_xz or any(needs[:2]):
            _rows(dx).addmm_(dprojected, w.x_proj.to(xz.dtype))
            _, grads["conv"], grads["conv_bias"], _ = conv.launch_backward(
                dx, None, before, w.conv, w.conv_bias, None, cu_seqlens, True, dx=dbefore
            )
    return dxz, grads


def _scanned(
    x: Tensor, dtBC: Tensor, A: Tensor, z: Tensor, cu_seqlens: Tensor | None,
    w: Weights, options: Options,
) -> Arguments[Tensor]:  # fmt: skip
    """What the scan takes."""
    dt, B, C = dtBC.split([w.dt_proj.shape[1], A.shape[1], A.shape[1]], -1)
    dt, B, C = F.linear(dt, w.dt_proj.to(x.dtype)), B[:, :, None], C[:, :, None]
    return Arguments(
        x, dt, A, B, C, w.D, z, w.dt_bias, None, cu_seqlens, True, *options.dt_limit
    )  # fmt: skip


def _rows(t: Tensor) -> Tensor:
    """(b, l, ..., n) as a row a token, in the same memory."""
    return t.view(-1, t.shape[-1])


def _normed(projected: Tensor, w: Weights, eps: float | None) -> Tensor:
    """Dt | B | C from x_proj's output."""
    if eps is None:
        return projected
    widths = [w.dt_proj.shape[1], w.A_log.shape[1], w.A_log.shape[1]]
    parts = zip(projected.split(widths, -1), (w.dt_norm, w.B_norm, w.C_norm), strict=True)
    return torch.cat([rms_norm(t, weight, eps=eps)[0] for t, weight in parts], -1)


class _NormedAgain:
    """The norms in a small graph of their own, where there are any."""

    def __init__(self, projected: Tensor, w: Weights, needs: Weights, eps: float | None) -> None:
        self.leaves: dict[str, Tensor] = {}
        if eps is not None:
            projected = projected.detach().requires_grad_()
            # leaves: hooks of the parameters are not called here
            self.leaves = {
                name: getattr(w, name).detach().requires_grad_()
                for name in ("dt_norm", "B_norm", "C_norm")
                if getattr(needs, name)
            }
            w = w._replace(**self.leaves)
        self.projected = projected
        with torch.enable_grad():
            self.dtBC = _normed(projected, w, eps)

    def backward(self, ddtBC: Tensor, grads: dict[str, Tensor]) -> Tensor:
        """The gradient of x_proj's output, a row a token; those of the weights go into `grads`."""
        if self.dtBC is self.projected:
            return ddtBC
        inputs = [self.projected, *self.leaves.values()]
        found = torch.autograd.grad(self.dtBC, inputs, ddtBC.view(self.dtBC.shape))
        grads.update(zip(self.leaves, found[1:], strict=True))
        return _rows(found[0])
