"""cross_entropy in plain torch."""

import torch
from torch import Tensor


def available(device: torch.device) -> None:
    """Everywhere."""


def why_not(*_: object, **__: object) -> None:
    """Never refuses."""


def run(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """See `hybridzoo.kernels.cross_entropy.cross_entropy`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_valid = targets != ignore_index
    lse = wide.logsumexp(-1)
    loss = lse - wide.gather(-1, targets.where(is_valid, 0)[..., None]).squeeze(-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss.where(is_valid, 0).sum() / is_valid.sum().clamp(min=1)
