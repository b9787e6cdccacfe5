"""ssd: the scan of Mamba-2."""

from math import inf

from torch import Tensor

from hybridzoo.kernels.dispatch import Op
from hybridzoo.kernels.packing import check_packed

_ssd = Op("ssd", {"reference": "hybridzoo.kernels.ssd.reference"})


@_ssd.contract
def ssd(
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
    chunk_size: int = 128,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """State space dual scan with one decay a head (Mamba-2, arXiv 2405.21060, eq. 1-2, Listing 1).

        h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T          y[t] = C[t] h[t] + D x[t]

    Args:
        x: inputs, (b, l, h, p), fp32 / bf16 / fp16 / float64.
        dt: raw step sizes, (b, l, h); dt_bias is added, then softplus and clamp, all in fp32.
        A: decay a head, (h,), fp32, < 0.
        B: input map, (b, l, g, n), x.dtype; g divides h, head j uses group j // (h / g).
        C: output map, like B.
        D: skip weight a head, (h,) or (h, p), fp32.
        z: gate, like x; y is multiplied by silu(z).
        dt_bias: (h,), fp32.
        dt_softplus: whether dt passes through softplus.
        dt_limit: bounds of the step size, after softplus.
        chunk_size: tokens a chunk; changes speed and rounding, not the function.
        initial_state: h[-1], (b, h, p, n), fp32; None is zero. With cu_seqlens (s, h, p, n).
        cu_seqlens: (s + 1,) int32, ends of packed sequences from 0 to l (b == 1); the state is
            reset at each start.

    Returns:
        y, (b, l, h, p), x.dtype, accumulated in fp32; final_state, like initial_state, fp32,
        differentiable, never an alias of initial_state. Float64 throughout for float64 inputs.

    Raises:
        BackendError: no backend supports these dtypes, device or sizes; the message gives each
            one's reason. Or cu_seqlens contradicts the batch or the state.
    """
    check_packed("ssd", x, cu_seqlens, initial_state)
    return _ssd(
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
        chunk_size=chunk_size,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
