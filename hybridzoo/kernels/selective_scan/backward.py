"""Gradients of the compiled scans: the reference runs again and is differentiated.

One opaque op, so that compiled graphs need not trace through the reference's loops.
"""

from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels.adjoint import recomputed_gradients
from hybridzoo.kernels.selective_scan import reference


@torch.library.custom_op("hybridzoo::selective_scan_backward", mutates_args=())
def selective_scan_backward(
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
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state; an absent one's is empty.

    Takes the gradients of y and final_state, then what the forward took.
    """

    def scan(*given: Tensor | None) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, z, dt_bias, initial_state = given
        return reference.run(
            x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
            dt_limit=(dt_min, dt_max), initial_state=initial_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip

    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return recomputed_gradients(scan, inputs, (dy, dfinal_state))


@selective_scan_backward.register_fake
def _(dy: Tensor, dfinal_state: Tensor, *inputs: Any) -> list[Tensor]:
    return [dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:9]]


def register(op: Any) -> None:
    """Give a compiled scan its gradients.

    Args:
        op: the custom op, or its name: (x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens,
            dt_softplus, dt_min, dt_max) -> (y, final_state), absent tensors None.
    """
    torch.library.register_autograd(op, _backward, setup_context=_setup_context)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]


def _backward(ctx: Any, dy: Tensor, dfinal_state: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    grads = selective_scan_backward(dy, dfinal_state, *inputs, *ctx.options)
    present = [g if t is not None else None for g, t in zip(grads, inputs[:9], strict=True)]
    return (*present, None, None, None, None)
