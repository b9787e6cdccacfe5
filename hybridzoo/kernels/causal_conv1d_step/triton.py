"""causal_conv1d_step in Triton: a program a sequence and block of channels."""

import torch
from torch import Tensor

from hybridzoo.kernels.causal_conv1d.taps import append, load_taps, to_fp32, weigh
from hybridzoo.kernels.jit import available, jit, tl, triton

__all__ = ["available", "run", "why_not"]


def why_not(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, **_: object
) -> str | None:
    """Takes fp32, bf16 and fp16, up to 4 taps."""
    reason = available(x.device)
    if reason is not None:
        return reason
    for t in (x, conv_state, weight, bias):
        if t is not None and t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 and float16, not {t.dtype}"
    if weight.shape[1] > 4:
        return f"weight is {weight.shape[1]} wide, its limit is 4"
    return None


def run(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """See `hybridzoo.kernels.causal_conv1d_step.causal_conv1d_step`."""
    return _causal_conv1d_step(x, conv_state, weight, bias, slots, activation == "silu")


@jit
def _step_kernel(x_ptr, state_ptr, weight_ptr, bias_ptr, slots_ptr, y_ptr, width, x_stride_b,
                 x_stride_i, state_stride_b, state_stride_w, state_stride_i,
                 W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
                 HAS_SLOTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n_blocks = tl.cdiv(width, BLOCK)
    batch = (tl.program_id(0) // n_blocks).to(tl.int64)
    channels = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channels < width
    slot = batch
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + batch).to(tl.int64)
    is_used = mask & (slot >= 0)
    places = state_ptr + slot * state_stride_b + channels.to(tl.int64) * state_stride_i

    taps, bias = load_taps(weight_ptr, bias_ptr, channels, mask, W, HAS_BIAS)
    x_place = x_ptr + batch * x_stride_b + channels.to(tl.int64) * x_stride_i
    x = tl.load(x_place, mask=is_used, other=0.0)
    rows = ()
    for k in tl.static_range(W - 1):
        rows = append(rows, tl.load(places + k * state_stride_w, mask=is_used, other=0.0))
    y = weigh(to_fp32(rows), x.to(tl.float32), taps, bias, W - 1, SILU)
    y = tl.where(is_used, y, 0.0)
    tl.store(y_ptr + batch * width + channels, y.to(y_ptr.dtype.element_ty), mask=mask)
    rows = append(rows, x.to(state_ptr.dtype.element_ty))
    for k in tl.static_range(W - 1):
        tl.store(places + k * state_stride_w, rows[k + 1], mask=is_used)


@torch.library.custom_op("hybridzoo::causal_conv1d_step_triton", mutates_args=("conv_state",))
def _causal_conv1d_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    silu: bool,
) -> Tensor:
    y = x.new_empty(x.shape)
    b, width = x.shape
    # 16 bytes a lane of the one warp
    block = 512 // x.element_size()
    with torch.cuda.device_of(x):
        _step_kernel[(b * triton.cdiv(width, block),)](
            x, conv_state, weight.contiguous(),
            # a pointer is needed where nothing is read
            x if bias is None else bias.contiguous(), x if slots is None else slots.contiguous(),
            y, width, *x.stride(), *conv_state.stride(),
            W=weight.shape[1], SILU=silu, HAS_BIAS=bias is not None, HAS_SLOTS=slots is not None,
            BLOCK=block, num_warps=1,
        )  # fmt: skip
    return y


@_causal_conv1d_step.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)
