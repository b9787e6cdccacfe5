"""The step size of both scans: raw dt, its bias, softplus and limits, in the state's precision."""

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor


def step_size(
    dt: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    dtype: torch.dtype,
) -> Tensor:
    """Clamp(softplus(dt + dt_bias)) in `dtype`; dt is (b, l, i) or (b, l, h), bias its last dim."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        # torch turns linear above 20, which is 2e-9 off: too much for float64
        dt = F.softplus(dt, threshold=40.0)
    if dt_limit != (0.0, inf):
        dt = dt.clamp(*dt_limit)
    return dt
