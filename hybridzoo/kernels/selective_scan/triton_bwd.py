"""The backward of selective_scan in Triton; csrc/selective_scan/bwd.cu has its formulas at its top.

One program walks a sequence backwards for a block of channels, SUB tokens at a time: forward from
the nearest checkpoint to know the states round each of them, then back. Triton cannot index a
tensor in registers by a variable, so the walks over SUB tokens are unrolled and their states are a
tuple. A buffer for them would cost 8 bytes through the L2 cache for each token, channel and state,
which takes longer than all the arithmetic; an associative scan along time would hold time, channels
and states at once, in a layout that cannot be chosen.

No atomics: the sums over channels of dB and dC are one program's, whose blocks of channels follow
each other and add to what lies there, and torch adds those of programs.
"""

import torch
from torch import Tensor

from hybridzoo.kernels.jit import jit, tl, triton
from hybridzoo.kernels.selective_scan.fwd import Arguments
from hybridzoo.kernels.selective_scan.triton_fwd import (
    LN2,
    LOG2E,
    TILE,
    contiguous_last,
    exp_of_minus_abs,
    load_channels,
    load_steps,
    load_tile,
    lowest,
    place,
    slot_of,
    softplus,
    step_size,
    store,
    tokens,
)

# tokens of a walk: with twice as many their states do not fit in registers
SUB = 4
# of a program, one block after another: dB and dC then take as much memory in parts as checkpoints
CHANNELS = 32


