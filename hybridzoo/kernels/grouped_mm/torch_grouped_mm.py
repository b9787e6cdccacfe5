"""grouped_mm by torch.nn.functional.grouped_mm: CUDA, bf16, no host sync."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels.dispatch import capability


def available(device: torch.device) -> str | None:
    """Needs a CUDA device of capability 8.0 and a torch that has the function."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if device.type != "cuda":
        return f"it needs CUDA, the tensors are on {device.type}"
    if capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def why_not(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    """Takes bf16 with rows of a multiple of 16 bytes."""
    reason = available(x.device)
    if reason is not None:
        return reason
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {x.dtype} x {weight.dtype}"
    if weight.shape[1] % 8 or weight.shape[2] % 8:
        return f"it needs widths of a multiple of 8, not {weight.shape[1]} x {weight.shape[2]}"
    return None


def run(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """See `hybridzoo.kernels.grouped_mm.grouped_mm`."""
    y = F.grouped_mm(x.contiguous(), weight.contiguous().transpose(1, 2), offs=offsets)
    return _DenseGradient.apply(y)


class _DenseGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous: grouped_mm's backward refuses expanded ones."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        # without rows any strides pass for contiguous, but not there
        return dy.contiguous() if dy.shape[0] else dy.new_zeros(dy.shape)
