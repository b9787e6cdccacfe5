"""The Linear of a tensor-parallel rank, where a plain one would lose gradients or repeat a bias."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.comm import SINGLE, Axis


class RankLinear(nn.Linear):
    """A Linear that sums the gradients of what other ranks hold too: its bias, or all of it."""

    axis, is_whole, gives_shares = SINGLE.tp, False, True

    def give(self, axis: Axis, *, is_whole: bool, gives_shares: bool) -> None:
        """Say where it stands.

        Args:
            axis: the ranks.
            is_whole: every rank holds the whole weight, and sees a share of its gradient.
            gives_shares: the ranks' outputs are summed, so each adds its share of the bias.
        """
        self.axis, self.is_whole, self.gives_shares = axis, is_whole, gives_shares

    def forward(self, input: Tensor) -> Tensor:
        """(..., out), or this rank's share of it."""
        held = {"weight": self.weight} if self.is_whole else {}
        if self.bias is not None:
            held["bias"] = self.bias
        summed = self.axis.sum_grads(list(held.values()), [1] * len(held))
        held = dict(zip(held, summed, strict=True))
        weight, bias = held.get("weight", self.weight), held.get("bias")
        if bias is not None and self.gives_shares:
            bias = bias / self.axis.world
        return F.linear(input, weight, bias)
