"""causal_conv1d_step in plain torch; reads nothing on the host, so a CUDA graph can hold it."""

import torch
from torch import Tensor

from hybridzoo.kernels.causal_conv1d.reference import convolve
from hybridzoo.kernels.slots import read_rows, write_rows_


def available(device: torch.device) -> None:
    """Everywhere."""


def why_not(*_: object, **__: object) -> None:
    """Never refuses."""


def run(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """See `hybridzoo.kernels.causal_conv1d_step.causal_conv1d_step`."""
    past = read_rows(conv_state, slots)
    inputs = torch.cat([past, x[:, None].to(past.dtype)], 1)  # (b, w, i)
    y = convolve(inputs, weight, bias, activation)[:, 0].to(x.dtype)
    write_rows_(conv_state, inputs[:, 1:], slots)
    return y if slots is None else torch.where(slots[:, None] >= 0, y, 0)
