"""selective_scan_step in Triton: each state is read and written once, 16 bytes at a time.

A program takes a block of channels through several sequences, so that what belongs to the channels
alone (A, D, dt_bias) is read once for all of them.
"""

from math import inf

import torch
from torch import Tensor

from hybridzoo.kernels.jit import available, jit, tl, triton
from hybridzoo.kernels.selective_scan.triton import DTYPES, MAX_STATES
from hybridzoo.kernels.selective_scan.triton_fwd import (
    LOG2E,
    contiguous_last,
    load_channels,
    lowest,
    place,
    silu,
    step_size,
)

__all__ = ["available", "run", "why_not"]

# states of a program at a time, of 128 threads: two 16-byte accesses a thread
TILE = 1024
# below so many blocks of channels and sequences, each has its own program
MIN_PROGRAMS = 4096
MAX_SEQUENCES = 4


def why_not(
    x: Tensor,
    ssm_state: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    z: Tensor | None = None,
    **_: object,
) -> str | None:
    """Needs CUDA 8.0, fp32 or half tensors and at most MAX_STATES states."""
    reason = available(x.device)
    if reason is not None:
        return reason
    given = {"x": x, "ssm_state": ssm_state, "dt": dt, "A": A, "B": B, "C": C, "z": z}
    for name, tensor in given.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, not fp32, bf16 or fp16"
    if A.shape[1] > MAX_STATES:
        return f"d_state ({A.shape[1]}) exceeds its limit ({MAX_STATES})"
    if ssm_state.stride(2) != 1:
        return "ssm_state is not contiguous along its last dimension"
    return None


def run(
    x: Tensor,
    ssm_state: Tensor,
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
    slots: Tensor | None = None,
    A_is_log: bool = False,
) -> Tensor:
    """See `hybridzoo.kernels.selective_scan_step.selective_scan_step`."""
    low, high = map(float, dt_limit)
    return selective_scan_step_triton(
        x, ssm_state, dt, A, B, C, D, z, dt_bias, slots, dt_softplus, low, high, A_is_log
    )


@torch.library.custom_op("hybridzoo::selective_scan_step_triton", mutates_args=("ssm_state",))
def selective_scan_step_triton(
    x: Tensor,
    ssm_state: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    slots: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    A_is_log: bool,
) -> Tensor:
    """The launch: y."""
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    x, dt, A, B, C, D, z, dt_bias = contiguous_last(x, dt, A, B, C, D, z, dt_bias)
    gate = x if z is None else z
    n_groups, n_padded = B.shape[1], triton.next_power_of_2(A.shape[1])
    group_width, block = x.shape[1] // n_groups, max(1, TILE // n_padded)
    n_blocks = n_groups * triton.cdiv(group_width, block)
    per_program = min(MAX_SEQUENCES, max(1, x.shape[0] * n_blocks // MIN_PROGRAMS))
    with torch.cuda.device_of(x):
        _scan_step_kernel[(n_blocks * triton.cdiv(x.shape[0], per_program),)](
            x, ssm_state, dt, A, B, C, D, z, dt_bias, slots, y,
            x.shape[0], per_program, n_groups, group_width, lowest(dt_min, dt_max), dt_max,
            x.stride(0), *ssm_state.stride()[:2], dt.stride(0), A.stride(0), *B.stride()[:2],
            *C.stride()[:2], gate.stride(0), 1 if slots is None else slots.stride(0),
            N=A.shape[1], N_PAD=n_padded, BLOCK=block, SOFTPLUS=dt_softplus, A_IS_LOG=A_is_log,
            num_warps=4,
        )  # fmt: skip
    return y


@selective_scan_step_triton.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@jit(do_not_specialize=["n_seqs", "per_program"])
def _scan_step_kernel(
    x_ptr, state_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, slots_ptr, y_ptr,
    n_seqs, per_program, n_groups, group_width, dt_min, dt_max,
    x_b, state_b, state_i, dt_b, A_i, B_b, B_g, C_b, C_g, z_b, slots_b,
    N: tl.constexpr, N_PAD: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr,
    A_IS_LOG: tl.constexpr,
):  # fmt: skip
    chunk, group, channels, mask = place(n_groups, group_width, BLOCK)
    states = tl.arange(0, N_PAD)
    has_state = states < N
    tile = mask[:, None] & has_state[None, :]
    A = tl.load(A_ptr + channels[:, None] * A_i + states[None, :], tile, 0.0).to(tl.float32)
    if A_IS_LOG:
        A = -tl.exp2(A * LOG2E)
    A *= LOG2E
    D, bias = load_channels(D_ptr, channels, mask), load_channels(bias_ptr, channels, mask)
    first = chunk * per_program
    for b in range(first, min(first + per_program, n_seqs)):
        slot, is_real = b, True
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + b * slots_b).to(tl.int64)
            is_real = slot >= 0
        places = state_ptr + slot * state_b + channels[:, None] * state_i + states[None, :]
        h = tl.load(places, tile & is_real, 0.0).to(tl.float32)
        x = tl.load(x_ptr + b * x_b + channels, mask, 0.0).to(tl.float32)
        dt = tl.load(dt_ptr + b * dt_b + channels, mask, 0.0)
        dt = step_size(dt, bias, dt_min, dt_max, SOFTPLUS)
        B = tl.load(B_ptr + b * B_b + group * B_g + states, has_state, 0.0).to(tl.float32)
        C = tl.load(C_ptr + b * C_b + group * C_g + states, has_state, 0.0).to(tl.float32)
        h = tl.exp2(A * dt[:, None]) * h + (dt * x)[:, None] * B[None, :]
        y = tl.sum(h * C[None, :], 1) + D * x
        if z_ptr is not None:
            y *= silu(tl.load(z_ptr + b * z_b + channels, mask, 0.0))
        tl.store(places, h.to(state_ptr.dtype.element_ty), tile & is_real)
        y = tl.where(is_real, y, 0.0).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + b * n_groups * group_width + channels, y, mask)
