"""Which ranks count a parameter in the gradient's norm, and that norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hybridzoo.comm import Axis, Parallel
from hybridzoo.layers import Param
from hybridzoo.model import HybridLM
from hybridzoo.parallel import experts
from hybridzoo.sharding import Replicate


def tag(model: HybridLM) -> None:
    """Mark experts, and which parameters DeepSpeed's norm counts on this rank beside tp rank 0's.

    A cut parameter counts on every rank, a whole one on the first. Of several ranks that hold one
    unit of a cut part (B/C groups, KV heads, n_groups < tp) the first counts.
    """
    experts.mark(model)
    tp = model.parallel.tp
    for _, declared, locals_ in model.local_names():
        for piece, name in locals_.items():
            counts = units(declared, piece, locals_, tp.world)
            parameter = model.get_parameter(name)
            parameter.tensor_model_parallel = any(_is_first(tp, n) for n in counts)


def units(declared: Param, piece: str, locals_: Mapping[str, str], tp: int) -> set[int]:
    """How many units the cut parts of one of a parameter's pieces have; none where it is whole."""
    cut = declared.cut
    if isinstance(cut, Replicate):
        return set()
    return {cut.parts[i].units for i in cut.pieces(next(iter(locals_)), tp).get(piece, ())}


def is_counted(parameter: nn.Parameter, tp: Axis) -> bool:
    """Whether this rank counts a tagged parameter in the norm of all."""
    # a copy is what a pipeline stage before this one holds too
    is_copy = getattr(parameter, "ds_pipe_replicated", False)
    return not is_copy and (tp.rank == 0 or parameter.tensor_model_parallel)


def global_norm(params: dict[str, nn.Parameter], parallel: Parallel) -> Tensor:
    """The norm of the whole model's reduced gradients, from tagged parameters, in fp64."""
    device = next(iter(params.values())).device
    counted = [p for p in params.values() if is_counted(p, parallel.tp) and p.grad is not None]
    shared, marked = (
        nn.utils.get_total_norm([p.grad for p in counted if experts.is_marked(p) == is_marked])
        # in fp64: the square of what fp32 can just hold overflows it
        .to(device, torch.float64)
        .square()
        for is_marked in (False, True)
    )
    return over(parallel.pp, over(parallel.tp, shared + over(parallel.ep, marked))).sqrt()


def over(axis: Axis, x: Tensor) -> Tensor:
    """The sum over an axis, without autograd."""
    return x if axis.world == 1 else axis.all_reduce(x)


def _is_first(tp: Axis, units: int) -> bool:
    # ranks share a unit where there are fewer of them
    return tp.rank == 0 or tp.rank * units // tp.world != (tp.rank - 1) * units // tp.world
