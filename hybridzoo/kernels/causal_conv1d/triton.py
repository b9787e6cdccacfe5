"""causal_conv1d in Triton: a warp walks some rows of its channels, each row read once."""

from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels.causal_conv1d.taps import (
    append,
    load_past,
    load_row,
    load_rows,
    load_taps,
    rows_of,
    split_rows,
    to_fp32,
    unpair,
    weigh,
)
from hybridzoo.kernels.causal_conv1d.triton_bwd import causal_conv1d_backward, launch_backward
from hybridzoo.kernels.dispatch import needs_gradient
from hybridzoo.kernels.jit import available, jit, tl, triton

# channels of a warp, 4 a lane, which keeps 8 fp32 values of each: 32 of the 80 registers that leave
# a multiprocessor 24 warps
BLOCK = 128
MAX_REGISTERS = 80
# rows that are on their way while as many are computed
UNROLL = 4
# pieces that an H200 holds at once, 24 a multiprocessor
PIECES = 3168
# of a piece; w - 1 rows are read twice
MIN_ROWS = 8

__all__ = ["available", "launch_backward", "launch_forward", "run", "why_not"]


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


@jit
def _walk(xs, y_ptr, row, n_rows, mask, past, taps, bias, WIDTH: tl.constexpr, W: tl.constexpr,
          SILU: tl.constexpr, ALL: tl.constexpr):  # fmt: skip
    """On by these rows, ALL of which are the piece's own or those before n_rows."""
    y_ptr += tl.cast(row, tl.int64) * WIDTH
    for u in tl.static_range(len(xs)):
        x = unpair(xs[u], y_ptr.dtype.element_ty)
        y = weigh(past, x, taps, bias, W - 1, SILU)
        here = mask if ALL else mask & (row + u < n_rows)
        place = y_ptr + tl.cast(u, tl.int64) * WIDTH
        tl.store(place, y.to(y_ptr.dtype.element_ty), mask=here)
        past = append(past[1:], x)
    return past


@jit(do_not_specialize=["length", "n_pieces", "rows"])
def _conv_kernel(x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr, final_ptr, length, n_pieces, rows,
                 x_stride_b, state_stride_b, state_stride_w, WIDTH: tl.constexpr,
                 X_STRIDE: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
                 HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FINAL: tl.constexpr,
                 BLOCK: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    n_blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0) // n_blocks
    batch = (program // n_pieces).to(tl.int64)
    first = program % n_pieces * rows
    channels = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channels < WIDTH if WIDTH % BLOCK else tl.full([BLOCK], True, tl.int1)
    x_ptr += batch * x_stride_b + channels
    state_ptr += batch * state_stride_b + channels
    y_ptr += (batch * length + first) * WIDTH + channels
    PAST: tl.constexpr = W - 1
    past = load_past(x_ptr, X_STRIDE, state_ptr, state_stride_w, 0, first, mask, PAST,
                     HAS_STATE)  # fmt: skip
    n_own = tl.minimum(length - first, rows)
    own_ptr = x_ptr + first.to(tl.int64) * X_STRIDE
    xs = load_rows(own_ptr, X_STRIDE, 0, n_own, mask, UNROLL, False)
    # behind the loads, as it waits for its own
    taps, bias = load_taps(weight_ptr, bias_ptr, channels, mask, W, HAS_BIAS)
    past = to_fp32(past)
    # steps whose next rows are all there need no masks
    n_whole = tl.maximum(n_own - UNROLL, 0) // UNROLL * UNROLL
    for row in range(0, n_whole, UNROLL):
        next_xs = load_rows(own_ptr, X_STRIDE, row + UNROLL, n_own, mask, UNROLL, True)
        past = _walk(xs, y_ptr, row, n_own, mask, past, taps, bias, WIDTH, W, SILU, True)
        xs = next_xs
    for row in range(n_whole, n_own, UNROLL):
        next_xs = load_rows(own_ptr, X_STRIDE, row + UNROLL, n_own, mask, UNROLL, False)
        past = _walk(xs, y_ptr, row, n_own, mask, past, taps, bias, WIDTH, W, SILU, False)
        xs = next_xs
    if HAS_FINAL and first + rows >= length:
        last = load_past(x_ptr, X_STRIDE, state_ptr, state_stride_w, 0, length, mask, PAST,
                         HAS_STATE)  # fmt: skip
        places = final_ptr + batch * PAST * WIDTH + channels
        for k in tl.static_range(PAST):
            tl.store(places + k * WIDTH, last[k], mask=mask)


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
    return launch_forward(x, weight, bias, initial_state, cu_seqlens, silu)


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """What the op runs."""
    y, final_state = _allocate(x, weight, bias, initial_state, cu_seqlens, silu)
    (b, length, width), w = x.shape, weight.shape[1]
    x, weight, bias, initial_state = map(rows_of, (x, weight.flatten(), bias, initial_state))
    n_blocks = triton.cdiv(width, BLOCK)
    rows = split_rows(length, b * n_blocks, PIECES, UNROLL, MIN_ROWS)
    n_pieces = max(1, triton.cdiv(length, rows))
    options = {
        "W": w, "SILU": silu, "HAS_BIAS": bias is not None, "BLOCK": BLOCK, "num_warps": 1,
    }  # fmt: skip
    has_state = initial_state is not None
    # a pointer is needed where nothing is read
    bias = weight if bias is None else bias
    state = final_state if initial_state is None else initial_state
    # a stride of one row is never used, and any value would compile a kernel of its own
    x_stride_b = x.stride(0) if b > 1 else 0
    with torch.cuda.device_of(x):
        # a pack is one sequence here; what reaches across a start is written again below. The
        # stride of rows is a constant, which is an offset in the instructions: a model has few
        _conv_kernel[(n_blocks * n_pieces * b,)](
            x, weight, bias, state, y, final_state, length, n_pieces, rows, x_stride_b,
            *state.stride()[:2], WIDTH=width, X_STRIDE=x.stride(1),
            HAS_STATE=has_state and cu_seqlens is None, HAS_FINAL=cu_seqlens is None,
            UNROLL=UNROLL, maxnreg=MAX_REGISTERS, **options,
        )  # fmt: skip
        if cu_seqlens is not None:
            _conv_edges_kernel[(n_blocks * final_state.shape[0],)](
                x, weight, bias, state, cu_seqlens.contiguous(), y, final_state, width,
                x.stride(1), *state.stride()[:2], HAS_STATE=has_state, **options,
            )  # fmt: skip
    return y, final_state


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
