"""cross_entropy: the loss of next-token prediction."""

from torch import Tensor

from hybridzoo.kernels.dispatch import Op

_cross_entropy = Op("cross_entropy", {"reference": "hybridzoo.kernels.cross_entropy.reference"})


@_cross_entropy.contract
def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """Mean negative log-likelihood, with the z-loss of PaLM (arXiv 2204.02311, section 5).

        loss = mean over valid t of   lse[t] - logits[t, targets[t]] + z_loss * lse[t] ** 2

    Args:
        logits: (..., v), fp32 / bf16 / fp16 / float64; lse is their log-sum-exp.
        targets: (...), int64.
        ignore_index: targets that do not count.
        z_loss: weight of the squared log-partition.

    Returns:
        The loss, a scalar, fp32 (float64 for float64 logits); 0 where no target counts.

    Raises:
        BackendError: no backend supports these dtypes, device or sizes; the message gives each
            one's reason.
    """
    return _cross_entropy(logits, targets, ignore_index=ignore_index, z_loss=z_loss)
