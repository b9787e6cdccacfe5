"""gated_rms_norm: the norm between Mamba-2's scan and its output projection."""

from torch import Tensor

from hybridzoo.errors import BackendError
from hybridzoo.kernels.dispatch import Op

_gated_rms_norm = Op("gated_rms_norm", {"reference": "hybridzoo.kernels.gated_rms_norm.reference"})


@_gated_rms_norm.contract
def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """RMSNorm over groups of channels, with a gate (Mamba-2, arXiv 2405.21060, section 7).

        y = RMSNorm(x * silu(z)) * weight          or          y = RMSNorm(x) * weight * silu(z)

    Args:
        x: (..., i), fp32 / bf16 / fp16 / float64.
        z: gate, like x.
        weight: (i,), multiplied before the cast to x.dtype, as in Mamba-2's kernel.
        eps: added to the mean square.
        group_size: channels that share one mean square; divides i; None is all of them.
        norm_before_gate: the second order.

    Returns:
        y, like x, computed in fp32.

    Raises:
        BackendError: no backend supports these dtypes, device or sizes, or group_size does not
            divide i.
    """
    if group_size is not None and x.shape[-1] % group_size:
        raise BackendError(
            f"gated_rms_norm: group_size ({group_size}) does not divide {x.shape[-1]} channels."
        )
    return _gated_rms_norm(
        x, z, weight, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate
    )
