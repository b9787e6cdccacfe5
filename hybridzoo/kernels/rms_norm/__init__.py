"""rms_norm: with the residual add before it."""

from torch import Tensor

from hybridzoo.kernels.dispatch import Op

_rms_norm = Op(
    "rms_norm",
    {
        "triton": "hybridzoo.kernels.rms_norm.triton",
        "reference": "hybridzoo.kernels.rms_norm.reference",
    },
)


@_rms_norm.contract
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    residual: Tensor | None = None,
    weight_fp32: bool = False,
) -> tuple[Tensor, Tensor]:
    """Root mean square norm (arXiv 1910.07467, eq. 4) of the residual stream.

        h = residual + x          y = weight * h / sqrt(mean(h ** 2) + eps)

    Args:
        x: (..., d), fp32 / bf16 / fp16 / float64.
        weight: (d,); None is one.
        eps: added to the mean square.
        residual: like x, in its own dtype; None is zero.
        weight_fp32: multiply by the weight in fp32, before the cast to x.dtype (Nemotron-H), rather
            than after it; changes rounding only.

    Returns:
        y, like x, computed in fp32; h in residual's dtype, or x itself where residual is None.

    Raises:
        BackendError: no backend supports these dtypes, device or sizes; the message gives each
            one's reason.
    """
    return _rms_norm(x, weight, eps=eps, residual=residual, weight_fp32=weight_fp32)
