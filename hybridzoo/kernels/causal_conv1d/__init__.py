"""causal_conv1d: the short depthwise convolution before a scan."""

from typing import Literal

from torch import Tensor

from hybridzoo.errors import BackendError
from hybridzoo.kernels.dispatch import Op
from hybridzoo.kernels.packing import check_packed

_causal_conv1d = Op(
    "causal_conv1d",
    {
        "triton": "hybridzoo.kernels.causal_conv1d.triton",
        "reference": "hybridzoo.kernels.causal_conv1d.reference",
    },
)


@_causal_conv1d.contract
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution (Mamba, arXiv 2312.00752, section 3.4).

        y[t] = act(bias + sum_k weight[:, k] x[t - (w - 1) + k])

    Args:
        x: inputs, (b, l, i), fp32 / bf16 / fp16 / float64.
        weight: (i, w), w from 2 to 8; the last tap meets the current token.
        bias: (i,).
        activation: None or "silu".
        initial_state: the w - 1 inputs before x, oldest first, (b, w - 1, i); None is zero. With
            cu_seqlens (s, w - 1, i).
        cu_seqlens: (s + 1,) int32, ends of packed sequences from 0 to l (b == 1); no tap reaches
            across a start.

    Returns:
        y, (b, l, i), x.dtype, accumulated in fp32; final_state, like initial_state in x.dtype: the
        last w - 1 inputs, those of initial_state included where l < w - 1; differentiable, never
        an alias.

    Raises:
        BackendError: no backend supports these dtypes, device or sizes; the width or activation is
            not one of those above; or cu_seqlens contradicts the batch or the state.
    """
    if not 2 <= weight.shape[1] <= 8:
        raise BackendError(
            f"causal_conv1d: weight is {weight.shape[1]} wide; it takes 2 to 8. Change d_conv."
        )
    if activation not in (None, "silu"):
        raise BackendError(f"causal_conv1d: activation {activation!r} is neither None nor 'silu'.")
    check_packed("causal_conv1d", x, cu_seqlens, initial_state)
    return _causal_conv1d(
        x,
        weight,
        bias,
        activation=activation,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
