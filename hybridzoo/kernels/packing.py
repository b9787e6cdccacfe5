"""Orders of tokens: which packed sequence owns each, and the way back from a permutation.

All of it stays on the device: no length is ever read by the host.
"""

import torch
from torch import Tensor

from hybridzoo.errors import BackendError


def check_packed(
    op: str, x: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None = None
) -> None:
    """Refuse a batch or a state that `cu_seqlens` contradicts.

    Raises:
        BackendError: b is not 1, or the state's rows are not one a sequence (a batch row).
    """
    rows = x.shape[0]
    if cu_seqlens is not None:
        if rows != 1:
            raise BackendError(
                f"{op}: x has {rows} rows with cu_seqlens; a pack is one row. "
                "Concatenate the sequences along the length, or drop cu_seqlens."
            )
        rows = cu_seqlens.shape[0] - 1
    if initial_state is not None and initial_state.shape[0] != rows:
        raise BackendError(
            f"{op}: initial_state has {initial_state.shape[0]} rows; it takes {rows}, "
            f"one a {'batch row' if cu_seqlens is None else 'sequence'}."
        )


def sequence_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """Index of the sequence that owns each token, (l,) int64; empty sequences own none."""
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`, (t,) int64."""
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)
