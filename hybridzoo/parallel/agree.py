"""What the ranks of a job tell each other besides tensors: values, errors, that they are alive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch.distributed as dist

from hybridzoo.errors import HybridzooError

T = TypeVar("T")


def exchange(value: T) -> list[T]:
    """Every rank's value, in order; in a process of its own that one."""
    if not dist.is_initialized():
        return [value]
    found: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return cast(list[T], found)


@contextmanager
def agreed() -> Iterator[None]:
    """A block that every rank runs: an error of a user's in one of them is raised in all.

    So no rank goes on and waits for one that gave up.

    Raises:
        HybridzooError: the first rank's that has one, as `rank 3: ...` where there are several.
    """
    error = None
    try:
        yield
    except HybridzooError as caught:
        if not dist.is_initialized():
            raise
        error = caught
    for rank, first in enumerate(exchange(error)):
        if first is not None:
            text = str(first)
            # blocks may lie inside each other
            raise type(first)(text if text.startswith("rank ") else f"rank {rank}: {text}")


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, which alone calls it, on every rank; its error too."""
    made: list[T | None] = [None]
    with agreed():
        if not dist.is_initialized() or dist.get_rank() == 0:
            made = [make()]
    if dist.is_initialized():
        dist.broadcast_object_list(made, src=0)
    return cast(T, made[0])
