"""selective_scan in plain torch, with its adjoint written by hand: linear time, modest memory.

The states of one block of time exist at once; the forward keeps only the state before each block,
and the backward computes the others again. Inside a block, runs of SUB steps advance side by side,
so that a block of 256 steps takes about 35 launches.
"""

from math import inf
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridzoo.kernels.dt import step_size
from hybridzoo.kernels.packing import sequence_ids

BLOCK = 256
SUB = 16


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
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `hybridzoo.kernels.selective_scan.selective_scan`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, A, B, C = (t.to(dtype) for t in (x, A, B, C))
    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = wide.new_zeros(rows, *A.shape)
    if initial_state is not None:
        state = initial_state.to(dtype)
    if x.shape[1] == 1 and cu_seqlens is None:
        y, state = _one_step(wide, dt, A, B, C, state)
    else:
        y, state = _Scan.apply(wide, dt, A, B, C, state, cu_seqlens)
    if D is not None:
        y = torch.addcmul(y, wide, D.to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), state


def _one_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    x, dt = x[:, 0, :, None], dt[:, 0, :, None]
    # (b, 1, g, n) -> (b, i, n), or (b, 1, n) to broadcast
    n_rep = 1 if B.shape[2] == 1 else x.shape[1] // B.shape[2]
    B, C = (t[:, 0].repeat_interleave(n_rep, 1) if n_rep > 1 else t[:, 0] for t in (B, C))
    state = torch.addcmul(dt * x * B, (dt * A).exp(), state)
    return (state * C).sum(-1)[:, None], state


class _Pack(NamedTuple):
    """Which row of the states a token starts from and ends in; row s stands for none."""

    source: Tensor
    target: Tensor

    @classmethod
    def build(cls, cu_seqlens: Tensor, length: int) -> "_Pack":
        n_seqs = cu_seqlens.shape[0] - 1
        owner = sequence_ids(cu_seqlens, length)
        tokens = torch.arange(length, device=cu_seqlens.device)
        return cls(
            owner.where(tokens == cu_seqlens[owner], n_seqs),
            owner.where(tokens == cu_seqlens[owner + 1] - 1, n_seqs),
        )


class _Block(NamedTuple):
    """One block of time, time first; channels as g groups of r."""

    dt: Tensor  # t b g r 1
    x: Tensor  # t b g r 1
    B: Tensor  # t b g 1 n
    C: Tensor  # t b g n 1
    decay: Tensor  # t b g r n
    source: Tensor | None
    target: Tensor | None


def _block(
    start: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, pack: _Pack | None
) -> _Block:
    """The block of time that begins at `start`; A is (g, r, n)."""
    part = slice(start, start + BLOCK)
    dt, x = (
        t[:, part].transpose(0, 1).unflatten(-1, A.shape[:2])[..., None].contiguous()
        for t in (dt, x)
    )
    B, C = (t[:, part].transpose(0, 1).contiguous() for t in (B, C))
    source, target = (None, None) if pack is None else (pack.source[part], pack.target[part])
    return _Block(dt, x, B[..., None, :], C[..., None], (dt * A).exp_(), source, target)


def _chained(block: _Block, n_seqs: int) -> Tensor:
    """The block's decays, with zero where a sequence of a pack starts."""
    if block.source is None:
        return block.decay
    return block.decay * (block.source == n_seqs)[:, None, None, None, None]


def _states(block: _Block, before: Tensor, rows: Tensor) -> Tensor:
    """States after each step of a block, (t, b, g, r, n).

    `before` is the state before the block, (b, g, r, n); `rows` are the initial states, for a pack
    with a row of zeros behind them, (s + 1, g, r, n).
    """
    h = block.dt * block.x * block.B
    if block.source is not None:
        h.addcmul_(block.decay, rows.index_select(0, block.source)[:, None])
    return _recur_(_chained(block, rows.shape[0] - 1), h, before)


def _recur_(decay: Tensor, h: Tensor, before: Tensor) -> Tensor:
    """In place and in order of time, h[t] += decay[t] h[t - 1], with h[-1] = before."""
    n_subs = h.shape[0] // SUB
    done = n_subs * SUB if n_subs > 1 else 0
    if done:
        runs = h[:done].unflatten(0, (n_subs, SUB))
        decays = decay[:done].unflatten(0, (n_subs, SUB))
        for t in range(1, SUB):
            runs[:, t].addcmul_(decays[:, t], runs[:, t - 1])
        # products of decays only shrink: nothing is divided, so nothing overflows
        decays = decays.cumprod(1)
        befores = [before]
        for s in range(n_subs - 1):
            befores.append(torch.addcmul(runs[s, -1], decays[s, -1], befores[-1]))
        runs.addcmul_(decays, torch.stack(befores)[:, None])
        before = h[done - 1]
    for step, factor in zip(h[done:].unbind(0), decay[done:].unbind(0), strict=True):
        before = step.addcmul_(factor, before)
    return h


