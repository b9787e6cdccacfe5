"""selective_scan in Triton: its ops, and how autograd joins them."""

from math import inf
from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels.dispatch import needs_gradient
from hybridzoo.kernels.jit import available
from hybridzoo.kernels.selective_scan import ops, triton_bwd, triton_fwd

__all__ = ["available", "run", "why_not"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_STATES = 256


def why_not(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    z: Tensor | None = None,
    **_: object,
) -> str | None:
    """Needs CUDA 8.0, fp32 or half inputs and at most MAX_STATES states."""
    reason = available(x.device)
    if reason is not None:
        return reason
    for name, tensor in {"x": x, "dt": dt, "A": A, "B": B, "C": C, "z": z}.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, not fp32, bf16 or fp16"
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
    y, final_state, _ = selective_scan_triton(*given, False)
    return y, final_state


class _Differentiable(torch.autograd.Function):
    """Joins the two ops below, in a third of the host time of a formula that torch generates."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        y, final_state, checkpoints = selective_scan_triton(*given, True)
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
        grads = selective_scan_triton_backward(dy, dfinal_state, *tensors, *ctx.options)
        present = (None if t is None else g for t, g in zip(tensors[:9], grads, strict=True))
        return *present, None, None, None, None


selective_scan_triton = ops.define_forward("triton", triton_fwd.launch, triton_fwd.outputs)
selective_scan_triton_backward = ops.define_backward("triton", triton_bwd.launch)
