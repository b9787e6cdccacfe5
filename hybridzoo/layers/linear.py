"""The Linear of a tensor-parallel rank, where a plain one would lose gradients or repeat a bias."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.comm import SINGLE, Axis


class RankLinear(nn.Linear):
    """A Linear that all ranks hold whole, or whose outputs they sum, each with a share of its bias.

    Gradients are summed of what sees a share of them only.
    """

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
        weight, bias = self.weight, self.bias
        if bias is not None and self.gives_shares:
            bias = self.axis.share(bias)
        elif bias is not None and self.is_whole:
            weight, bias = self.axis.sum_grads([weight, bias], [1, 1])
            return F.linear(input, weight, bias)
        if self.is_whole:
            (weight,) = self.axis.sum_grads([weight], [1])
        return F.linear(input, weight, bias)
