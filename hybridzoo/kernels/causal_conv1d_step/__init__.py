"""causal_conv1d_step: one token of causal_conv1d, its state updated in place."""

from typing import Literal

import torch
from torch import Tensor

from hybridzoo.errors import BackendError
from hybridzoo.kernels.dispatch import Op

_causal_conv1d_step = Op(
    "causal_conv1d_step",
    {
        "triton": "hybridzoo.kernels.causal_conv1d_step.triton",
        "reference": "hybridzoo.kernels.causal_conv1d_step.reference",
    },
)


@_causal_conv1d_step.contract
def causal_conv1d_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """One token of `causal_conv1d` a sequence, for decoding; mutates conv_state.

        y = act(bias + sum_k weight[:, k] inputs[k]), inputs = (conv_state[slot], x)

    Args:
        x: inputs of this token, (b, i), fp32 / bf16 / fp16 / float64.
        conv_state: MUTATED: the w - 1 inputs before x, oldest first, (rows, w - 1, i), x.dtype or
            wider; the oldest is dropped and x is added.
        weight: (i, w), w from 2 to 8; the last tap meets x.
        bias: (i,).
        activation: None or "silu".
        slots: (b,) integers, each sequence's row of conv_state, no row twice; a negative one leaves
            the state alone and its y is zero. None: sequence k has row k of b.

    Returns:
        y, (b, i), x.dtype, accumulated in fp32; no gradients.

    Raises:
        BackendError: no backend supports these dtypes, device or sizes; the width or activation is
            not one of those above; rows and batch differ without slots; or gradients are wanted.
    """
    if not 2 <= weight.shape[1] <= 8:
        raise BackendError(
            f"causal_conv1d_step: weight is {weight.shape[1]} wide; it takes 2 to 8. Change d_conv."
        )
    if activation not in (None, "silu"):
        raise BackendError(
            f"causal_conv1d_step: activation {activation!r} is neither None nor 'silu'."
        )
    if slots is None and conv_state.shape[0] != x.shape[0]:
        raise BackendError(
            f"causal_conv1d_step: conv_state has {conv_state.shape[0]} rows, x has {x.shape[0]}; "
            "without slots they pair up. Pass slots, (b,) integers."
        )
    tensors = {"x": x, "conv_state": conv_state, "weight": weight, "bias": bias}
    for name, t in tensors.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise BackendError(
                f"causal_conv1d_step: {name} requires a gradient; a step in place has none. "
                "Call it under torch.no_grad(), or causal_conv1d with a length of 1."
            )
    return _causal_conv1d_step(x, conv_state, weight, bias, activation=activation, slots=slots)
