"""Activation checkpointing of one residual sublayer: compute it again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hybridzoo.layers import Sequence

# mixer: all but what the projections and the ranks' sums gave; full: all but the router's picks.
Recompute = Literal["none", "mixer", "full"]

_aten = torch.ops.aten
# which experts a token takes must not change between the two computations
_PICKS = [_aten.topk.default, _aten.sort.stable]
_SUMS = [
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops._c10d_functional.wait_tensor.default,
]
_PRODUCTS = [_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten._grouped_mm.default]
_KEPT = {"mixer": _PICKS + _SUMS + _PRODUCTS, "full": _PICKS}

Forward = Callable[[Tensor, Tensor | None, None, Sequence], tuple[Tensor, Tensor]]


def recomputed(
    mode: Recompute, forward: Forward, h: Tensor, delta: Tensor | None, ctx: Sequence
) -> tuple[Tensor, Tensor]:
    """A block's (h, delta), of which the backward computes again what `mode` does not keep.

    Args:
        mode: "mixer" or "full".
        forward: a block's forward without state.
        h: residual stream, (b, l, d).
        delta: what is still to be added to it, (b, l, d).
        ctx: the sequence; losses that the layers add reach ctx.aux once.
    """

    def run(h: Tensor, delta: Tensor | None) -> tuple[Tensor, ...]:
        # a list of its own: the second computation must not add its losses once more
        aux: list[Tensor] = []
        h, delta = forward(h, delta, None, replace(ctx, aux=None if ctx.aux is None else aux))
        return h, delta, *aux

    contexts = partial(create_selective_checkpoint_contexts, _KEPT[mode])
    h, delta, *aux = checkpoint(run, h, delta, use_reentrant=False, context_fn=contexts)
    if ctx.aux is not None:
        ctx.aux.extend(aux)
    return h, delta
