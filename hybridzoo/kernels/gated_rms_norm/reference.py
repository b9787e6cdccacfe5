"""gated_rms_norm in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def available(device: torch.device) -> None:
    """Everywhere."""


def why_not(*_: object, **__: object) -> None:
    """Never refuses."""


def run(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """See `hybridzoo.kernels.gated_rms_norm.gated_rms_norm`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    gate = F.silu(z.to(dtype))
    wide = x.to(dtype) if norm_before_gate else x.to(dtype) * gate
    groups = wide.unflatten(-1, (-1, group_size or x.shape[-1]))
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    y = (groups * scale).flatten(-2) * weight.to(dtype)
    return (y * gate if norm_before_gate else y).to(x.dtype)
