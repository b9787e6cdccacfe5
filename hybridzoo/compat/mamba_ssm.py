"""mamba-ssm's and causal-conv1d's functions over hybridzoo's kernels: a user changes one import.

Names, order of arguments, shapes and what is written in place are theirs; letters are b batch,
d channels, l length, n states, g groups, w taps. Their layout is (b, d, l) and ours (b, l, d): each
function transposes views and copies nothing, nor do the kernels copy tensors whose channels are
neighbours in memory: a (b, l, d) tensor handed over as its transposed view, which causal-conv1d
calls channel-last. Of a tensor that is contiguous along l they make one transposed copy, and what
is returned is a transposed view of a (b, l, d) tensor.

Unlike theirs it runs on any device, gives the same bits every time and differentiates what it
returns, the last state and norms of mamba_inner_fn included; widths need not be multiples of 8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.compat.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from hybridzoo.errors import BackendError
from hybridzoo.kernels.causal_conv1d import causal_conv1d
from hybridzoo.kernels.rms_norm import rms_norm
from hybridzoo.kernels.selective_scan import selective_scan
from hybridzoo.kernels.selective_scan_step import selective_scan_step

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "mamba_inner_fn",
    "selective_scan_fn",
    "selective_state_update",
]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mamba_ssm.ops.selective_scan_interface.selective_scan_fn`, by `kernels.selective_scan`.

    The last state has a gradient, which theirs ignores. B, or C, of (d, n) is read as one group a
    channel: right but slow, and the backward holds its gradient at every token. So is a B whose
    groups are not as many as C's.

    Args:
        u: inputs, (b, d, l), fp32 / bf16 / fp16 / float64.
        delta: raw step sizes, (b, d, l).
        A: decays, (d, n), fp32, < 0; real.
        B: input map, constant (d, n), or variable (b, n, l) or (b, g, n, l), g a divisor of d.
        C: output map, likewise.
        D: skip weight, (d,).
        z: gate, (b, d, l); the output is multiplied by silu(z).
        delta_bias: (d,), added to delta.
        delta_softplus: whether delta then passes through softplus.
        return_last_state: return the state after the last token as well.

    Returns:
        out, (b, d, l), u.dtype; or (out, last_state), last_state (b, d, n) fp32.

    Raises:
        BackendError: A, B or C is complex, or B or C has another shape.
    """
    _refuse_complex("selective_scan_fn", A=A, B=B, C=C)
    B, C = _maps("selective_scan_fn", u.mT.shape, A, B, C)
    out, last_state = selective_scan(
        u.mT, delta.mT, A, B, C, D=D, z=None if z is None else z.mT, dt_bias=delta_bias,
        dt_softplus=delta_softplus,
    )  # fmt: skip
    return (out.mT, last_state) if return_last_state else out.mT


