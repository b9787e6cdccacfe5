"""ssd in chunks: products of matrices inside each, a recurrence over them.

The decay between two steps of a chunk is the exponential of a sum taken from the later one
backwards, never of a difference of prefix sums, which cancels where one step forgets everything.
"""

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels.dt import step_size
from hybridzoo.kernels.packing import sequence_ids


def available(device: torch.device) -> None:
    """Everywhere."""


def why_not(*_: object, **__: object) -> None:
    """Never refuses."""


def run(
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
    """See `hybridzoo.kernels.ssd.ssd`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    log_a, xdt = dt * A.to(dtype), wide * dt[..., None]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = xdt.new_zeros(rows, *x.shape[2:], B.shape[3])
    if initial_state is not None:
        state = initial_state.to(dtype)
    if x.shape[1] == 0:
        y, state = xdt, state.clone()
    elif cu_seqlens is not None:
        y, state = _packed(xdt, log_a, B, C, chunk_size, state, cu_seqlens)
    elif x.shape[1] == 1:
        y, state = _one_step(xdt, log_a, B, C, state)
    else:
        y, state = _rows(xdt, log_a, B, C, chunk_size, state)
    if D is not None:
        y = y + wide * (D if D.dim() == 2 else D[:, None]).to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), state


def _one_step(
    xdt: Tensor, log_a: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    n_rep = xdt.shape[2] // B.shape[2]
    # (b, 1, g, n) -> (b, h, 1, n)
    B, C = (t[:, 0].repeat_interleave(n_rep, 1)[:, :, None] for t in (B, C))
    state = log_a[:, 0, :, None, None].exp() * state + xdt[:, 0, :, :, None] * B
    return (state * C).sum(-1)[:, None], state


def _rows(
    xdt: Tensor, log_a: Tensor, B: Tensor, C: Tensor, chunk_size: int, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Every row of the batch is one sequence."""
    length = xdt.shape[1]
    size = min(chunk_size, length)
    # zeros are exact padding: they decay by exp(0) and add nothing
    tail = -length % size
    xdt, log_a, B, C = (
        F.pad(t, (0, 0) * (t.dim() - 2) + (0, tail)).unflatten(1, (-1, size))
        for t in (xdt, log_a, B, C)
    )
    inputs, outputs, decay = _within(xdt, log_a, B, C)
    befores = []
    for c in range(decay.shape[1]):
        befores.append(state)
        state = torch.addcmul(inputs[:, c], decay[:, c, :, None, None], state)
    y = outputs + _from_state(torch.stack(befores, 1), log_a, C)
    return y.flatten(1, 2)[:, :length], state


def _packed(
    xdt: Tensor,
    log_a: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    state: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Every sequence starts a chunk, in a layout whose size the host knows without the lengths."""
    length, n_seqs = xdt.shape[1], cu_seqlens.shape[0] - 1
    # many short sequences would mostly fill a large chunk with padding
    size = min(chunk_size, max(16, length // n_seqs))
    n_chunks = (cu_seqlens.diff() + size - 1) // size
    ends = n_chunks.cumsum(0)
    owner = sequence_ids(cu_seqlens, length)
    tokens = torch.arange(length, device=xdt.device) - cu_seqlens[owner]
    tokens = tokens + (ends - n_chunks)[owner] * size
    capacity = length // size + n_seqs
    xdt, log_a, B, C = (
        t.new_zeros(capacity * size, *t.shape[2:])
        .index_copy(0, tokens, t[0])
        .view(1, capacity, size, *t.shape[2:])
        for t in (xdt, log_a, B, C)
    )
    inputs, outputs, decay = _within(xdt, log_a, B, C)
    chunks = torch.arange(capacity, device=xdt.device)
    # chunks behind the last sequence are empty and belong to none
    seq = torch.searchsorted(ends, chunks, right=True).clamp(max=n_seqs - 1)
    is_first = (chunks == (ends - n_chunks)[seq])[:, None, None, None]
    before, befores, afters = state[0], [], []
    for c in range(capacity):
        before = torch.where(is_first[c], state.index_select(0, seq[c : c + 1])[0], before)
        befores.append(before)
        before = torch.addcmul(inputs[0, c], decay[0, c, :, None, None], before)
        afters.append(before)
    y = outputs + _from_state(torch.stack(befores)[None], log_a, C)
    y = y.flatten(0, 2).index_select(0, tokens)[None]
    final = torch.stack(afters).index_select(0, (ends - 1).clamp(min=0))
    return y, torch.where((n_chunks > 0)[:, None, None, None], final, state)


def _within(xdt: Tensor, log_a: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each chunk does alone: its state from zero, its outputs from zero, its whole decay.

    Takes xdt (b, c, q, h, p), log_a (b, c, q, h), B and C (b, c, q, g, n); returns
    (b, c, h, p, n), (b, c, q, h, p) and (b, c, h).
    """
    n_groups = B.shape[3]
    decay = _decay(log_a.transpose(2, 3)).unflatten(2, (n_groups, -1))  # b c g r q k
    values = xdt.unflatten(3, (n_groups, -1)).permute(0, 1, 3, 4, 2, 5)  # b c g r k p
    B, C = B.transpose(2, 3), C.transpose(2, 3)  # b c g k n
    scores = (C @ B.transpose(-1, -2))[:, :, :, None] * decay  # b c g r q k
    outputs = (scores @ values).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)
    # the last row of the decay is what is left of each step at the end of its chunk
    kept = (values * decay[..., -1, :, None]).transpose(-1, -2)  # b c g r p k
    inputs = (kept.flatten(3, 4) @ B).view(*xdt.shape[:2], *xdt.shape[3:], -1)
    return inputs, outputs, log_a.sum(2).exp()


def _from_state(befores: Tensor, log_a: Tensor, C: Tensor) -> Tensor:
    """What the state before each chunk, (b, c, h, p, n), adds to its outputs, (b, c, q, h, p)."""
    states = befores.unflatten(2, (C.shape[3], -1)).flatten(3, 4)  # b c g rp n
    y = C.transpose(2, 3) @ states.transpose(-1, -2)  # b c g q rp
    y = y.transpose(2, 3).reshape(*log_a.shape, befores.shape[3])
    return y * log_a.cumsum(2).exp()[..., None]


def _decay(log_a: Tensor) -> Tensor:
    """exp(log_a[k + 1] + ... + log_a[q]) for k <= q, else 0: (..., q) -> (..., q, k)."""
    size = log_a.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=log_a.device).tril(-1)
    steps = log_a[..., None].expand(*log_a.shape, size).where(lower, 0)
    upper = lower.t()
    return steps.cumsum(-2).exp().masked_fill(upper, 0.0)
