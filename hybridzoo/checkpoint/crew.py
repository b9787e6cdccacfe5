"""The ranks that save together: one phase after another, and what fails on one ends it on all."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from hybridzoo.comm import Parallel
from hybridzoo.errors import CheckpointError, HybridzooError

T = TypeVar("T")


def is_alone(parallel: Parallel) -> bool:
    """Whether no other rank shares the model."""
    return all(a.world == 1 for a in (parallel.tp, parallel.ep, parallel.pp, parallel.dp))


@dataclass(frozen=True)
class Crew:
    """Every rank of torch.distributed's world, or this process alone.

    Attributes:
        rank: this process's place.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, parallel: Parallel) -> Crew:
        """Those that share a model: all of the world, once any axis has several ranks."""
        if is_alone(parallel):
            return ALONE
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this rank does what is done once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, small and picklable, in order of ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def phase(self) -> Phase:
        """A block that every rank enters and that ends alike on all of them."""
        return Phase(self)


class Phase:
    """Waits at its end for every rank.

    Where the block failed on any, each rank raises the same CheckpointError, that of the first
    rank that failed.

    Attributes:
        value: what this rank's block has for the others.
        values: every rank's, once the phase is over.
    """

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.value: Any = None
        self.values: list[Any] = []

    def __enter__(self) -> Phase:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # an interrupt ends the process: it must not wait for ranks that may be gone
        if error is not None and not isinstance(error, Exception):
            return
        if self.crew.world == 1:
            self.values = [self.value]
            return
        said = None if error is None else str(error)
        if error is not None and not isinstance(error, HybridzooError):
            said = f"{type(error).__name__}: {said}"
        heard = self.crew.gather((said, self.value))
        self.values = [value for _, value in heard]
        for rank, (sentence, _) in enumerate(heard):
            if sentence is not None:
                raise CheckpointError(f"rank {rank}: {sentence}") from error


ALONE = Crew()
