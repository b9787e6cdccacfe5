"""The exchange of expert parallelism: rows go to the ranks that hold their experts, and back.

Imported at its first use: the mark for the compiler loads the compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hybridzoo.comm import Axis
from hybridzoo.kernels.packing import inverse

Multiply = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Exchange:
    """The way of one forward's rows to their experts' ranks and back; no row is dropped.

    Every rank of the axis takes part in each step of it, also without a row of its own.

    Attributes:
        axis: ranks that hold equal, contiguous ranges of the experts.
        send: rows that go to each rank.
        receive: rows that come from each rank.
        order: (t,) for the i-th row sorted by expert, its place among the t rows that arrive.
        offsets: (e / ep,) int32, end of each of this rank's experts among the rows so sorted.
    """

    axis: Axis
    send: list[int]
    receive: list[int]
    order: Tensor
    offsets: Tensor

    @classmethod
    def plan(cls, offsets: Tensor, axis: Axis) -> Self:
        """Tell the ranks how many rows to expect; waits once for the device, to read the numbers.

        Args:
            offsets: (e,), end of each expert among this rank's rows, which are sorted by expert.
            axis: expert parallelism.
        """
        n = len(offsets) // axis.world
        counts = offsets.diff(prepend=offsets.new_zeros(1))
        # (ep, e / ep): from each rank the rows for each of this rank's experts
        arriving = axis.all_to_all(counts, [n] * axis.world, [n] * axis.world).unflatten(0, (-1, n))
        totals = torch.stack([counts.unflatten(0, (-1, n)).sum(1), arriving.sum(1)])
        send, receive = totals.tolist()
        # rows arrive rank by rank, each rank's sorted by expert
        expert = torch.arange(n, device=offsets.device).repeat(axis.world)
        expert = expert.repeat_interleave(arriving.flatten(), output_size=sum(receive))
        order = expert.sort(stable=True).indices
        return cls(axis, send, receive, order, arriving.sum(0).cumsum(0).to(torch.int32))

    def there(self, rows: Tensor) -> Tensor:
        """This rank's rows, sorted by expert -> all rows for this rank's experts, so sorted."""
        return self.axis.all_to_all(rows, self.send, self.receive)[self.order]

    def back(self, rows: Tensor) -> Tensor:
        """What the experts made of the rows that came, to the ranks and places they came from."""
        return self.axis.all_to_all(rows[inverse(self.order)], self.receive, self.send)


# how many rows come is known on the host alone, and differs each time: a compiler would compile
# anew for it
@torch.compiler.disable
def elsewhere(multiply: Multiply, rows: Tensor, offsets: Tensor, axis: Axis) -> Tensor:
    """What the experts on other ranks make of this rank's rows.

    Args:
        multiply: (rows, offsets) -> rows, the product with this rank's experts.
        rows: (t, d), sorted by expert.
        offsets: (e,), end of each expert among them.
        axis: expert parallelism.
    """
    exchange = Exchange.plan(offsets, axis)
    return exchange.back(multiply(exchange.there(rows), exchange.offsets))
