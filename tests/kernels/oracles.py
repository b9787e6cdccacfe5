"""Both scans as their papers write them: one step after another, no chunks, no tricks."""

import itertools
from math import inf

import torch
import torch.nn.functional as F


def naive_selective_scan(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, inf),
    initial_state=None, cu_seqlens=None,
):  # fmt: skip
    if cu_seqlens is not None:
        return _each(naive_selective_scan, locals())
    n_rep = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(n_rep, 2) for t in (B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (torch.log1p(torch.exp(-dt.abs())) + dt.clamp(min=0)) if dt_softplus else dt
    dt = dt.clamp(*dt_limit)
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.clone()
    y = [x[:, :0]]
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        h = torch.exp(step * A) * h + step * B[:, t] * x[:, t, :, None]
        y.append((h * C[:, t]).sum(-1)[:, None])
    y = torch.cat(y, 1)
    y = y if D is None else y + x * D
    return (y if z is None else y * F.silu(z)), h


def naive_ssd(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, inf),
    chunk_size=None, initial_state=None, cu_seqlens=None,
):  # fmt: skip
    """Mamba-2's scan is Mamba-1's with every channel of a head sharing its decay."""
    head_dim, d_state = x.shape[3], B.shape[3]

    def spread(t):
        return None if t is None else t.repeat_interleave(head_dim, -1)

    y, h = naive_selective_scan(
        x.flatten(2),
        spread(dt),
        spread(A)[:, None].expand(-1, d_state),
        B,
        C,
        D=None if D is None else D.flatten() if D.dim() == 2 else spread(D),
        z=None if z is None else z.flatten(2),
        dt_bias=spread(dt_bias),
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=None if initial_state is None else initial_state.flatten(1, 2),
        cu_seqlens=cu_seqlens,
    )
    return y.view(x.shape), h.unflatten(1, x.shape[2:])


def naive_conv(x, weight, bias=None, activation=None, initial_state=None, cu_seqlens=None):
    if cu_seqlens is not None:
        return _each(naive_conv, locals())
    d_conv = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], d_conv - 1, x.shape[2])
    seen = torch.cat([initial_state, x], 1)
    final_state = seen[:, x.shape[1] :]
    if x.shape[1] == 0:
        return x, final_state
    y = F.conv1d(seen.transpose(1, 2), weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    return (F.silu(y) if activation == "silu" else y), final_state


def _each(function, arguments):
    """`function` on each sequence of a pack alone."""
    given = {k: v for k, v in arguments.items() if k not in ("cu_seqlens", "initial_state")}
    state, ends = arguments["initial_state"], arguments["cu_seqlens"].tolist()
    along_time = {"x", "dt", "B", "C", "z"}
    y, h = [], []
    for s, (start, end) in enumerate(itertools.pairwise(ends)):
        part = {
            k: v[:, start:end] if k in along_time and v is not None else v for k, v in given.items()
        }
        part["initial_state"] = None if state is None else state[s : s + 1]
        y_part, h_part = function(**part)
        y.append(y_part)
        h.append(h_part)
    return torch.cat(y, 1), torch.cat(h)
