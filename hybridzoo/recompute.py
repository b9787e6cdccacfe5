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

# mixer: all but what the projections and the ranks' collectives gave; full: all but the router's
# picks and the ranks' sums, so that sequence parallelism gathers again what it would else keep.
Recompute = Literal["none", "mixer", "full"]

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
# which experts a token takes must not change between the two computations
_PICKS = [_aten.topk.default, _aten.sort.stable]
# inside a layer they are small: Mamba-1's dt, B and C, squares of a norm
_SUMS = [_c10d.all_reduce.default]
# the block's input under sequence parallelism, and tokens that travelled to their experts
_GATHERED = [_c10d.all_gather_into_tensor.default, _c10d.all_to_all_single.default]
# not bmm: the scans' and attention's own products are what is computed again
_PRODUCTS = [_aten.mm.default, _aten.addmm.default, _aten._grouped_mm.default]
_KEPT = {"mixer": [*_PICKS, *_SUMS, *_GATHERED, *_PRODUCTS], "full": [*_PICKS, *_SUMS]}

Forward = Callable[[Tensor, Tensor | None, None, Sequence], tuple[Tensor, Tensor]]


def recomputed(
    mode: Recompute, forward: Forward, h: Tensor, delta: Tensor | None, ctx: Sequence
) -> tuple[Tensor, Tensor]:
    """What a block's `forward` returns; the backward computes again what `mode` does not keep.

    Args:
        mode: "mixer" or "full".
        forward: without state and random numbers, of h, delta, no state and ctx.
        h: residual stream, (b, l, d).
        delta: what is still to be added to it, (b, l, d).
        ctx: the sequence; losses that the layers add reach ctx.aux once.
    """

    def run(h: Tensor, delta: Tensor | None) -> tuple[Tensor, ...]:
        # a list of its own: the second computation must not add its losses once more
        aux: list[Tensor] = []
        h, share = forward(h, delta, None, replace(ctx, aux=None if ctx.aux is None else aux))
        return h, share, *aux

    contexts = partial(create_selective_checkpoint_contexts, _KEPT[mode])
    h, share, *aux = checkpoint(
        run,
        h,
        delta,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
    )
    if ctx.aux is not None:
        ctx.aux.extend(aux)
    return h, share
