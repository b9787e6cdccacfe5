"""What the ranks of a job tell each other besides tensors: values, errors, that they are alive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from hybridzoo.errors import ConfigError, HybridzooError
from hybridzoo.options import shown

T = TypeVar("T")


def exchange(value: T) -> list[T]:
    """Every rank's value, in order; in a process of its own that one."""
    if not dist.is_initialized():
        return [value]
    found: list[T | None] = [None] * world()
    dist.all_gather_object(found, value)
    return cast(list[T], found)


def rank() -> int:
    """This process's number among all ranks; 0 in a process of its own."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """All ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this rank does what is done once."""
    return rank() == 0


@contextmanager
def agreed() -> Iterator[None]:
    """A block that every rank runs: an error of a user's in one of them is raised in all.

    So no rank goes on and waits for one that gave up.

    Raises:
        HybridzooError: the first that has one; as `rank 3: ...` where others have none, or another.
    """
    error = None
    try:
        yield
    except HybridzooError as caught:
        if not dist.is_initialized():
            raise
        error = caught
    errors = exchange(error)
    first = next(((i, e) for i, e in enumerate(errors) if e is not None), None)
    if first is None:
        return
    origin, known = first
    text = str(known)
    # what every rank says needs no number
    if any(str(e) != text for e in errors):
        text = f"rank {origin}: {text}"
    raise type(known)(text) from error


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, which alone calls it, on every rank; its error too."""
    made: list[T | None] = [None]
    with agreed():
        if is_first():
            made = [make()]
    if dist.is_initialized():
        dist.broadcast_object_list(made, src=0)
    return cast(T, made[0])


def check_alike(values: Mapping[str, Any]) -> None:
    """Refuse ranks that were started with different values: each would go its own way, or wait.

    Raises:
        ConfigError: the key, on every rank.
    """
    told = exchange(values)
    for i, theirs in enumerate(told):
        for key, value in told[0].items():
            if theirs[key] != value:
                raise ConfigError(
                    f"{key}: rank {i} has {shown(theirs[key])} and rank 0 {shown(value)}; all "
                    "ranks need the same. Start them with one recipe and the same options."
                )


def lowest(number: int, device: torch.device) -> int:
    """The least of every rank's numbers; one small collective."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)
