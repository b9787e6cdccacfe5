"""causal_conv1d as a sum of shifted products."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels.packing import sequence_ids


def available(device: torch.device) -> None:
    """Everywhere."""


def why_not(*_: object, **__: object) -> None:
    """Never refuses."""


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `hybridzoo.kernels.causal_conv1d.causal_conv1d`."""
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_zeros(rows, weight.shape[1] - 1, x.shape[2])
    if initial_state is not None:
        state = initial_state.to(x.dtype)
    if cu_seqlens is None:
        padded = torch.cat([state, x], dim=1)
        # clone: a view would keep the whole input alive between decode steps
        final_state = padded[:, x.shape[1] :].clone()
        return convolve(padded, weight, bias, activation), final_state
    padded, tokens, ends = _insert_states(x, state, cu_seqlens)
    y = convolve(padded, weight, bias, activation)
    # the output at a token's place minus w - 1: the convolution drops that many in front
    y = y.index_select(1, tokens - state.shape[1])
    return y, padded[0].index_select(0, ends).view_as(state)


def convolve(padded: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """(b, w - 1 + l, i) -> (b, l, i), its dtype; summed in fp32, or in float64 if it is."""
    dtype = torch.promote_types(padded.dtype, torch.float32)
    wide, taps = padded.to(dtype), weight.to(dtype).unbind(1)
    length = padded.shape[1] - len(taps) + 1
    y = wide[:, :length] * taps[0]
    for k, tap in enumerate(taps[1:], 1):
        y = torch.addcmul(y, wide[:, k : k + length], tap)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    return y.to(padded.dtype)


def _insert_states(x: Tensor, state: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lay each sequence out behind its own state, so that a pack is one long sequence.

    Returns the layout (1, l + s (w - 1), i), the places of the tokens (l,) and those of the last
    w - 1 inputs of each sequence (s (w - 1),).
    """
    n_seqs, n_past, width = state.shape
    past = torch.arange(n_past, device=x.device)
    seqs = torch.arange(n_seqs, device=x.device)[:, None]
    length = x.shape[1]
    tokens = torch.arange(length, device=x.device)
    tokens = tokens + (sequence_ids(cu_seqlens, length) + 1) * n_past
    starts = (cu_seqlens[:-1, None] + seqs * n_past + past).flatten()
    ends = (cu_seqlens[1:, None] + seqs * n_past + past).flatten()
    padded = x.new_zeros(length + n_seqs * n_past, width)
    padded = padded.index_copy(0, tokens, x[0])
    padded = padded.index_copy(0, starts, state.reshape(-1, width))
    return padded[None], tokens, ends
