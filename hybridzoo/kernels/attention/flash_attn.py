"""attention by the flash-attn 2 package: fp16 and bf16 on CUDA, plain, windowed and packed."""

from importlib import metadata

import torch
from torch import Tensor

from hybridzoo.kernels.dispatch import capability

try:
    VERSION: str | None = metadata.version("flash-attn")
except metadata.PackageNotFoundError:
    VERSION = None
else:
    from flash_attn import flash_attn_func, flash_attn_varlen_func


def available(device: torch.device) -> str | None:
    """Needs flash-attn 2.3 (windows) or later and a CUDA device of capability 8.0."""
    if VERSION is None:
        return "flash-attn is not installed"
    if tuple(int(part) for part in VERSION.split(".")[:2]) < (2, 3):
        return f"flash-attn {VERSION} is older than 2.3"
    if device.type != "cuda":
        return f"it needs CUDA, the tensors are on {device.type}"
    if capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_positions: Tensor | None = None,
    k_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    **_: object,
) -> str | None:
    """Takes half precision, heads of at most 256, no cache positions and no left padding."""
    reason = available(q.device)
    if reason is not None:
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {q.dtype}"
    if q.shape[3] > 256 or q.shape[3] % 8:
        return f"head_dim ({q.shape[3]}) is not a multiple of 8 up to 256"
    if q_positions is not None:
        return "it has no per-query positions (q_positions)"
    if k_start is not None:
        return "it has no left padding (k_start)"
    if cu_seqlens is not None and max_seqlen is None:
        return "cu_seqlens comes without max_seqlen"
    return None


def run(
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
    """See `hybridzoo.kernels.attention.attention`."""
    # theirs counts keys to the left of the query's own, ours counts that one too
    window = (-1, -1) if window_size is None else (window_size - 1, 0)
    options = {"softmax_scale": scale, "causal": True, "window_size": window}
    if cu_seqlens is None:
        return flash_attn_func(q, k, v, **options)
    o = flash_attn_varlen_func(
        q[0], k[0], v[0], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options
    )
    return o[None]
