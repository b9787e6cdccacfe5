"""Norms shared by blocks and kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from hybridzoo.comm import SINGLE, Axis, Parallel
from hybridzoo.kernels.gated_rms_norm import gated_rms_norm
from hybridzoo.kernels.layer_norm import layer_norm
from hybridzoo.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), optionally fused with the residual add before it.

    Args:
        weight: (d,) parameter, or None for a norm without weight.
        eps: added to the mean square.
        weight_fp32: multiply by the weight before the cast to x's dtype.
        axis: ranks that norm other tokens with the same weight, whose gradient is summed.
    """

    def __init__(
        self,
        weight: nn.Parameter | None,
        eps: float,
        *,
        weight_fp32: bool = False,
        axis: Axis = SINGLE.tp,
    ) -> None:
        super().__init__()
        self.weight, self.eps, self.weight_fp32, self.axis = weight, eps, weight_fp32, axis

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y, h) with h = residual + x in the residual's dtype and y its norm in x's dtype.

        Both (..., d).
        """
        options = {"eps": self.eps, "residual": residual, "weight_fp32": self.weight_fp32}
        weight = self.weight
        if weight is not None:
            (weight,) = self.axis.sum_grads([weight], [1])
        return rms_norm(x, weight, **options)


class LayerNorm(nn.Module):
    """Layer norm (arXiv 1607.06450), optionally fused with the residual add before it.

    Args:
        weight: (d,) parameter.
        bias: (d,) parameter.
        eps: added to the variance.
        axis: as in RMSNorm.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter, eps: float, *, axis: Axis = SINGLE.tp
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.axis = weight, bias, eps, axis

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y, h) with h = residual + x in the residual's dtype and y its norm in x's dtype.

        Both (..., d).
        """
        weight, bias = self.axis.sum_grads([self.weight, self.bias], [1, 1])
        return layer_norm(x, weight, bias, eps=self.eps, residual=residual)


NormKind = Literal["rms_norm", "layer_norm"]


def stream_norm(
    kind: NormKind,
    parameter: Callable[[], nn.Parameter],
    eps: float,
    weight_fp32: bool,
    parallel: Parallel,
) -> RMSNorm | LayerNorm:
    """A norm of the residual stream; `parameter` makes each of its (d,) parameters."""
    # with sequence_parallel a rank norms its own tokens alone
    axis = parallel.tp if parallel.sequence_parallel else SINGLE.tp
    if kind == "layer_norm":
        return LayerNorm(parameter(), parameter(), eps, axis=axis)
    return RMSNorm(parameter(), eps, weight_fp32=weight_fp32, axis=axis)


class GatedRMSNorm(nn.Module):
    """Grouped RMSNorm with a silu gate (Mamba-2), over the same groups at every tp.

    Args:
        weight: (i,) this rank's channels.
        eps: added to each group's mean square.
        group_size: channels of one full group.
        norm_before_gate: norm(y) * silu(z) instead of norm(y * silu(z)).
        parallel: ranks over which a group wider than this rank's channels is summed.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        *,
        parallel: Parallel = SINGLE,
    ) -> None:
        super().__init__()
        self.weight, self.eps, self.group_size = weight, eps, group_size
        self.norm_before_gate, self.tp = norm_before_gate, parallel.tp

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """(b, l, i) from the mixer's output y and the gate z, both (b, l, i)."""
        if y.shape[-1] % self.group_size:
            return self._across_ranks(y, z)
        order = {"norm_before_gate": self.norm_before_gate}
        return gated_rms_norm(y, z, self.weight, eps=self.eps, group_size=self.group_size, **order)

    def _across_ranks(self, y: Tensor, z: Tensor) -> Tensor:
        # one group's channels lie on several ranks: its squares are summed over them and divided by
        # the full width.
        wide = torch.promote_types(y.dtype, torch.float32)
        gate = nn.functional.silu(z.to(wide))
        u = y.to(wide) if self.norm_before_gate else y.to(wide) * gate
        n_groups = y.shape[-1] * self.tp.world // self.group_size
        mine = self.tp.rank * n_groups // self.tp.world
        squares = nn.functional.pad(u.square().sum(-1, keepdim=True), (mine, n_groups - 1 - mine))
        mean = self.tp.sum_both(squares)[..., mine : mine + 1] / self.group_size
        normed = u * torch.rsqrt(mean + self.eps) * self.weight.to(wide)
        return (normed * gate if self.norm_before_gate else normed).to(y.dtype)
