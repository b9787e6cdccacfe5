"""causal-conv1d's functions over hybridzoo's kernels; hybridzoo.compat.mamba_ssm has them as well.

See there for layouts and letters. Unlike theirs they run on any device, take 2 to 8 taps and any
number of channels, and give the same bits every time.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.errors import BackendError
from hybridzoo.kernels.causal_conv1d import causal_conv1d
from hybridzoo.kernels.causal_conv1d_step import causal_conv1d_step
from hybridzoo.kernels.slots import read_rows, write_rows_

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False,
    final_states_out: Tensor | None = None, activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`causal_conv1d.causal_conv1d_fn`, by `kernels.causal_conv1d`.

    Every option takes either layout, 2 to 8 taps and any width; theirs wants channel-last tensors
    for states and packs. With seq_idx the host waits for the device, to count the sequences;
    `kernels.causal_conv1d` takes cu_seqlens and never waits.

    Args:
        x: inputs, (b, d, l), fp32 / bf16 / fp16 / float64.
        weight: (d, w); the last tap meets the current token.
        bias: (d,).
        seq_idx: (b, l) integers: a run of equal ones along a row is a sequence, no tap reaches
            across its start, and a negative one is padding, whose output is zero.
        initial_states: the w - 1 inputs before x, (b, d, w - 1); None is zero.
        return_final_states: return the last w - 1 inputs as well, those of initial_states included
            where l < w - 1.
        final_states_out: MUTATED: (b, d, w - 1), to hold them; left alone unless they are returned.
        activation: None, "silu" or "swish", which is the same.

    Returns:
        out, (b, d, l), x.dtype; or (out, final_states), final_states (b, d, w - 1) or
        final_states_out itself. Both are differentiable.

    Raises:
        BackendError: another activation or width; or seq_idx with states, which theirs refuses too.
    """
    silu = _activation("causal_conv1d_fn", activation)
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise BackendError(
                "causal_conv1d_fn: seq_idx beside initial_states or return_final_states; a pack "
                "has no states here. hybridzoo.kernels.causal_conv1d takes one a sequence, with "
                "cu_seqlens."
            )
        packed, cu_seqlens = x.mT.reshape(1, -1, x.shape[1]), _cu_seqlens(seq_idx)
        y, _ = causal_conv1d(packed, weight, bias, activation=silu, cu_seqlens=cu_seqlens)
        return y.view(x.mT.shape).mT.masked_fill(seq_idx[:, None] < 0, 0.0)
    past = None if initial_states is None else initial_states.mT
    y, final = causal_conv1d(x.mT, weight, bias, activation=silu, initial_state=past)
    if not return_final_states:
        return y.mT
    return y.mT, final.mT if final_states_out is None else final_states_out.copy_(final.mT)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
    activation: str | None = None, cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`causal_conv1d.causal_conv1d_update`: some more tokens, the state in place.

    One token without cache_seqlens is `kernels.causal_conv1d_step`, which reads any strides; a
    conv_state of w - 1 inputs takes that one kernel, a longer one (Mamba's is w) also moves the
    others by one. More tokens, or a circular buffer, are `kernels.causal_conv1d` and copies of the
    rows. The host never waits. Like theirs it gives no gradients, under torch.no_grad() or not.

    Args:
        x: inputs, (b, d) or (b, d, l).
        conv_state: MUTATED: the last s inputs, oldest first, (b, d, s), s >= w - 1; any number of
            rows with conv_state_indices.
        weight: (d, w); the last tap meets the current token.
        bias: (d,).
        activation: None, "silu" or "swish", which is the same.
        cache_seqlens: (b,) integers; conv_state is then a circular buffer, x is written from
            cache_seqlens % s on, and the inputs before that place are the past.
        conv_state_indices: (b,) integers, each sequence's row of conv_state, none twice; a negative
            one leaves every state as it is and its output is zero.

    Returns:
        Like x.

    Raises:
        BackendError: another activation or width; conv_state is shorter than w - 1, or without
            conv_state_indices has other than b rows.
    """
    silu = _activation("causal_conv1d_update", activation)
    n_past, slots, rows = weight.shape[1] - 1, conv_state_indices, conv_state.shape[0]
    extra = conv_state.shape[2] - n_past
    if extra < 0 or (slots is None and rows != x.shape[0]):
        raise BackendError(
            f"causal_conv1d_update: conv_state is {tuple(conv_state.shape)}; beside x "
            f"{tuple(x.shape)} and {n_past + 1} taps it holds {n_past} inputs or more, and "
            f"{x.shape[0]} rows unless conv_state_indices names them. Pass one that does."
        )
    state, token = conv_state.mT, x if x.dim() == 2 else x[:, :, 0]
    with torch.no_grad():
        if cache_seqlens is None and (x.dim() == 2 or x.shape[2] == 1):
            older = read_rows(state[:, 1 : extra + 1], slots).clone() if extra else None
            recent = state[:, extra:]
            y = causal_conv1d_step(token, recent, weight, bias, activation=silu, slots=slots)
            if older is not None:
                write_rows_(state[:, :extra], older, slots)
            return y.view(x.shape)
        y = _update_rows_(
            x.view(*token.shape, -1).mT, state, weight, bias, silu, cache_seqlens, slots
        )
    return y.mT.reshape(x.shape)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """`causal_conv1d.causal_conv1d_varlen_states`: the last inputs of each packed sequence.

    Differentiable, and on any device; the host never waits.

    Args:
        x: inputs of all sequences, (t, d).
        cu_seqlens: (b + 1,) integers, their ends, from 0 to t.
        state_len: inputs of a state.

    Returns:
        (b, d, state_len), x.dtype, a transposed view of (b, state_len, d); zeros in front where a
        sequence is shorter.
    """
    places = cu_seqlens[1:, None] - torch.arange(state_len, 0, -1, device=x.device)
    is_own = places >= cu_seqlens[:-1, None]
    if len(x) == 0:
        # no row to read, though sequences without tokens have states
        x = F.pad(x, (0, 0, 0, 1))
    return x[places.clamp(min=0)].where(is_own[..., None], 0.0).mT


def _activation(where: str, activation: str | None) -> Literal["silu"] | None:
    if activation not in (None, "silu", "swish"):
        raise BackendError(
            f"{where}: activation {activation!r} is not known; it is None, 'silu' or 'swish'. "
            "Apply another to the output."
        )
    return "silu" if activation else None


def _cu_seqlens(seq_idx: Tensor) -> Tensor:
    """Ends of the runs of equal numbers in (b, l), rows one behind the other; the host waits."""
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=starts.numel()).int()


def _update_rows_(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: Literal["silu"] | None,
    cache_seqlens: Tensor | None, slots: Tensor | None,
) -> Tensor:  # fmt: skip
    """Y, (b, l, d), of x like it behind state (rows, s, d), which then ends in x."""
    (_, l, d), s = x.shape, state.shape[1]
    rows = read_rows(state, slots)
    if cache_seqlens is not None:
        steps = torch.arange(s, device=x.device)
        # where the inputs lie from the oldest on; and after l more, which of them a place holds
        oldest_first = (steps + cache_seqlens[:, None]) % s
        places = (steps - cache_seqlens[:, None] - l) % s
        rows = rows.gather(1, oldest_first[:, :, None].expand(-1, -1, d))
    past = rows[:, s - weight.shape[1] + 1 :]
    y, _ = causal_conv1d(x, weight, bias, activation=silu, initial_state=past)
    rows = torch.cat([rows, x.to(rows.dtype)], 1)[:, l:]
    if cache_seqlens is not None:
        rows = rows.gather(1, places[:, :, None].expand(-1, -1, d))
    write_rows_(state, rows, slots)
    return y if slots is None else y.masked_fill(slots[:, None, None] < 0, 0.0)
