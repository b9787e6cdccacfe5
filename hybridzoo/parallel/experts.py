"""What DeepSpeed must know of experts: data-parallel ranks hold different ones (ep > 1).

DeepSpeed sums an expert's gradients over the ranks that hold it, `dp / ep` of them, and all others'
over dp. It divides both by dp, so one factor of the loss serves both; and its ZeRO optimizer counts
each rank's experts once in the gradient's norm. For that it must find three things: parameters with
its two attributes, groups of parameters that say so, and a module of its class MoE that makes the
process groups. `mark` and `param_groups` provide them; at ep 1 both change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hybridzoo.comm import Parallel
from hybridzoo.model import HybridLM

_MARKER = "deepspeed_marker"


def mark(model: HybridLM) -> None:
    """Mark this rank's experts for DeepSpeed, before it gets the model; all ranks call it.

    The model gets one more module without a forward. On a pipeline stage without experts, where
    others have some, it has a parameter that stays zero: DeepSpeed's collectives need every stage
    to have as many groups of parameters.
    """
    if model.parallel.ep.world == 1 or not any(p.experts for _, p in model.config.params()):
        return
    marker = _marker(model.parallel)
    model.add_module(_MARKER, marker)
    mine = [
        model.get_parameter(name)
        for _, p, names in model.local_names()
        for name in names.values()
        if p.experts
    ]
    if not mine:
        marker.placeholder = nn.Parameter(torch.zeros(1, device=model.device))
        mine = [marker.placeholder]
    for parameter in mine:
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = _name(model.parallel)  # type: ignore[attr-defined]


def is_marked(parameter: nn.Parameter) -> bool:
    """Whether other data-parallel ranks may hold other values of it."""
    return not getattr(parameter, "allreduce", True)


def param_groups(model: HybridLM, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizer's groups with the marked parameters in groups of their own, which come last.

    Unlike DeepSpeed's own function it never cuts a group by its size: pipeline stages could differ
    in their number then.

    Args:
        model: that `mark` has seen.
        groups: torch's param_groups; left as they are.
    """
    shared, marked = [], []
    for group in groups:
        mine = [p for p in group["params"] if is_marked(p)]
        rest = [p for p in group["params"] if not is_marked(p)]
        shared += [{**group, "params": rest}] if rest else []
        marked += [_expert_group(group, mine, model.parallel)] if mine else []
    marker = getattr(model, _MARKER, None)
    if marker is not None and not marked:
        marked = [_expert_group(shared[0], [marker.placeholder], model.parallel)]
    return shared + marked


def _expert_group(
    like: dict[str, Any], params: list[nn.Parameter], parallel: Parallel
) -> dict[str, Any]:
    return {**like, "params": params, "moe": True, "name": _name(parallel)}


def _name(parallel: Parallel) -> str:
    # DeepSpeed reads the number out of it
    return f"ep_size_{parallel.ep.world}"


def _marker(parallel: Parallel) -> nn.Module:
    """A module that DeepSpeed takes for a mixture of experts; it makes the groups when asked."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class Marker(MoE):  # type: ignore[misc]
        def __init__(self) -> None:
            # not MoE's own, which builds experts
            nn.Module.__init__(self)
            self.num_experts = self.ep_size = parallel.ep.world
            self.num_local_experts, self.expert_group_name = 1, _name(parallel)

        def set_deepspeed_parallelism(self, *_: object) -> None:
            # DeepSpeed keeps groups by name, also those of an engine with another layout. Its
            # groups with an mpu hold ranks of one slice: tokens are alike on all slices, and each
            # has its own part of an expert's width.
            for known in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP):
                known.pop(_name(parallel), None)
            groups._create_expert_data_and_model_parallel(parallel.ep.world, groups.mpu)
            found = groups._get_expert_parallel_group(_name(parallel))
            theirs, ours = (dist.get_process_group_ranks(g) for g in (found, parallel.ep.group))
            assert theirs == ours, f"DeepSpeed shares experts among ranks {theirs}, not {ours}"

    return Marker()
