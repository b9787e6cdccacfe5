"""causal_conv1d in Triton: a program walks some rows of a block of channels, each row read once."""

from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels.causal_conv1d.taps import (
    append,
    load_past,
    load_row,
    load_taps,
    rows_of,
    to_fp32,
    weigh,
)
from hybridzoo.kernels.causal_conv1d.triton_bwd import causal_conv1d_backward
from hybridzoo.kernels.dispatch import needs_gradient
from hybridzoo.kernels.jit import available, jit, tl, triton

# rows whose loads are in flight together
UNROLL = 8
# a program walks as many rows as leave this many programs, which is a few waves of a large GPU
ROWS = (64, 32, 16, 8)
MIN_PROGRAMS = 2048
WARPS = 2

__all__ = ["available", "run", "why_not"]


def why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    **_: object,
) -> str | None:
    """Takes fp32, bf16 and fp16, up to 4 taps."""
    reason = available(x.device)
    if reason is not None:
        return reason
    for t in (x, weight, bias, initial_state):
        if t is not None and t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 and float16, not {t.dtype}"
    if weight.shape[1] > 4:
        return f"weight is {weight.shape[1]} wide, its limit is 4"
    return None


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `hybridzoo.kernels.causal_conv1d.causal_conv1d`."""
    given = (x, weight, bias, initial_state, cu_seqlens, activation == "silu")
    if needs_gradient(*given[:4]):
        return _Differentiable.apply(*given)
    return _causal_conv1d(*given)


@jit(do_not_specialize=["length", "n_chunks"])
def _conv_kernel(x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr, final_ptr, length, n_chunks,
                 width, x_stride_b, x_stride_l, state_stride_b, state_stride_w,
                 W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
                 HAS_STATE: tl.constexpr, HAS_FINAL: tl.constexpr, BLOCK: tl.constexpr,
                 ROWS: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    n_blocks = tl.cdiv(width, BLOCK)
    block = tl.program_id(0) % n_blocks
    chunk = tl.program_id(0) // n_blocks % n_chunks
    batch = (tl.program_id(0) // n_blocks // n_chunks).to(tl.int64)
    channels = block * BLOCK + tl.arange(0, BLOCK)
    mask = channels < width
    first = chunk * ROWS
    x_ptr += batch * x_stride_b + channels
    state_ptr += batch * state_stride_b + channels
    y_ptr += batch * length * width + channels
    PAST: tl.constexpr = W - 1
    taps, bias = load_taps(weight_ptr, bias_ptr, channels, mask, W, HAS_BIAS)
    past = to_fp32(load_past(x_ptr, x_stride_l, state_ptr, state_stride_w, 0, first, mask, PAST,
                               HAS_STATE))  # fmt: skip
    for walked in range(0, ROWS, UNROLL):
        t = first + walked
        raw = ()
        for u in tl.static_range(UNROLL):
            place = (t + u).to(tl.int64) * x_stride_l
            raw = append(raw, tl.load(x_ptr + place, mask=mask & (t + u < length), other=0.0))
        for u in tl.static_range(UNROLL):
            x = raw[u].to(tl.float32)
            y = weigh(past, x, taps, bias, PAST, SILU)
            place = (t + u).to(tl.int64) * width
            tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask & (t + u < length))
            past = append(past[1:], x)
    if HAS_FINAL and first + ROWS >= length:
        rows = load_past(x_ptr, x_stride_l, state_ptr, state_stride_w, 0, length, mask, PAST,
                          HAS_STATE)  # fmt: skip
        places = final_ptr + batch * PAST * width + channels
        for k in tl.static_range(PAST):
            tl.store(places + k * width, rows[k], mask=mask)


@jit
def _conv_edges_kernel(x_ptr, weight_ptr, bias_ptr, state_ptr, cu_seqlens_ptr, y_ptr, final_ptr,
                  width, x_stride_l, state_stride_b, state_stride_w,
                  W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
                  HAS_STATE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n_blocks = tl.cdiv(width, BLOCK)
    seq = (tl.program_id(0) // n_blocks).to(tl.int64)
    channels = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channels < width
    start = tl.load(cu_seqlens_ptr + seq)
    end = tl.load(cu_seqlens_ptr + seq + 1)
    x_ptr += channels
    state_ptr += seq * state_stride_b + channels
    PAST: tl.constexpr = W - 1
    taps, bias = load_taps(weight_ptr, bias_ptr, channels, mask, W, HAS_BIAS)
    past = to_fp32(load_past(x_ptr, x_stride_l, state_ptr, state_stride_w, start, start, mask,
                               PAST, HAS_STATE))  # fmt: skip
    for k in tl.static_range(PAST):
        here = mask & (start + k < end)
        x = load_row(x_ptr, x_stride_l, state_ptr, state_stride_w, start, start + k, here, PAST,
                      False).to(tl.float32)  # fmt: skip
        y = weigh(past, x, taps, bias, PAST, SILU)
        places = y_ptr + (start + k).to(tl.int64) * width + channels
        tl.store(places, y.to(y_ptr.dtype.element_ty), mask=here)
        past = append(past[1:], x)
    rows = load_past(x_ptr, x_stride_l, state_ptr, state_stride_w, start, end, mask, PAST,
                      HAS_STATE)  # fmt: skip
    places = final_ptr + seq * PAST * width + channels
    for k in tl.static_range(PAST):
        tl.store(places + k * width, rows[k], mask=mask)


@torch.library.custom_op("hybridzoo::causal_conv1d_triton", mutates_args=())
def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    y, final_state = _allocate(x, weight, bias, initial_state, cu_seqlens, silu)
    (b, length, width), w = x.shape, weight.shape[1]
    x, weight, bias, initial_state = map(rows_of, (x, weight.flatten(), bias, initial_state))
    block, rows, n_warps = _tile(b, length, width, x.element_size())
    n_blocks, n_chunks = triton.cdiv(width, block), max(1, triton.cdiv(length, rows))
    options = {
        "W": w, "SILU": silu, "HAS_BIAS": bias is not None, "BLOCK": block, "num_warps": n_warps,
    }  # fmt: skip
    has_state = initial_state is not None
    # a pointer is needed where nothing is read
    bias = weight if bias is None else bias
    state = final_state if initial_state is None else initial_state
    # a stride of one row is never used, and any value would compile a kernel of its own
    x_strides = (x.stride(0) if b > 1 else 0, x.stride(1))
    with torch.cuda.device_of(x):
        # a pack is one sequence here; what reaches across a start is written again below
        _conv_kernel[(n_blocks * n_chunks * b,)](
            x, weight, bias, state, y, final_state, length, n_chunks, width, *x_strides,
            *state.stride()[:2], HAS_STATE=has_state and cu_seqlens is None,
            HAS_FINAL=cu_seqlens is None, ROWS=rows, UNROLL=UNROLL, **options,
        )  # fmt: skip
        if cu_seqlens is not None:
            _conv_edges_kernel[(n_blocks * final_state.shape[0],)](
                x, weight, bias, state, cu_seqlens.contiguous(), y, final_state, width,
                x_strides[1], *state.stride()[:2], HAS_STATE=has_state, **options,
            )  # fmt: skip
    return y, final_state


def _tile(b: int, length: int, width: int, item: int) -> tuple[int, int, int]:
    """(channels a program, rows a program, warps): 16 bytes a lane, enough programs."""
    n_warps = WARPS if width * item > 512 else 1
    block = n_warps * 512 // item
    for rows in ROWS:
        if b * triton.cdiv(length, rows) * triton.cdiv(width, block) >= MIN_PROGRAMS:
            break
    return block, rows, n_warps


@_causal_conv1d.register_fake
def _allocate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(rows, weight.shape[1] - 1, x.shape[2])


class _Differentiable(torch.autograd.Function):
    """Joins the two ops, in a third of the host time of a formula that torch generates."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.silu = given
        ctx.save_for_backward(*tensors)
        # in training nobody uses the final state
        ctx.set_materialize_grads(False)
        return _causal_conv1d(*given)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        dy = torch.zeros_like(tensors[0]) if dy is None else dy
        grads = causal_conv1d_backward(dy, dfinal_state, *tensors, ctx.silu)
        present = (None if t is None else g for t, g in zip(tensors[:4], grads, strict=True))
        return *present, None, None
