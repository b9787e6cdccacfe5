"""selective_scan: the recurrence of Mamba-1."""

from math import inf

from torch import Tensor

from hybridzoo.kernels.dispatch import Op
from hybridzoo.kernels.packing import check_packed

_selective_scan = Op(
    "selective_scan",
    {
        "cuda": "hybridzoo.kernels.selective_scan.cuda",
        "triton": "hybridzoo.kernels.selective_scan.triton",
        "reference": "hybridzoo.kernels.selective_scan.reference",
    },
)


@_selective_scan.contract
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective scan with one decay a channel and state (Mamba, arXiv 2312.00752, Algorithm 2).

        h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]          y[t] = C[t] h[t] + D x[t]

    Args:
        x: inputs, (b, l, i), fp32 / bf16 / fp16 / float64.
        dt: raw step sizes, (b, l, i); dt_bias is added, then softplus and clamp, all in fp32.
        A: decays, (i, n), fp32, < 0.
        B: input map, (b, l, g, n), x.dtype; g divides i, channel c uses group c // (i / g).
        C: output map, like B.
        D: skip weight a channel, (i,), fp32.
        z: gate, like x; y is multiplied by silu(z).
        dt_bias: (i,), fp32.
        dt_softplus: whether dt passes through softplus.
        dt_limit: bounds of the step size, after softplus.
        initial_state: h[-1], (b, i, n), fp32; None is zero. With cu_seqlens (s, i, n).
        cu_seqlens: (s + 1,) int32, ends of packed sequences from 0 to l (b == 1); the state is
            reset at each start.

    Returns:
        y, (b, l, i), x.dtype, accumulated in fp32; final_state, like initial_state, fp32,
        differentiable, never an alias of initial_state. Float64 throughout for float64 inputs.

    Raises:
        BackendError: no backend supports these dtypes, device or sizes; the message gives each
            one's reason. Or cu_seqlens contradicts the batch or the state.
    """
    check_packed("selective_scan", x, cu_seqlens, initial_state)
    return _selective_scan(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
