"""Copies that several ranks hold must be equal to the bit: seen by checksums, no copy travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from hybridzoo.errors import CheckpointError

# elements at a time: their products take 8 bytes each, twice
_STEP = 2**20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# odd, so that no difference in one element is lost modulo 2**64: 2**64 over the golden ratio, and
# the multiplier of Knuth's MMIX, as signed numbers.
_WEIGHT, _CARRY = -7046029254386353131, 6364136223846793005

Sums = Mapping[tuple[str, tuple[tuple[int, int], ...]], int]


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """A number of 64 bits that depends on every bit of the tensor and where it stands."""
    if not tensor.numel():
        return 0
    if not tensor.ndim:
        return _sum(tensor)
    n_row = tensor[0].numel()
    if n_row > _STEP:
        parts = [checksum(row) for row in tensor]
    else:
        rows = _STEP // n_row
        parts = [_sum(tensor[at : at + rows]) for at in range(0, len(tensor), rows)]
    return reduce(lambda total, part: (total * _CARRY + part) % 2**64, parts, 0)


def _sum(tensor: Tensor) -> int:
    flat = tensor.reshape(-1).contiguous().view(_INTEGERS[tensor.element_size()]).to(torch.int64)
    weights = torch.arange(1, flat.numel() + 1, device=flat.device).mul_(_WEIGHT).bitwise_or_(1)
    # integers wrap around, so the order of summing is no matter
    return int(weights.mul_(flat).sum())


def check_copies(sums: Sequence[Sums]) -> None:
    """CheckpointError where ranks found different checksums for one box of a parameter.

    Args:
        sums: by rank, checksums by parameter and box; the same list on every rank.
    """
    first: dict[tuple[str, tuple[tuple[int, int], ...]], tuple[int, int]] = {}
    for rank, found in enumerate(sums):
        for key, value in found.items():
            holder, known = first.setdefault(key, (rank, value))
            if value != known:
                raise CheckpointError(
                    f"{key[0]}: its replicated copies differ between ranks {holder} and {rank}; "
                    "they must be equal. Train with the gradient sums that the layer's tp_plan "
                    "asks for, or load an earlier checkpoint."
                )
