"""selective_scan by csrc/selective_scan: fp32, bf16 and fp16, up to 64 states a channel."""

from math import inf
from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels import loader
from hybridzoo.kernels.dispatch import needs_gradient
from hybridzoo.kernels.selective_scan import bwd, fwd

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
    return (_Differentiable.apply if needs_gradient(*tensors) else selective_scan_cuda)(*given)


class _Differentiable(torch.autograd.Function):
    """Joins the two ops below, in a third of the host time of a formula that torch generates."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        y, final_state, checkpoints = selective_scan_cuda_checkpointed(*given)
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


@torch.library.custom_op("hybridzoo::selective_scan_cuda", mutates_args=())
def selective_scan_cuda(
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
    given = fwd.Arguments(
        x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_min, dt_max
    )
    mapping = fwd.choose(x.shape, A.shape[1], x.device, B.shape[2])
    y, final_state, _ = fwd.launch(given, mapping)
    return y, final_state


@selective_scan_cuda.register_fake
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
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), A.new_empty((rows, *A.shape), dtype=torch.float32)


@torch.library.custom_op("hybridzoo::selective_scan_cuda_checkpointed", mutates_args=())
def selective_scan_cuda_checkpointed(
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
    """The scan, and the states that its backward starts from: (b, checkpoints, i, n), fp32."""
    given = fwd.Arguments(
        x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_min, dt_max
    )
    mapping = fwd.choose(x.shape, A.shape[1], x.device, B.shape[2])
    return fwd.launch(given, mapping, bwd.distance(A.shape[1]))


@selective_scan_cuda_checkpointed.register_fake
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
    y, final_state = selective_scan_cuda(
        x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, *options
    )
    every = bwd.distance(A.shape[1])
    n_checkpoints = (x.shape[1] + every - 1) // every
    return y, final_state, final_state.new_empty((x.shape[0], n_checkpoints, *A.shape))


@torch.library.custom_op("hybridzoo::selective_scan_cuda_backward", mutates_args=())
def selective_scan_cuda_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
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
    given = fwd.Arguments(
        x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_min, dt_max
    )
    is_packed = cu_seqlens is not None
    mapping = bwd.choose(x.shape, A.shape[1], x.device, B.shape[2], is_packed=is_packed)
    return bwd.launch(given, dy, dfinal_state, checkpoints, mapping)


@selective_scan_cuda_backward.register_fake
def _(dy: Tensor, dfinal_state: Tensor | None, *given: Any) -> list[Tensor]:
    return [dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in given[:9]]
