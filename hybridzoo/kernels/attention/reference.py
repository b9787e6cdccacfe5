"""attention with the scores written out."""

import torch
from torch import Tensor

from hybridzoo.kernels.attention.mask import visible


def available(device: torch.device) -> None:
    """Everywhere."""


def why_not(*_: object, **__: object) -> None:
    """Never refuses."""


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window_size: int | None = None,
    q_positions: Tensor | None = None,
    k_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """See `hybridzoo.kernels.attention.attention`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    seen = visible(
        q,
        k,
        window_size=window_size,
        q_positions=q_positions,
        k_start=k_start,
        cu_seqlens=cu_seqlens,
    )[:, None, None]
    # (b, l, h, p) -> (b, hk, h / hk, l, p): the heads that share a key head side by side
    queries = q.to(dtype).transpose(1, 2).unflatten(1, (k.shape[2], -1))
    keys, values = (t.to(dtype).transpose(1, 2)[:, :, None] for t in (k, v))
    scores = queries @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    # a finite floor, then zeros: a row of -inf alone would be NaN, and so would its gradient
    weights = scores.masked_fill(~seen, torch.finfo(dtype).min).softmax(-1)
    weights = weights.masked_fill(~seen, 0.0)
    return (weights @ values).flatten(1, 2).transpose(1, 2).to(q.dtype)
