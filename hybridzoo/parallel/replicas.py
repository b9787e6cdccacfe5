"""What several tp ranks hold gets the same bits of gradient on all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from hybridzoo.comm import Axis, Parallel
from hybridzoo.model import HybridLM
from hybridzoo.parallel.norm import over, units


def level(model: HybridLM) -> None:
    """Sum the gradients of such parameters over dp one by one, where DeepSpeed's buffers differ.

    Where the ranks of tp hold different numbers of the vocabulary's rows, all that DeepSpeed keeps
    behind them lies elsewhere on each, and three or more numbers are added in an order that depends
    on their place: the copies would drift apart. A gradient that is summed alone has one place; the
    first rank of dp keeps it and the others bring zeros, with which any order gives the same.

    Every rank calls it, before DeepSpeed gets the model.
    """
    parallel, config = model.parallel, model.config
    tp, dp, ep = parallel.tp, parallel.dp, parallel.ep
    if dp.world < 3 or len({len(ids) for ids in config.vocab_ranges(tp.world)}) == 1:
        return
    has_experts = ep.world > 1 and any(p.experts for _, p in config.params())
    axes = {False: dp, True: _of_experts(parallel) if has_experts else dp}
    for _, declared, locals_ in model.local_names():
        for piece, name in locals_.items():
            is_copy = min(units(declared, piece, locals_, tp.world), default=0) < tp.world
            parameter = model.get_parameter(name)
            if is_copy and parameter.requires_grad:
                parameter.register_hook(_summed(axes[declared.experts]))


def _summed(axis: Axis) -> Callable[[Tensor], Tensor]:
    def hook(grad: Tensor) -> Tensor:
        total = over(axis, grad)
        return total if axis.rank == 0 else torch.zeros_like(total)

    return hook


def _of_experts(parallel: Parallel) -> Axis:
    """The data-parallel ranks that hold this one's experts: every ep-th."""
    n = parallel.ep.world * parallel.tp.world
    # a rank's number counts along (pp, dp, tp)
    ranks = torch.arange(dist.get_world_size()).view(parallel.pp.world, -1, n)
    columns = ranks.transpose(1, 2).flatten(0, 1).tolist()
    groups = [dist.new_group(column) for column in columns]
    mine = next(i for i, column in enumerate(columns) if dist.get_rank() in column)
    return Axis(columns[mine].index(dist.get_rank()), len(columns[mine]), groups[mine])
