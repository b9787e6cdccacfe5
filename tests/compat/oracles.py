"""What mamba-ssm and causal-conv1d publish, as formulas in their layouts, token by token."""

import torch
import torch.nn.functional as F


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
    return_last_state=False,
):  # fmt: skip
    (b, d, length), n = u.shape, A.shape[1]

    def every(t):
        """The map of each channel and token, (b, d, n, l)."""
        if t.dim() == 2:
            return t[None, :, :, None].expand(b, d, n, length)
        t = t if t.dim() == 4 else t[:, None]
        return torch.cat([t[:, g : g + 1].expand(b, d // t.shape[1], n, length)
                          for g in range(t.shape[1])], 1)  # fmt: skip

    B, C = every(B), every(C)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = torch.logaddexp(delta, torch.zeros_like(delta))
    h, out = u.new_zeros(b, d, n), []
    for t in range(length):
        step = delta[:, :, t, None]
        h = (step * A).exp() * h + step * u[:, :, t, None] * B[..., t]
        out.append((C[..., t] * h).sum(2))
    out = torch.stack(out, 2)
    if D is not None:
        out = out + D[:, None] * u
    if z is not None:
        out = out * z * torch.sigmoid(z)
    return (out, h) if return_last_state else out


def conv(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
    final_states_out=None, activation=None,
):  # fmt: skip
    """Every tap of every token by itself."""
    w, length = weight.shape[1], x.shape[2]
    if initial_states is None:
        initial_states = x.new_zeros(*x.shape[:2], w - 1)
    seen = torch.cat([initial_states, x], 2)
    out = []
    for t in range(length):
        y = 0 if bias is None else bias
        for k in range(w):
            tap = weight[:, k] * seen[:, :, t + k]
            if seq_idx is not None:
                source = t + k - (w - 1)
                same = seq_idx[:, max(source, 0)] == seq_idx[:, t]
                tap = tap * (same & (source >= 0))[:, None]
            y = y + tap
        y = y if activation is None else y * torch.sigmoid(y)
        out.append(y if seq_idx is None else y * (seq_idx[:, t] >= 0)[:, None])
    out = torch.stack(out, 2) if out else x
    return (out, seen[:, :, length:]) if return_final_states else out


def conv_update(x, conv_state, weight, bias, activation, cache_seqlens, indices):
    """The output and the states after it, one sequence and token after another."""
    state, out = conv_state.clone(), torch.zeros_like(x)
    s, w = state.shape[2], weight.shape[1]
    for b in range(len(x)):
        row = b if indices is None else int(indices[b])
        if row < 0:
            continue
        for t in range(x.shape[2]):
            if cache_seqlens is None:
                past, place = state[row, :, s - w + 1 :], s - 1
            else:
                place = (int(cache_seqlens[b]) + t) % s
                past = state[row][:, [(place - k) % s for k in range(w - 1, 0, -1)]]
            y = (weight * torch.cat([past, x[b, :, t, None]], 1)).sum(1)
            y = y if bias is None else y + bias
            out[b, :, t] = y if activation is None else y * torch.sigmoid(y)
            if cache_seqlens is None:
                state[row] = state[row].roll(-1, 1)
            state[row, :, place] = x[b, :, t]
    return out, state


def state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, indices):
    """Of states with heads (rows, h, p, n); the output and the states after it."""
    state, out = state.clone(), torch.zeros_like(x)
    heads = x.shape[1]
    for b in range(len(x)):
        row = b if indices is None else int(indices[b])
        if row < 0:
            continue
        for h in range(heads):
            g = h // (heads // B.shape[1])
            step = dt[b, h] if dt_bias is None else dt[b, h] + dt_bias[h]
            step = torch.logaddexp(step, torch.zeros_like(step)) if dt_softplus else step
            decay = (step[:, None] * A[h]).exp()
            state[row, h] = decay * state[row, h] + torch.outer(step * x[b, h], B[b, g])
            y = state[row, h] @ C[b, g]
            y = y if D is None else y + D[h] * x[b, h]
            out[b, h] = y if z is None else y * z[b, h] * torch.sigmoid(z[b, h])
    return out, state


def mamba_inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
    out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None,
    delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None,
    dt_rms_weight=None, b_c_dt_rms_eps=1e-6, stored=None,
):  # fmt: skip
    """Stored: what tensors between its steps are rounded to."""
    n, r = A.shape[1], delta_proj_weight.shape[1]

    def keep(t):
        return t if stored is None else t.to(stored).to(t.dtype)

    def norm(t, weight, dim):
        if weight is None:
            return t
        shape = [-1 if k == dim else 1 for k in range(3)]
        mean = (t * t).mean(dim, keepdim=True)
        return keep(t / (mean + b_c_dt_rms_eps).sqrt() * weight.view(shape))

    def biased(t, bias):
        return t if bias is None else keep(t + bias[:, None])

    x, z = xz.split(xz.shape[1] // 2, 1)
    x = keep(conv(x, conv1d_weight[:, 0], conv1d_bias, activation="silu"))
    projected = keep(torch.einsum("kd,bdl->bkl", x_proj_weight, x))
    delta = keep(torch.einsum("dr,brl->bdl", delta_proj_weight, projected[:, :r]))
    delta = norm(delta, dt_rms_weight, 1)
    if B is None:
        B = norm(biased(projected[:, r : r + n], B_proj_bias), b_rms_weight, 1)
    if C is None:
        C = norm(biased(projected[:, -n:], C_proj_bias), c_rms_weight, 1)
    y = keep(selective_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus))
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)
