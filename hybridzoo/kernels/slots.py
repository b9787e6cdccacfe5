"""Rows of a pool of states, which slots name: negative ones name none, and the host never waits."""

import torch
from torch import Tensor


def read_rows(pool: Tensor, slots: Tensor | None) -> Tensor:
    """The rows that slots (b,) name, or all; a negative slot reads row 0, to be dropped."""
    return pool if slots is None else pool.index_select(0, slots.clamp(min=0))


def write_rows_(pool: Tensor, rows: Tensor, slots: Tensor | None) -> None:
    """Copy rows (b, ...) to where slots name, in place, or over the whole pool."""
    rows = rows.to(pool.dtype)
    if slots is None:
        pool.copy_(rows)
    else:
        pool.index_copy_(0, *skip_negative(slots, rows, pool))


def skip_negative(slots: Tensor, rows: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to write and their values, where a negative slot repeats the first real row's write.

    Without a real one, row 0 is written with itself. So no row is lost.
    """
    is_real = slots >= 0
    first = is_real.int().argmax(0, keepdim=True)
    mask = is_real.view(-1, *[1] * (pool.dim() - 1))
    any_real, row = mask.index_select(0, first), rows.index_select(0, first)
    # detached: the real write alone carries the gradient
    spare = torch.where(any_real, row, pool[:1]).detach()
    index = slots.where(is_real, slots.index_select(0, first)).clamp(min=0).long()
    return index, rows.where(mask, spare)
