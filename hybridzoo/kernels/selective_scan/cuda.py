"""selective_scan by csrc/selective_scan: fp32, bf16 and fp16, up to 64 states a channel."""

from math import inf
from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels import loader
from hybridzoo.kernels.dispatch import needs_gradient
from hybridzoo.kernels.selective_scan import bwd, fwd, ops

MAX_STATES = 64


def available(device: torch.device) -> str | None:
    """Needs a CUDA device of capability 8.0, and a compiler or a packaged cubin."""
    return loader.available(device)


def why_not(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, z: Tensor | None = None, **_: object
) -> str | None:
    """Takes fp32, bf16 and fp16, one dtype for x, dt, B, C and z, and at most 64 states."""
    reason = available(x.device)
    if reason is not None:
        return reason
    if x.dtype not in fwd.DTYPES:
        return f"it takes float32, bfloat16 and float16, not {x.dtype}"
    for name, t in (("dt", dt), ("B", B), ("C", C), ("z", z)):
        if t is not None and t.dtype != x.dtype:
            return f"{name} is {t.dtype} where x is {x.dtype}"
    if A.shape[1] > MAX_STATES:
        return f"d_state ({A.shape[1]}) exceeds its limit ({MAX_STATES})"
    return None


def run(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `hybridzoo.kernels.selective_scan.selective_scan`."""
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    given = (*tensors, cu_seqlens, dt_softplus, *dt_limit)
    if needs_gradient(*tensors):
        return _Differentiable.apply(*given)
    y, final_state, _ = selective_scan_cuda(*given, False)
    return y, final_state


class _Differentiable(torch.autograd.Function):
    """Joins the two ops below, in a third of the host time of a formula that torch generates."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        y, final_state, checkpoints = selective_scan_cuda(*given, True)
        ctx.save_for_backward(*given[:10], checkpoints)
        ctx.options = given[10:]
        # the state may end here
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        dy = torch.zeros_like(tensors[0]) if dy is None else dy
        grads = selective_scan_cuda_backward(dy, dfinal_state, *tensors, *ctx.options)
        present = (None if t is None else g for t, g in zip(tensors[:9], grads, strict=True))
        return *present, None, None, None, None


def launch_forward(given: fwd.Arguments[Tensor], is_lean: bool) -> ops.Outputs:
    """What the first op runs, with checkpoints; of lean ones see `bwd.distance`."""
    return _launch(given, bwd.distance(given.A.shape[1], is_lean=is_lean))


def launch_backward(
    given: fwd.Arguments[Tensor],
    dy: Tensor,
    dfinal_state: Tensor | None,
    checkpoints: Tensor,
    *,
    dz: Tensor | None = None,
    y: Tensor | None = None,
) -> list[Tensor]:
    """What the second op runs; see `bwd.launch`."""
    (_, l, _), n = given.x.shape, given.A.shape[1]
    mapping = bwd.choose(
        given.x.shape, n, given.x.device, given.B.shape[2],
        is_packed=given.cu_seqlens is not None,
        is_lean=checkpoints.shape[1] != -(-l // bwd.distance(n)),
    )  # fmt: skip
    return bwd.launch(given, dy, dfinal_state, checkpoints, mapping, dz=dz, y=y)


def _launch(given: fwd.Arguments[Tensor], checkpoint_every: int) -> ops.Outputs:
    x = given.x
    mapping = fwd.choose(x.shape, given.A.shape[1], x.device, given.B.shape[2])
    return fwd.launch(given, mapping, checkpoint_every)


def _launch_op(given: fwd.Arguments[Tensor], has_checkpoints: bool) -> ops.Outputs:
    return launch_forward(given, False) if has_checkpoints else _launch(given, 0)


def _outputs(x: Tensor, A: Tensor, cu_seqlens: Tensor | None, has_checkpoints: bool) -> ops.Outputs:
    return fwd.outputs(x, A, cu_seqlens, bwd.distance(A.shape[1]) if has_checkpoints else 0)


selective_scan_cuda = ops.define_forward("cuda", _launch_op, _outputs)
selective_scan_cuda_backward = ops.define_backward("cuda", launch_backward)
