"""attention: causal, grouped-query, over whole sequences, caches, windows and packs."""

from torch import Tensor

from hybridzoo.errors import BackendError
from hybridzoo.kernels.dispatch import Op
from hybridzoo.kernels.packing import check_packed

_attention = Op(
    "attention",
    {
        "flash_attn": "hybridzoo.kernels.attention.flash_attn",
        "sdpa": "hybridzoo.kernels.attention.sdpa",
        "reference": "hybridzoo.kernels.attention.reference",
    },
)


@_attention.contract
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window_size: int | None = None,
    q_positions: Tensor | None = None,
    k_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Causal softmax attention (arXiv 1706.03762, eq. 1) with shared key heads (arXiv 2305.13245).

    Query t stands at key index t + (m - l), or at q_positions[t], and sees the keys up to its own.
    A query that sees no key gives 0. Keys and values must be finite even where nothing sees them.

    Args:
        q: queries, (b, l, h, p), fp32 / bf16 / fp16 / float64.
        k: keys, (b, m, hk, p); hk divides h, head j uses key head j // (h / hk).
        v: values, like k.
        scale: multiplies the scores; None is p ** -0.5.
        window_size: keys a query sees, its own included; None is all.
        q_positions: key index of each query, (b, l) int32, where k and v are a cache; negative is
            padding.
        k_start: first visible key of each row, (b,) int32, where rows are padded on the left.
        cu_seqlens: (s + 1,) int32, ends of packed sequences from 0 to l (b == 1, l == m).
        max_seqlen: the longest of them, as an int, so that no backend asks the device for it.

    Returns:
        o, (b, l, h, p), q.dtype, accumulated in fp32; float64 throughout for float64 inputs.

    Raises:
        BackendError: no backend supports these dtypes, device or sizes; the message gives each
            one's reason. Or cu_seqlens contradicts the other arguments.
    """
    check_packed("attention", q, cu_seqlens)
    if cu_seqlens is not None and not (q_positions is None and k_start is None):
        raise BackendError(
            "attention: cu_seqlens comes with q_positions or k_start; a pack has no padding and no "
            "cache. Drop one of them."
        )
    if window_size is not None and window_size < 1:
        raise BackendError(f"attention: window_size is {window_size}; it must be at least 1.")
    return _attention(
        q,
        k,
        v,
        scale=scale,
        window_size=window_size,
        q_positions=q_positions,
        k_start=k_start,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )
