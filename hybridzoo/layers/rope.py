"""Rotary position embedding, rotate-half form (arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x: Tensor, positions: Tensor, theta: float, rotary_dim: int) -> Tensor:
    """Rotate the first `rotary_dim` channels of every head by its token's position.

    Args:
        x: queries or keys, (b, l, h, p).
        positions: (b, l) integers.
        theta: base of the wavelengths.
        rotary_dim: channels rotated, even, at most p; channel j turns with the one rotary_dim / 2
            further.

    Returns:
        (b, l, h, p), x.dtype; angles and rotation in fp32 (float64 for float64 x).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    exponent = torch.arange(0, rotary_dim, 2, device=x.device, dtype=wide) / rotary_dim
    angle = positions.to(wide)[:, :, None, None] * theta**-exponent
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x.split([rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    return torch.cat([turned, rest], -1)
