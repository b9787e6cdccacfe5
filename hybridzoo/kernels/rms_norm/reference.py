"""rms_norm in plain torch."""

import torch
from torch import Tensor


def available(device: torch.device) -> None:
    """Everywhere."""


def why_not(*_: object, **__: object) -> None:
    """Never refuses."""


def run(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    residual: Tensor | None = None,
    weight_fp32: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `hybridzoo.kernels.rms_norm.rms_norm`."""
    h = x if residual is None else residual + x.to(residual.dtype)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if not weight_fp32:
        y = y.to(x.dtype)
    # an fp32 weight on half inputs multiplies in fp32: one rounding more, not two
    return (y if weight is None else y * weight).to(x.dtype), h
