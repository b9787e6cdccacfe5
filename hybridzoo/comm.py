"""Process groups and the autograd collectives of tensor parallelism.

Every one is a no-op on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One axis of parallelism: this process's place in a group of `world` ranks.

    Attributes:
        rank: place within the group, 0-based.
        world: ranks in the group.
        group: torch process group; None on one rank.
    """

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        """Itself: a copy of a model talks to the same ranks, and a process group has no copy."""
        return self

    def copy_in(self, x: Tensor) -> Tensor:
        """Identity; its gradient is summed over ranks.

        Entry of a region in which each rank computes a share.
        """
        return x if self.world == 1 else _CopyIn.apply(x, self)

    def sum_out(self, y: Tensor) -> Tensor:
        """Sum over ranks; its gradient passes unchanged.

        Exit of a region in which each rank computed a share.
        """
        return y if self.world == 1 else _SumOut.apply(y, self)

    def sum_both(self, x: Tensor) -> Tensor:
        """Sum over ranks whose gradient is summed too: a statistic that each rank's share uses."""
        return self.copy_in(self.sum_out(x))

    def sum_grads(self, params: Sequence[Tensor], units: Sequence[int]) -> tuple[Tensor, ...]:
        """The same tensors; one flat all-reduce in backward sums each gradient over its holders.

        Args:
            params: tensors held in copies by several ranks.
            units: for each, how many different contents the ranks hold (1: all alike; n_groups for
                B/C rows).
        """
        if self.world == 1 or not params:
            return tuple(params)
        return _SumGrads.apply(self, tuple(units), *params)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, without autograd."""
        # contiguous first: a collective on a strided tensor would sum a copy and lose it.
        return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", self.group))


@dataclass(frozen=True)
class Parallel:
    """The axes that a model is spread over: tensor, expert and pipeline parallelism."""

    tp: Axis = field(default_factory=Axis)
    ep: Axis = field(default_factory=Axis)
    pp: Axis = field(default_factory=Axis)


SINGLE = Parallel()


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.axis.all_reduce(grads[0]), None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, axis: Axis) -> Tensor:
        return axis.all_reduce(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _SumGrads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, axis: Axis, units: tuple[int, ...], *params: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.axis, ctx.units = axis, units
        return tuple(p.view_as(p) for p in params)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        axis: Axis = ctx.axis
        # a unit's holders sum among themselves: each writes its own row, the other rows stay zero.
        rows = [axis.rank * u // axis.world for u in ctx.units]
        # summed in fp32 at least: bf16 partial sums would lose bits that one rank keeps.
        wide = torch.promote_types(torch.float32, grads[0].dtype)
        buffers = []
        for grad, u, row in zip(grads, ctx.units, rows, strict=True):
            buffer = grad.new_zeros(u, grad.numel(), dtype=wide)
            buffer[row] = grad.reshape(-1)
            buffers.append(buffer)
        flat = axis.all_reduce(torch.cat([b.reshape(-1) for b in buffers]))
        summed = flat.split([b.numel() for b in buffers])
        mine = [
            s.view(u, -1)[row].view_as(g).to(g.dtype)
            for s, g, u, row in zip(summed, grads, ctx.units, rows, strict=True)
        ]
        return None, None, *mine