def launch(
    given: Arguments[Tensor], dy: Tensor, dfinal_state: Tensor | None, checkpoints: Tensor
) -> list[Tensor]:
    """Run the kernel.

    Args:
        given: the op's arguments.
        dy: gradient of y, (b, l, i), y.dtype.
        dfinal_state: gradient of final_state, like it, fp32; None is zero.
        checkpoints: of the forward.

    Returns:
        Gradients of the first nine arguments, each like it; an absent one's is empty.
    """
    x, dt, A, B, C, D, z, dt_bias, _ = contiguous_last(*given[:9])
    if dfinal_state is None:
        rows = x.shape[0] if given.cu_seqlens is None else given.cu_seqlens.shape[0] - 1
        dfinal_state = A.new_zeros((rows, *A.shape), dtype=torch.float32)
    dy, dfinal_state = dy if dy.stride(-1) == 1 else dy.contiguous(), dfinal_state.contiguous()
    (_, l, i), (_, n), n_groups, rows = x.shape, A.shape, B.shape[2], dfinal_state.shape[0]
    n_padded, group_width = triton.next_power_of_2(n), i // n_groups
    n_parts, warps = triton.cdiv(group_width, CHANNELS), max(1, n_padded // 64)
    gate = x if z is None else z
    dx, ddt, dz = x.new_empty(x.shape), dt.new_empty(x.shape), gate.new_empty(x.shape)
    dB, dC = A.new_empty((2, n_parts, *B.shape), dtype=torch.float32)
    dA, dinitial = (A.new_empty((rows, i, n), dtype=torch.float32) for _ in range(2))
    dD, ddt_bias = A.new_empty((2, rows, i), dtype=torch.float32)
    if dfinal_state.numel():
        with torch.cuda.device_of(x):
            _scan_backward_kernel[(rows * n_groups * n_parts,)](
                x, dt, A, B, C, D, z, dt_bias, given.cu_seqlens, dy, dfinal_state, checkpoints,
                dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial,
                l, n_groups, group_width, dB.stride(0), lowest(given.dt_min, given.dt_max),
                given.dt_max, *x.stride()[:2], *dt.stride()[:2], A.stride(0), *B.stride()[:3],
                *C.stride()[:3], *gate.stride()[:2], *dy.stride()[:2],
                N=n, N_PAD=n_padded, CHANNELS=CHANNELS, BLOCK=_block(n_padded, warps), TILE=TILE,
                SUB=SUB, SOFTPLUS=given.dt_softplus, num_warps=warps,
            )  # fmt: skip
    found = (
        dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dz, ddt_bias.sum(0), dinitial,
    )  # fmt: skip
    return [
        x.new_empty(0) if t is None else d.to(t.dtype)
        for d, t in zip(found, given[:9], strict=True)
    ]


def _block(n_padded: int, warps: int) -> int:
    """Channels of a block: more than 16 states a thread spill, with narrow blocks more than 8."""
    return CHANNELS if n_padded <= 16 else 256 * warps // n_padded


@jit
def _slope(dt, bias, dt_min, dt_max, SOFTPLUS: tl.constexpr):
    """The derivative of step_size() by dt; what is at a limit passes it, as in torch.clamp."""
    v = dt.to(tl.float32) + bias
    slope = tl.full(v.shape, 1.0, tl.float32)
    if SOFTPLUS:
        e = exp_of_minus_abs(v)
        slope = tl.where(v < 0.0, e, 1.0) / (1.0 + e)
        v = softplus(v)
    return tl.where((v < dt_min) | (v > dt_max), 0.0, slope)


@jit
def _walk(
    h, A, bias, inputs, where, start, last, limits, SUB: tl.constexpr, SOFTPLUS: tl.constexpr
):
    """The states round SUB tokens from `start` on, h before the first of them.

    `inputs` are x, dt, dy, z, B and C, each a pointer to a row of the batch and the stride of its
    tokens; `where` is what of their rows is the program's.
    """
    channels, mask, states, has_state = where
    of_x, of_dt, _, _, of_B, _ = inputs
    xs = load_steps(of_x[0], of_x[1], channels, mask, start, last, SUB)
    dts = load_steps(of_dt[0], of_dt[1], channels, mask, start, last, SUB)
    Bs = load_steps(of_B[0], of_B[1], states, has_state, start, last, SUB)
    walked = (h,)
    for k in tl.static_range(SUB):
        # as in the forward, whose states these are; behind the last token they do not matter
        step = step_size(dts[k], bias, limits[0], limits[1], SOFTPLUS)
        added = step * xs[k].to(tl.float32)
        h = tl.exp2(A * step[None, :]) * h + Bs[k].to(tl.float32)[:, None] * added[None, :]
        walked = walked + (h,)  # noqa: RUF005
    return walked


@jit
def _row(of, token, columns, mask):
    """A token's row of a tensor, in its own dtype."""
    return tl.load(of[0] + token * of[1] + columns, mask, 0.0)


@jit
def _add(ptr, value, mask, is_first):
    """Store, or add to what a block of channels before this one stored."""
    before = tl.load(ptr, mask & (not is_first), 0.0)
    tl.store(ptr, before + value, mask)


@jit
def _token(
    token, before, after, carry, A, D, bias, inputs, outputs, out, map_out, where, is_first,
    limits, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One token of the walk back: `before` and `after` are its states.

    `carry` is the gradient of the state, from the tokens behind. Returns that for the token in
    front, and the token's parts of dA, dD and ddt_bias. What the walk has read is read again and
    not kept: registers are for states.
    """
    channels, mask, states, has_state = where
    of_x, of_dt, of_dy, of_z, of_B, of_C = inputs
    dx_ptr, ddt_ptr, dz_ptr, dB_ptr, dC_ptr = outputs
    x = _row(of_x, token, channels, mask).to(tl.float32)
    dt = _row(of_dt, token, channels, mask)
    B = _row(of_B, token, states, has_state).to(tl.float32)
    C = _row(of_C, token, states, has_state).to(tl.float32)
    g = _row(of_dy, token, channels, mask).to(tl.float32)
    if of_z[0] is not None:
        z = _row(of_z, token, channels, mask).to(tl.float32)
        share = 1.0 / (1.0 + tl.exp2(z * -LOG2E))
        y = tl.sum(C[:, None] * after, 0) + D * x
        store(dz_ptr + out, g * y * share * (1.0 + z * (1.0 - share)), mask)
        g *= z * share
    # dC first: with it `after` has done
    _add(dC_ptr + map_out, tl.sum(after * g[None, :], 1), has_state, is_first)
    step = step_size(dt, bias, limits[0], limits[1], SOFTPLUS)
    dh = carry + C[:, None] * g[None, :]
    _add(dB_ptr + map_out, tl.sum(dh * (step * x)[None, :], 1), has_state, is_first)
    carry = tl.exp2(A * step[None, :]) * dh
    from_decay = carry * before
    du = tl.sum(B[:, None] * dh, 0)
    dstep = x * du + LN2 * tl.sum(A * from_decay, 0)
    ddt = dstep * _slope(dt, bias, limits[0], limits[1], SOFTPLUS)
    store(dx_ptr + out, step * du + D * g, mask)
    store(ddt_ptr + out, ddt, mask)
    return carry, from_decay * step[None, :], g * x, ddt


@jit
def _walk_back(
    carry, A, D, bias, inputs, outputs, checkpoints, where, first, last, maps, width, is_first,
    limits, N: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """A sequence, for a block of channels: the gradients of its first state, A, D and dt_bias.

    `checkpoints` points at those of its first tile, and `maps` counts to its row of dB and dC.
    """
    channels, mask, states, has_state = where
    dA = tl.zeros(carry.shape, tl.float32)
    dD, dbias = tl.zeros(mask.shape, tl.float32), tl.zeros(mask.shape, tl.float32)
    n_subs = tl.cdiv(last - first, SUB)
    for behind in range(0, n_subs):
        start = first + (n_subs - 1 - behind) * SUB
        n_tiles = (start - first) // TILE
        own = has_state[:, None] & mask[None, :]
        h = tl.load(checkpoints + n_tiles * width * N, own, 0.0)
        for at in range(first + n_tiles * TILE, start, SUB):
            h = _walk(h, A, bias, inputs, where, at, last, limits, SUB, SOFTPLUS)[SUB]
        walked = _walk(h, A, bias, inputs, where, start, last, limits, SUB, SOFTPLUS)
        for k in tl.static_range(SUB - 1, -1, -1):
            # a branch, not a mask: across it the compiler does not move what would then spill
            if start + k < last:
                token = start + k
                carry, to_A, to_D, to_bias = _token(
                    token, walked[k], walked[k + 1], carry, A, D, bias, inputs, outputs,
                    token * width + channels, token * maps + states, where, is_first, limits,
                    SOFTPLUS,
                )  # fmt: skip
                dA, dD, dbias = dA + to_A, dD + to_D, dbias + to_bias
    return carry, dA, dD, dbias


@jit(do_not_specialize=["length"])
def _scan_backward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, cu_ptr, dy_ptr, dfinal_ptr,
    checkpoints_ptr, dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr,
    dinitial_ptr, length, n_groups, group_width, part_stride, dt_min, dt_max,
    x_b, x_l, dt_b, dt_l, A_i, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, dy_b, dy_l,
    N: tl.constexpr, N_PAD: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, SUB: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    sequence, group, _, _ = place(n_groups, group_width, CHANNELS)
    part, width = tl.program_id(0) % tl.cdiv(group_width, CHANNELS), n_groups * group_width
    first, last, row = tokens(cu_ptr, sequence, length)
    states, has_state = tl.arange(0, N_PAD), tl.arange(0, N_PAD) < N
    out, maps = row * length * width, part * part_stride + (row * length * n_groups + group) * N
    if z_ptr is not None:
        z_ptr, dz_ptr = z_ptr + row * z_b, dz_ptr + out
    inputs = (
        (x_ptr + row * x_b, x_l), (dt_ptr + row * dt_b, dt_l), (dy_ptr + row * dy_b, dy_l),
        (z_ptr, z_l), (B_ptr + row * B_b + group * B_g, B_l), (C_ptr + row * C_b + group * C_g, C_l)
    )  # fmt: skip
    outputs = (dx_ptr + out, ddt_ptr + out, dz_ptr, dB_ptr + maps, dC_ptr + maps)
    checkpoints_ptr += slot_of(first, sequence, row, length, TILE) * width * N
    for block in tl.range(0, CHANNELS, BLOCK):
        own = part * CHANNELS + block + tl.arange(0, BLOCK)
        channels, mask = group * group_width + own, own < group_width
        tile, where = has_state[:, None] & mask[None, :], (channels, mask, states, has_state)
        A = load_tile(A_ptr, 0, A_i, channels, states, tile) * LOG2E
        D, bias = load_channels(D_ptr, channels, mask), load_channels(bias_ptr, channels, mask)
        places = channels[None, :] * N + states[:, None]
        of_row, of_channel = sequence * width * N + places, sequence * width + channels
        carry, dA, dD, dbias = _walk_back(
            tl.load(dfinal_ptr + of_row, tile, 0.0), A, D, bias, inputs, outputs,
            checkpoints_ptr + places, where, first, last, n_groups * N, width, block == 0,
            (dt_min, dt_max), N, TILE, SUB, SOFTPLUS,
        )  # fmt: skip
        tl.store(dA_ptr + of_row, dA, tile)
        tl.store(dinitial_ptr + of_row, carry, tile)
        tl.store(dD_ptr + of_channel, dD, mask)
        tl.store(dbias_ptr + of_channel, dbias, mask)
        # the next block adds to what this one stored
        tl.debug_barrier()
