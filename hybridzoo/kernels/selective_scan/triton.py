"""selective_scan in Triton: its ops, and how autograd joins them."""

from math import inf
from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels.dispatch import needs_gradient
from hybridzoo.kernels.jit import available
from hybridzoo.kernels.selective_scan import triton_bwd, triton_fwd
from hybridzoo.kernels.selective_scan.fwd import Arguments

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
    return (_Differentiable.apply if needs_gradient(*tensors) else selective_scan_triton)(*given)


class _Differentiable(torch.autograd.Function):
    """Joins the two ops below, in a third of the host time of a formula that torch generates."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        y, final_state, checkpoints = selective_scan_triton_checkpointed(*given)
        ctx.save_for_backward(*given[:10], checkpoints)
        ctx.options = given[10:]
        return y, final_state

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grads = selective_scan_triton_backward(*cotangents, *tensors, *ctx.options)
        present = (None if t is None else g for t, g in zip(tensors[:9], grads, strict=True))
        return *present, None, None, None, None


@torch.library.custom_op("hybridzoo::selective_scan_triton", mutates_args=())
def selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """The scan without gradients; dt_min and dt_max are the contract's dt_limit."""
    given = Arguments(
        x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_min, dt_max
    )
    y, final_state, _ = triton_fwd.launch(given)
    return y, final_state


@selective_scan_triton.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *options: object,
) -> tuple[Tensor, Tensor]:
    y, final_state, _ = triton_fwd.outputs(x, A, cu_seqlens, has_checkpoints=False)
    return y, final_state


@torch.library.custom_op("hybridzoo::selective_scan_triton_checkpointed", mutates_args=())
def selective_scan_triton_checkpointed(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan, and the states that its backward starts from: see `triton_fwd.launch`."""
    given = Arguments(
        x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_min, dt_max
    )
    return triton_fwd.launch(given, has_checkpoints=True)


@selective_scan_triton_checkpointed.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return triton_fwd.outputs(x, A, cu_seqlens, has_checkpoints=True)


@torch.library.custom_op("hybridzoo::selective_scan_triton_backward", mutates_args=())
def selective_scan_triton_backward(
    dy: Tensor,
    dfinal_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> list[Tensor]:
    """Gradients of the first nine tensors of the scan; an absent one's is empty."""
    given = Arguments(
        x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_min, dt_max
    )
    return triton_bwd.launch(given, dy, dfinal_state, checkpoints)


@selective_scan_triton_backward.register_fake
def _(dy: Tensor, dfinal_state: Tensor, *given: Any) -> list[Tensor]:
    return [dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in given[:9]]
