"""attention by torch's scaled_dot_product_attention.

Plain causal calls take its fused kernels; every other mode builds a (b or 1, l, m) mask.
"""

import torch
import torch.nn.functional as F
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
    modes = (window_size, q_positions, k_start, cu_seqlens)
    if q.shape[1] == k.shape[1] and all(mode is None for mode in modes):
        return _attend(q, k, v, scale, is_causal=True)
    seen = visible(
        q,
        k,
        window_size=window_size,
        q_positions=q_positions,
        k_start=k_start,
        cu_seqlens=cu_seqlens,
    )
    # what a fused kernel gives a row that sees nothing differs by kernel: let it see, then zero it
    is_blind = ~seen.any(-1, keepdim=True)
    o = _attend(q, k, v, scale, mask=(seen | is_blind)[:, None])
    return o.masked_fill(is_blind[..., None], 0.0)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    n_rep = q.shape[2] // k.shape[2]
    queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
    o = F.scaled_dot_product_attention(
        queries, keys, values, mask, is_causal=is_causal, scale=scale, enable_gqa=n_rep > 1
    )
    return o.transpose(1, 2)