def mamba_inner_fn(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
    delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
    B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
    delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None, delta_softplus: bool = True, checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None, c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None, b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """`mamba_ssm.ops.selective_scan_interface.mamba_inner_fn`: Mamba's mixer behind its in_proj.

    The norms are differentiated, their weights too; theirs norms B and C twice in the backward and
    never differentiates it.

    Args:
        xz: x above z, (b, 2 d, l).
        conv1d_weight: (d, 1, w), w from 2 to 8.
        conv1d_bias: (d,); the convolution's silu follows it.
        x_proj_weight: the rows delta | B | C, without those of a B or C that is given,
            (r + 2 n, d).
        delta_proj_weight: (d, r).
        out_proj_weight: (d_model, d).
        out_proj_bias: (d_model,).
        A: as in `selective_scan_fn`, like B, C, D, delta_bias and delta_softplus.
        B: None where x_proj makes it.
        C: likewise.
        D: skip weight, (d,).
        delta_bias: (d,).
        B_proj_bias: (n,), added to the B of x_proj.
        C_proj_bias: likewise.
        delta_softplus: whether delta passes through softplus.
        checkpoint_lvl: 0 or 1, without effect: autograd keeps the convolution's output and delta,
            as theirs does at 0. What theirs computes again at 1, torch.utils.checkpoint around this
            function does, and the scan's forward with it.
        b_rms_weight: (n,), of an RMSNorm of the B of x_proj, behind its bias.
        c_rms_weight: likewise.
        dt_rms_weight: (d,), of an RMSNorm of delta behind delta_proj, over all channels. Jamba and
            FalconMamba norm the r values before it: `hybridzoo.layers.mamba1` has that.
        b_c_dt_rms_eps: eps of the norms.

    Returns:
        (b, l, d_model).

    Raises:
        BackendError: as `selective_scan_fn`; checkpoint_lvl is another; or a norm or bias is for a
            B or C that is given.
    """
    _refuse_complex("mamba_inner_fn", A=A, B=B, C=C)
    if checkpoint_lvl not in (0, 1):
        raise BackendError(
            f"mamba_inner_fn: checkpoint_lvl ({checkpoint_lvl}) is neither 0 nor 1. Leave it out."
        )
    n, rank, eps = A.shape[1], delta_proj_weight.shape[1], b_c_dt_rms_eps
    x, z = xz.mT.chunk(2, -1)  # (b, l, d)
    x, _ = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    projected = F.linear(x, x_proj_weight)
    delta = _norm(F.linear(projected[..., :rank], delta_proj_weight), dt_rms_weight, eps)
    B = _selected("B", B, projected[..., rank : rank + n], B_proj_bias, b_rms_weight, eps)
    C = _selected("C", C, projected[..., -n:], C_proj_bias, c_rms_weight, eps)
    B, C = _maps("mamba_inner_fn", x.shape, A, B, C)
    y, _ = selective_scan(
        x, delta, A, B, C, D=D, z=z, dt_bias=delta_bias, dt_softplus=delta_softplus
    )
    return F.linear(y, out_proj_weight, out_proj_bias)


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
    dt_softplus: bool = False, state_batch_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`mamba_ssm.ops.triton.selective_state_update.selective_state_update`, one token, in place.

    By `kernels.selective_scan_step`. It works without D and dt_bias, where theirs fails, and its
    softplus is exact for small steps, where theirs is 6 % off at -16 and zero below. Like theirs it
    gives no gradients, under torch.no_grad() or not.

    With heads the channels are those of all heads, h p of them. What heads tie by expanding, A, dt,
    D and dt_bias, is then copied whole: A costs about as much as one sequence's fp32 state.

    Args:
        state: MUTATED: (b, d, n) or with heads (b, h, p, n), of any floating dtype, computed in
            fp32; any number of rows with state_batch_indices. n is contiguous, else plain torch
            runs.
        x: inputs, (b, d) or (b, h, p).
        dt: raw step sizes, like x.
        A: decays, (d, n) or (h, p, n), fp32, < 0.
        B: input map, (b, n) or (b, g, n); g divides d, or h.
        C: output map, like B.
        D: skip weight, (d,) or (h, p).
        z: gate, like x; the output is multiplied by silu(z).
        dt_bias: like D.
        dt_softplus: whether dt passes through softplus.
        state_batch_indices: (b,) integers, each sequence's row of state, none twice; a negative one
            leaves every state as it is and its output is zero.

    Returns:
        Like x.

    Raises:
        BackendError: A, B, C or state is complex; the heads of state do not follow each other in
            memory; or without state_batch_indices it has other than b rows.
    """
    _refuse_complex("selective_state_update", state=state, A=A, B=B, C=C)
    shape, pool = x.shape, state
    if state.dim() == 4:
        pool, x, dt, A = _all_channels(state), x.flatten(1), dt.flatten(1), A.flatten(0, 1)
        z, D, dt_bias = (None if t is None else t.flatten(-2) for t in (z, D, dt_bias))
    B, C = (t[:, None] if t.dim() == 2 else t for t in (B, C))
    with torch.no_grad():
        y = selective_scan_step(
            x, pool, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
            slots=state_batch_indices,
        )  # fmt: skip
    return y.view(shape)


def _refuse_complex(where: str, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.is_complex():
            raise BackendError(
                f"{where}: {name} is {t.dtype}; the scans of hybridzoo are real. Pass a real "
                f"{name}, or keep mamba-ssm's function for a complex system."
            )


def _maps(where: str, shape: torch.Size, A: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
    """B and C beside x of this shape (b, l, d) as (b, l, g, n), of as many groups."""
    (b, l, d), n = shape, A.shape[1]
    maps = []
    for name, t in (("B", B), ("C", C)):
        wide = t[:, None] if t.dim() == 3 else t
        is_variable = wide.dim() == 4 and (wide.shape[0], *wide.shape[2:]) == (b, n, l)
        if t.shape == A.shape:
            maps.append(t.expand(b, l, d, n))
        elif is_variable and wide.shape[1] > 0 and d % wide.shape[1] == 0:
            maps.append(wide.permute(0, 3, 1, 2))
        else:
            raise BackendError(
                f"{where}: {name} is {tuple(t.shape)}; for {b} sequences of {l} tokens, {d} "
                f"channels and {n} states it is {(d, n)}, {(b, n, l)} or ({b}, g, {n}, {l}), g a "
                f"divisor of {d}. Transpose or cut it."
            )
    if maps[0].shape == maps[1].shape:
        return maps
    # a group a channel; a view where there is one group, or as many as channels
    return [t[:, :, :, None].expand(b, l, -1, d // t.shape[2], n).flatten(2, 3) for t in maps]


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else rms_norm(x, weight, eps=eps, weight_fp32=True)[0]


def _selected(
    name: str, given: Tensor | None, projected: Tensor, bias: Tensor | None, weight: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """B or C: what is given; or x_proj's part (b, l, n) behind its bias and norm, as (b, n, l)."""
    if given is None:
        projected = projected if bias is None else projected + bias.to(projected.dtype)
        return _norm(projected, weight, eps).mT
    if bias is not None or weight is not None:
        raise BackendError(
            f"mamba_inner_fn: {name} is given beside a bias or norm of x_proj's {name}; that would "
            f"have no effect. Drop {name}, or the other."
        )
    return given


def _all_channels(state: Tensor) -> Tensor:
    """A state (rows, h, p, n) as a view (rows, h p, n)."""
    _, heads, width, _ = state.shape
    if heads > 1 and width > 1 and state.stride(1) != width * state.stride(2):
        raise BackendError(
            f"selective_state_update: state has strides {state.stride()}; its heads follow each "
            "other in memory, or it cannot be written in place. Pass a contiguous one."
        )
    return state.view(state.shape[0], heads * width, -1)
