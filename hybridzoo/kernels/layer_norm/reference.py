"""layer_norm in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def available(device: torch.device) -> None:
    """Everywhere."""


def why_not(*_: object, **__: object) -> None:
    """Never refuses."""


def run(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `hybridzoo.kernels.layer_norm.layer_norm`."""
    h = x if residual is None else residual + x.to(residual.dtype)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    scale, shift = (None if p is None else p.to(wide.dtype) for p in (weight, bias))
    return F.layer_norm(wide, wide.shape[-1:], scale, shift, eps).to(x.dtype), h
