"""Which key each query sees: the one place that knows."""

import torch
from torch import Tensor

from hybridzoo.kernels.packing import sequence_ids


def visible(
    q: Tensor,
    k: Tensor,
    *,
    window_size: int | None,
    q_positions: Tensor | None,
    k_start: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Whether query t sees key j, (b or 1, l, m) bool."""
    length, n_keys = q.shape[1], k.shape[1]
    keys = torch.arange(n_keys, device=q.device)
    if q_positions is None:
        places = torch.arange(n_keys - length, n_keys, device=q.device)[None, :, None]
    else:
        places = q_positions[:, :, None]
    seen = keys <= places
    if window_size is not None:
        seen = seen & (keys > places - window_size)
    if k_start is not None:
        seen = seen & (keys >= k_start[:, None, None])
    if cu_seqlens is not None:
        owner = sequence_ids(cu_seqlens, n_keys)
        seen = seen & (owner[:, None] == owner)
    return seen
