"""The forward of selective_scan in Triton: a program walks a sequence for a block of channels.

The states of the block stay in registers, states down and channels across, so that the sum over
states never leaves a thread. Steps are loaded several at a time.
"""

from math import inf

import torch
from torch import Tensor

from hybridzoo.kernels.jit import jit, tl, triton
from hybridzoo.kernels.selective_scan.fwd import Arguments

# tokens between two checkpoints of a sequence
TILE = 16
LOG2E = tl.constexpr(1.4426950408889634)
# what fp32 drops of log2(e)
LOG2E_REST = tl.constexpr(1.9259629911266175e-08)
LN2 = tl.constexpr(0.6931471805599453)


def launch(
    given: Arguments[Tensor], has_checkpoints: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel.

    Args:
        given: the op's arguments.
        has_checkpoints: also give the state before every TILE tokens of each sequence.

    Returns:
        y; final_state; checkpoints, (slots, i, n) fp32, of no slots unless asked for.
    """
    y, final_state, checkpoints = outputs(given.x, given.A, given.cu_seqlens, has_checkpoints)
    if final_state.numel() == 0:
        return y, final_state, checkpoints
    x, dt, A, B, C, D, z, dt_bias, initial_state = contiguous_last(*given[:9])
    gate = x if z is None else z
    start = final_state if initial_state is None else initial_state
    n_groups, n_padded = B.shape[2], triton.next_power_of_2(A.shape[1])
    group_width = x.shape[2] // n_groups
    block = _block(final_state.shape[0] * x.shape[2], n_padded)
    n_programs = final_state.shape[0] * n_groups * triton.cdiv(group_width, block)
    with torch.cuda.device_of(x):
        _scan_kernel[(n_programs,)](
            x, dt, A, B, C, D, z, dt_bias, initial_state, given.cu_seqlens, y, final_state,
            checkpoints if has_checkpoints else None,
            x.shape[1], n_groups, group_width, lowest(given.dt_min, given.dt_max), given.dt_max,
            *x.stride()[:2], *dt.stride()[:2], A.stride(0), *B.stride()[:3], *C.stride()[:3],
            *gate.stride()[:2], *start.stride()[:2],
            N=A.shape[1], N_PAD=n_padded, BLOCK=block, STEPS=4 if n_padded <= 16 else 2,
            TILE=TILE, SOFTPLUS=given.dt_softplus, num_warps=1,
        )  # fmt: skip
    return y, final_state, checkpoints


def outputs(
    x: Tensor, A: Tensor, cu_seqlens: Tensor | None, has_checkpoints: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `launch` fills."""
    b, l, _ = x.shape
    rows = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = b * (l // TILE) + rows if has_checkpoints else 0
    made = (x.new_empty((n, *A.shape), dtype=torch.float32) for n in (rows, slots))
    return x.new_empty(x.shape), *made


def contiguous_last(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as they are, but copies of those whose last dimension is not contiguous."""
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors]


def lowest(dt_min: float, dt_max: float) -> float:
    """The lower bound: as in dt.py, the default is none, also for steps without a softplus."""
    return -inf if (dt_min, dt_max) == (0.0, inf) else dt_min


def _block(n_channels: int, n_padded: int) -> int:
    """Channels of a program: fewer where there are few in all, for more programs."""
    wanted = 32 if n_channels >= 2**15 else 16 if n_channels >= 2**14 else 8
    # else the states of one warp spill
    return wanted if n_padded <= 64 else min(wanted, 1024 // n_padded)


@jit
def exp_of_minus_abs(v):
    """e^-|v|, to some units in the last place."""
    # below -104 it is zero in fp32
    low = tl.maximum(-tl.abs(v), -104.0, propagate_nan=tl.PropagateNan.ALL)
    power = low * LOG2E
    rest = tl.fma(low, LOG2E, -power) + low * LOG2E_REST
    e = tl.exp2(power)
    return tl.fma(e, rest * LN2, e)


@jit
def softplus(v):
    """log(1 + e^v) to some units in the last place, however small: log(1 + e) is not.

    With s = e / (2 + e), log(1 + e) = 2 atanh(s), whose series ends early as s <= 1/3.
    """
    e = exp_of_minus_abs(v)
    s = e / (2.0 + e)
    s2 = s * s
    series = 1 / 13 + s2 * (1 / 15)
    series = 1 / 9 + s2 * (1 / 11 + s2 * series)
    series = 1 / 5 + s2 * (1 / 7 + s2 * series)
    series = 1.0 + s2 * (1 / 3 + s2 * series)
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL) + 2.0 * s * series


@jit
def step_size(dt, bias, dt_min, dt_max, SOFTPLUS: tl.constexpr):
    """What hybridzoo/kernels/dt.py computes, in fp32."""
    dt = dt.to(tl.float32) + bias
    if SOFTPLUS:
        dt = softplus(dt)
    dt = tl.maximum(dt, dt_min, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(dt, dt_max, propagate_nan=tl.PropagateNan.ALL)


@jit
def silu(z):
    """Z / (1 + e^-z), in fp32."""
    z = z.to(tl.float32)
    return z / (1.0 + tl.exp2(z * -LOG2E))


@jit
def load_channels(ptr, channels, mask):
    """A vector of weights a channel in fp32; zeros where there is none."""
    # no early return: Triton would compile what follows it as well
    if ptr is None:
        loaded = tl.zeros(channels.shape, tl.float32)
    else:
        loaded = tl.load(ptr + channels, mask, 0.0).to(tl.float32)
    return loaded


@jit
def place(n_groups, group_width, BLOCK: tl.constexpr):
    """A program's row and group, 64 bits as tokens times a stride pass 2^31, and its channels."""
    n_blocks = tl.cdiv(group_width, BLOCK)
    program = tl.program_id(0)
    row = (program // n_blocks // n_groups).to(tl.int64)
    group = (program // n_blocks % n_groups).to(tl.int64)
    own = program % n_blocks * BLOCK + tl.arange(0, BLOCK)
    return row, group, group * group_width + own, own < group_width


@jit
def tokens(cu_ptr, sequence, length):
    """First token, the one behind the last, and the batch row of a sequence."""
    if cu_ptr is None:
        first, last, row = sequence * 0, sequence * 0 + length, sequence
    else:
        first = tl.load(cu_ptr + sequence).to(tl.int64)
        last = tl.load(cu_ptr + sequence + 1).to(tl.int64)
        row = sequence * 0
    return first, last, row


@jit
def slot_of(first, sequence, row, length, TILE: tl.constexpr):
    """Where a sequence's checkpoints begin, one a tile: no two sequences of a pack share a slot."""
    return row * (length // TILE) + first // TILE + sequence


@jit
def load_tile(ptr, offset, stride, channels, states, tile):
    """States down, channels across, in fp32; zeros where there are none."""
    if ptr is None:
        loaded = tl.zeros(tile.shape, tl.float32)
    else:
        places = ptr + offset + channels[None, :] * stride + states[:, None]
        loaded = tl.load(places, tile, 0.0).to(tl.float32)
    return loaded


@jit
def load_steps(ptr, stride, columns, mask, start, last, STEPS: tl.constexpr):
    """Rows start to start + STEPS - 1 of (l, columns), zeros from `last` on."""
    rows = ()
    for k in tl.static_range(STEPS):
        row = ptr + (start + k) * stride
        # Triton compiles no star in a tuple
        rows = rows + (tl.load(row + columns, mask & (start + k < last), 0.0),)  # noqa: RUF005
    return rows


@jit
def store(ptr, value, mask):
    """In the dtype of what is there."""
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask)


@jit
def _tile_at(ptr, slot, width, channels, states, N: tl.constexpr):
    """Pointers into (slots, i, n)."""
    return ptr + (slot * width + channels[None, :]) * N + states[:, None]


@jit(do_not_specialize=["length"])
def _scan_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, cu_ptr, y_ptr,
    final_ptr, checkpoints_ptr, length, n_groups, group_width, dt_min, dt_max,
    x_b, x_l, dt_b, dt_l, A_i, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, initial_b, initial_i,
    N: tl.constexpr, N_PAD: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    TILE: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    sequence, group, channels, mask = place(n_groups, group_width, BLOCK)
    first, last, row = tokens(cu_ptr, sequence, length)
    states, width = tl.arange(0, N_PAD), n_groups * group_width
    has_state = states < N
    tile = has_state[:, None] & mask[None, :]
    A = load_tile(A_ptr, 0, A_i, channels, states, tile) * LOG2E
    h = load_tile(initial_ptr, sequence * initial_b, initial_i, channels, states, tile)
    D, bias = load_channels(D_ptr, channels, mask), load_channels(bias_ptr, channels, mask)
    x_ptr, dt_ptr, y_ptr = x_ptr + row * x_b, dt_ptr + row * dt_b, y_ptr + row * length * width
    B_ptr, C_ptr = B_ptr + row * B_b + group * B_g, C_ptr + row * C_b + group * C_g
    for start in range(first, last, STEPS):
        if checkpoints_ptr is not None:  # noqa: SIM102 (Triton would compile behind an `and`)
            if (start - first) % TILE == 0:
                slot = slot_of(first, sequence, row, length, TILE) + (start - first) // TILE
                tl.store(_tile_at(checkpoints_ptr, slot, width, channels, states, N), h, tile)
        # loads first, stores last: STEPS steps are on their way at once
        xs = load_steps(x_ptr, x_l, channels, mask, start, last, STEPS)
        dts = load_steps(dt_ptr, dt_l, channels, mask, start, last, STEPS)
        Bs = load_steps(B_ptr, B_l, states, has_state, start, last, STEPS)
        Cs = load_steps(C_ptr, C_l, states, has_state, start, last, STEPS)
        if z_ptr is not None:
            zs = load_steps(z_ptr + row * z_b, z_l, channels, mask, start, last, STEPS)
        for k in tl.static_range(STEPS):
            x = xs[k].to(tl.float32)
            dt = step_size(dts[k], bias, dt_min, dt_max, SOFTPLUS)
            # a step of zero leaves the state as it is
            dt = tl.where(start + k < last, dt, 0.0)
            h = tl.exp2(A * dt[None, :]) * h + Bs[k].to(tl.float32)[:, None] * (dt * x)[None, :]
            y = tl.sum(h * Cs[k].to(tl.float32)[:, None], 0) + D * x
            if z_ptr is not None:
                y *= silu(zs[k])
            store(y_ptr + (start + k) * width + channels, y, mask & (start + k < last))
    tl.store(_tile_at(final_ptr, sequence, width, channels, states, N), h, tile)
