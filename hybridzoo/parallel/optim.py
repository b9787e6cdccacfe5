"""AdamW with the declared decay groups, the learning rate's schedule, an average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hybridzoo.model import HybridLM
from hybridzoo.parallel import experts
from hybridzoo.parallel.recipe import Recipe

# what a checkpoint calls the average of a parameter
AVERAGE = ("average",)
Groups = tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]


def decay_groups(model: HybridLM) -> Groups:
    """(decayed, not decayed): every trained parameter by name, as its kind declares.

    The one place that knows: norms, biases, A_log, D and dt_bias say decay=False in their tables.
    """
    decayed: dict[str, nn.Parameter] = {}
    exempt: dict[str, nn.Parameter] = {}
    for _, declared, names in model.local_names():
        if declared.trained:
            group = decayed if declared.decay else exempt
            group.update({name: model.get_parameter(name) for name in names.values()})
    return decayed, exempt


def build_optimizer(model: HybridLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over both groups; one fused kernel on CUDA.

    Experts that ranks of ep share are in groups of their own.
    """
    decayed, exempt = decay_groups(model)
    groups = [
        {"params": list(decayed.values()), "weight_decay": recipe.weight_decay},
        {"params": list(exempt.values()), "weight_decay": 0.0},
    ]
    is_fused = model.device.type == "cuda"
    return torch.optim.AdamW(
        experts.param_groups(model, [g for g in groups if g["params"]]),
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.adam_eps,
        fused=is_fused,
    )


def lr_at(recipe: Recipe, step: int) -> float:
    """Learning rate of update `step`, counted from 0."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.lr
    start = recipe.warmup_steps
    if recipe.schedule == "wsd":
        start = max(start, recipe.steps - math.ceil(recipe.steps * recipe.decay_ratio))
    # the last update gets the lowest rate
    done = min(1.0, max(0.0, (step - start) / max(1, recipe.steps - 1 - start)))
    left = 1 - done if recipe.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * done))
    return recipe.lr * (recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * left)


class Average:
    """Exponential moving average of the weights, fp32.

    Early on, when the weights move fast, it forgets faster: decay is at most (1 + n) / (10 + n)
    after n updates.

    Args:
        params: what to average, by name.
        decay: weight of the old average.
    """

    def __init__(self, params: dict[str, nn.Parameter], decay: float) -> None:
        self.params, self.decay = params, decay
        self.tensors = {name: p.detach().clone() for name, p in params.items()}

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Take in the weights after update number `n`, counted from 1."""
        weight = 1 - min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(self.tensors.values()), list(self.params.values()), weight)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights until the block ends."""
        kept = [p.detach().clone() for p in self.params.values()]
        torch._foreach_copy_(list(self.params.values()), list(self.tensors.values()))
        try:
            yield
        finally:
            torch._foreach_copy_(list(self.params.values()), kept)
