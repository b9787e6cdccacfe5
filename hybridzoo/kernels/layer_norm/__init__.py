"""layer_norm: with the residual add before it."""

from torch import Tensor

from hybridzoo.kernels.dispatch import Op

_layer_norm = Op("layer_norm", {"reference": "hybridzoo.kernels.layer_norm.reference"})


@_layer_norm.contract
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Layer norm (arXiv 1607.06450, eq. 3-4) of the residual stream.

        h = residual + x          y = weight * (h - mean(h)) / sqrt(var(h) + eps) + bias

    Args:
        x: (..., d), fp32 / bf16 / fp16 / float64.
        weight: (d,), multiplied before the cast to x.dtype; None is one.
        bias: (d,), added before that cast; None is zero.
        eps: added to the variance, which divides by d.
        residual: like x, in its own dtype; None is zero.

    Returns:
        y, like x, computed in fp32; h in residual's dtype, or x itself where residual is None.

    Raises:
        BackendError: no backend supports these dtypes, device or sizes; the message gives each
            one's reason.
    """
    return _layer_norm(x, weight, bias, eps=eps, residual=residual)