class _Scan(torch.autograd.Function):
    """(x, dt, A, B, C, state, cu_seqlens) -> (y, final_state), all in one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        length, n_groups = x.shape[1], B.shape[2]
        pack = None if cu_seqlens is None else _Pack.build(cu_seqlens, length)
        groups = A.unflatten(0, (n_groups, -1))
        rows = state.unflatten(1, (n_groups, -1))
        before = rows
        if pack is not None:
            before = torch.zeros_like(rows[:1])
            rows = torch.cat([rows, torch.zeros_like(rows[:1])])
        final = rows.clone()
        y, befores = torch.empty_like(x), []
        for start in range(0, length, BLOCK):
            befores.append(before)
            block = _block(start, x, dt, groups, B, C, pack)
            h = _states(block, before, rows)
            y[:, start : start + BLOCK] = (h @ block.C).flatten(2).transpose(0, 1)
            # clone: a view would keep the whole block alive
            before = h[-1].clone()
            if block.target is not None:
                final.index_copy_(0, block.target, h[:, 0])
        ctx.save_for_backward(x, dt, A, B, C, rows, cu_seqlens, *befores)
        if pack is None:
            return y, (before if befores else final).flatten(1, 2)
        return y, final[:-1].flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, rows, cu_seqlens, *befores = ctx.saved_tensors
        length, n_groups = x.shape[1], B.shape[2]
        pack = None if cu_seqlens is None else _Pack.build(cu_seqlens, length)
        groups = A.unflatten(0, (n_groups, -1))
        dfinal = dfinal.unflatten(1, (n_groups, -1))
        drows, after = dfinal, dfinal
        if pack is not None:
            dfinal = torch.cat([dfinal, torch.zeros_like(dfinal[:1])])
            is_empty = F.pad(cu_seqlens.diff() == 0, (0, 1))
            drows = dfinal * is_empty[:, None, None, None]
            after = torch.zeros_like(dfinal[:1])
        grads = [torch.empty_like(t) for t in (x, dt, B, C)]
        dA = torch.zeros_like(groups)
        for start, before in zip(reversed(range(0, length, BLOCK)), reversed(befores), strict=True):
            block = _block(start, x, dt, groups, B, C, pack)
            dout = dy[:, start : start + BLOCK].transpose(0, 1).reshape_as(block.x)
            dh = block.C.transpose(-1, -2) * dout
            if block.target is not None:
                dh += dfinal.index_select(0, block.target)[:, None]
            after = _adjoint_(block, dh, after, rows.shape[0] - 1)
            *parts, dA_part = _gradients(block, dh, dout, before, rows, groups)
            for grad, part in zip(grads, parts, strict=True):
                grad[:, start : start + BLOCK] = part.transpose(0, 1).reshape_as(
                    grad[:, start : start + BLOCK]
                )
            dA += dA_part
            if block.source is not None:
                drows.index_copy_(0, block.source, (block.decay * dh)[:, 0])
        drows = after if pack is None else drows[:-1]
        dx, ddt, dB, dC = grads
        return dx, ddt, dA.flatten(0, 1), dB, dC, drows.flatten(1, 2), None


def _adjoint_(block: _Block, dh: Tensor, after: Tensor, n_seqs: int) -> Tensor:
    """In place, dh[t] += decay[t + 1] dh[t + 1]; `after` is that of the block behind this one.

    Returns the same for the block in front.
    """
    chained = _chained(block, n_seqs)
    backwards = torch.cat([chained[1:], torch.ones_like(chained[:1])]).flip(0)
    dh.copy_(_recur_(backwards, dh.flip(0), after).flip(0))
    return chained[0] * dh[0]


def _gradients(
    block: _Block, dh: Tensor, dout: Tensor, before: Tensor, rows: Tensor, A: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, B, C of this block, and its part of A's, given those of its states."""
    h = _states(block, before, rows)
    past = torch.cat([before[None], h[:-1]])
    if block.source is not None:
        starts = rows.index_select(0, block.source)[:, None]
        goes_on = (block.source == rows.shape[0] - 1)[:, None, None, None, None]
        past = torch.where(goes_on, past, starts)
    dlog_decay = past.mul_(block.decay).mul_(dh)
    dinput = dh @ block.B.transpose(-1, -2)
    dx = block.dt * dinput
    ddt = block.x * dinput + (dlog_decay * A).sum(-1, keepdim=True)
    dB = (block.dt * block.x).transpose(-1, -2) @ dh
    dC = h.transpose(-1, -2) @ dout
    return dx, ddt, dB, dC, (dlog_decay * block.dt).sum((0, 1))
