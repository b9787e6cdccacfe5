"""One residual sublayer: x + layer(norm(x))."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.config import Branch, HybridConfig
from hybridzoo.errors import ConfigError
from hybridzoo.kernels.dispatch import autocast_dtype
from hybridzoo.layers import Layer, Sequence, State
from hybridzoo.layers.norm import LayerNorm, RMSNorm
from hybridzoo.recompute import Recompute, recomputed


class Block(nn.Module):
    """One residual sublayer: h += multiplier * delta; the layer of norm(h) gives the next delta.

    The add waits for the next block's norm so that the two fuse. Several layers (a parallel place)
    read the same normed input and are summed; under tensor parallelism one collective enters and
    one leaves, however many they are.
    """

    def __init__(
        self,
        config: HybridConfig,
        place: tuple[Branch, ...],
        shared: nn.ModuleDict,
        norm: RMSNorm | LayerNorm,
        **where: Any,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.place, self.parallel = place, where["parallel"]
        self.residual_multiplier, self.dropout = config.residual_multiplier, config.dropout
        self.recompute: Recompute = "none"
        own = {b.letter: b.config.build(config.d_model, **where) for b in place if b.shared is None}
        if len(place) > 1:
            self.branch = nn.ModuleDict(own)
        elif own:
            self.layer = own[place[0].letter]
        # shared layers are registered once, by the model; a tuple keeps them out of this block's
        # own parameters.
        self._shared = (shared,)

    def forward(
        self, h: Tensor, delta: Tensor | None, state: list[State] | None, ctx: Sequence
    ) -> tuple[Tensor, Tensor]:
        """(h, delta) -> (h, delta).

        The residual stream h is (b, l, d), delta what is still to be added to it; under sequence
        parallelism both hold this rank's tokens, (b, l / tp, d).
        """
        if self.recompute != "none" and state is None and torch.is_grad_enabled():
            h, share = recomputed(self.recompute, self._share, h, delta, ctx)
        else:
            h, share = self._share(h, delta, state, ctx)
        return h, F.dropout(self.parallel.leave(share), self.dropout, self.training)

    def _share(
        self, h: Tensor, delta: Tensor | None, state: list[State] | None, ctx: Sequence
    ) -> tuple[Tensor, Tensor]:
        """The stream with delta added, and this rank's share of what is to be added next."""
        with _casting_each_time(h.device):
            x, h = self.normed(h, delta)
            x = self.parallel.enter(x)
            outs = []
            for i, (branch, layer) in enumerate(zip(self.place, self.layers(), strict=True)):
                own = state[i] if state else None
                y = layer(scaled(x, branch.config.input_multiplier), own, ctx)
                outs.append(scaled(y, branch.config.output_multiplier))
        return h, sum(outs[1:], outs[0])

    def layers(self) -> list[Layer]:
        """One layer a branch, looked up each time: a module put in a layer's place is used."""
        (shared,) = self._shared

        def find(branch: Branch) -> Layer:
            if branch.shared:
                return shared[branch.shared]
            return self.branch[branch.letter] if len(self.place) > 1 else self.layer

        return [find(branch) for branch in self.place]

    def normed(self, h: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(h + multiplier * delta), h + multiplier * delta)."""
        if delta is None:
            # nothing to add yet, but the dtypes and roundings of every other block
            delta = self.norm.weight.new_zeros(()).expand(h.shape)
        return self.norm(scaled(delta, self.residual_multiplier), residual=h)

    def init_state(self, batch: int, max_len: int) -> list[State]:
        """One empty State a branch."""
        return [layer.init_state(batch, max_len) for layer in self.layers()]


def scaled(x: Tensor, multiplier: float) -> Tensor:
    """X times a multiplier, which is usually 1."""
    return x if multiplier == 1.0 else x * multiplier


def stage_places(stage: range | None, n: int) -> range:
    """The places of a stack of n that a model holds: a pipeline stage's; None is all."""
    if stage is None:
        return range(n)
    if not stage or stage.step != 1 or stage.start < 0 or stage.stop > n:
        rule = f"it is one or more places in a row, of 0 to {n - 1}"
        raise ConfigError(f"stage: {stage} cannot be built; {rule}. Use parallel.stages.")
    return stage


def _casting_each_time(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast, if the caller is under it, without its cache of cast weights.

    The places of a shared weight would add their gradients to one cast copy, in half precision; and
    a backward that computes a block again would find the cache empty, so other ops than before.
    """
    dtype = autocast_dtype(device)
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=False)
