"""Process groups and the autograd collectives of tensor, sequence and expert parallelism.

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

    def share(self, x: Tensor) -> Tensor:
        """1 / world of x, whose gradient passes unchanged: what each rank gives to a sum.

        The sum's gradient is whole on every rank, and so is that of a term that all of them hold.
        """
        return x if self.world == 1 else _Share.apply(x, self)

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

    def gather_in(self, x: Tensor, dim: int) -> Tensor:
        """Every rank's x along `dim`, in order of ranks; its gradient is summed and cut again.

        Entry of a region in which each rank computes a share for all tokens.
        """
        return x if self.world == 1 else _GatherIn.apply(x, self, dim)

    def scatter_out(self, y: Tensor, dim: int) -> Tensor:
        """This rank's piece, along `dim`, of the sum over ranks; its gradient is gathered.

        Exit of such a region; `world` divides the dimension.
        """
        return y if self.world == 1 else _ScatterOut.apply(y, self, dim)

    def gather_out(self, y: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """Every rank's y along `dim`; its gradient, alike on every rank, is cut again.

        Args:
            y: this rank's piece.
            dim: where the pieces differ.
            sizes: each rank's length there.
        """
        return y if self.world == 1 else _GatherOut.apply(y, self, dim, tuple(sizes))

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Rows of x go to the ranks they are for; its gradient goes back.

        Args:
            x: (sum of send, ...), the rows for rank 0 first.
            send: rows for each rank.
            receive: rows from each rank.

        Returns:
            (sum of receive, ...), those from rank 0 first.
        """
        return x if self.world == 1 else _AllToAll.apply(x, self, list(send), list(receive))

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Sum (or "max") over ranks, without autograd."""
        # contiguous first: a collective on a strided tensor would sum a copy and lose it.
        return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), op, self.group))

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Every rank's x, of one shape, along `dim`; without autograd."""
        return funcol.wait_tensor(_all_gather(x.contiguous(), dim, self.group))

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's piece, along `dim`, of the sum over ranks; without autograd."""
        return funcol.wait_tensor(_reduce_scatter(x.contiguous(), "sum", dim, self.group))


@dataclass(frozen=True)
class Parallel:
    """This process's place on the axes that a model is spread over.

    Attributes:
        tp: tensor parallelism: ranks that hold slices of each layer.
        ep: expert parallelism: data-parallel ranks that hold different experts.
        pp: pipeline parallelism: ranks that hold different places of the stack.
        dp: data parallelism: ranks that read different sequences; ep is part of it.
        sequence_parallel: between two blocks each tp rank keeps its share of the tokens alone, of
            which it drops others than one rank would (dropout draws for the tokens it has).
    """

    tp: Axis = field(default_factory=Axis)
    ep: Axis = field(default_factory=Axis)
    pp: Axis = field(default_factory=Axis)
    dp: Axis = field(default_factory=Axis)
    sequence_parallel: bool = False

    def enter(self, x: Tensor) -> Tensor:
        """The residual stream's (b, l, d), or this rank's tokens of it, to what layers read."""
        return self.tp.gather_in(x, 1) if self.sequence_parallel else self.tp.copy_in(x)

    def leave(self, y: Tensor) -> Tensor:
        """The ranks' shares of (b, l, d), summed; of the sum this rank's tokens, if so wished."""
        return self.tp.scatter_out(y, 1) if self.sequence_parallel else self.tp.sum_out(y)


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


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return x / axis.world

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _GatherIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.all_gather(x, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.axis.reduce_scatter(grads[0], ctx.dim), None, None


class _ScatterOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.reduce_scatter(y, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.axis.all_gather(grads[0], ctx.dim), None, None


class _GatherOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.axis, ctx.dim, ctx.sizes = axis, dim, sizes
        # a collective's pieces have one shape: shorter ones are filled up, and cut off again
        longest, dim = max(sizes), dim % y.ndim
        if sizes[axis.rank] < longest:
            shape = list(y.shape)
            shape[dim] = longest - sizes[axis.rank]
            y = torch.cat([y, y.new_zeros(shape)], dim)
        gathered = axis.all_gather(y, dim)
        if min(sizes) == longest:
            return gathered
        pieces = gathered.split(longest, dim)
        return torch.cat([p.narrow(dim, 0, n) for p, n in zip(pieces, sizes, strict=True)], dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        start = sum(ctx.sizes[: ctx.axis.rank])
        mine = grads[0].narrow(ctx.dim, start, ctx.sizes[ctx.axis.rank])
        return mine, None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        return _exchange(x, axis, send, receive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _exchange(grads[0], ctx.axis, ctx.receive, ctx.send), None, None, None


def _exchange(x: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
    group = axis.group
    return funcol.wait_tensor(funcol.all_to_all_single(x.contiguous(), receive, send, group))


# torch 2.13 renamed the two, and warns of the old names
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_reduce_scatter = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


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
