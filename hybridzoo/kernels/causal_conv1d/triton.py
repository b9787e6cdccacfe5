"""causal_conv1d in Triton: a program walks some rows of a block of channels, each row read once."""

from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels.adjoint import recomputed_gradients
from hybridzoo.kernels.causal_conv1d import reference
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
    return _causal_conv1d(x, weight, bias, initial_state, cu_seqlens, activation == "silu")


@jit
def append(rows, row):
    """The tuple and one more."""
    # Triton compiles no star in a tuple
    return rows + (row,)  # noqa: RUF005


@jit
def _load_row(x_ptr, x_stride, state_ptr, state_stride, start, t, mask, PAST: tl.constexpr,
              HAS_STATE: tl.constexpr):  # fmt: skip
    """Input t of a sequence that began at `start`; what lies before is its state's, or zero."""
    row = tl.load(x_ptr + t.to(tl.int64) * x_stride, mask=mask & (t >= start), other=0.0)
    if HAS_STATE:
        place = (t - start + PAST).to(tl.int64)
        old = tl.load(state_ptr + place * state_stride, mask=mask & (t < start), other=0.0)
        row = tl.where(t < start, old.to(row.dtype), row)
    return row


@jit
def _load_past(x_ptr, x_stride, state_ptr, state_stride, start, t, mask, PAST: tl.constexpr,
               HAS_STATE: tl.constexpr):  # fmt: skip
    """The inputs t - PAST .. t - 1, oldest first."""
    past = ()
    for k in tl.static_range(PAST):
        row = _load_row(x_ptr, x_stride, state_ptr, state_stride, start, t - PAST + k, mask, PAST,
                        HAS_STATE)  # fmt: skip
        past = append(past, row)
    return past


@jit
def to_fp32(rows):
    """Each of a tuple."""
    wide = ()
    for k in tl.static_range(len(rows)):
        wide = append(wide, rows[k].to(tl.float32))
    return wide


@jit
def load_taps(weight_ptr, bias_ptr, channels, mask, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The W columns of weight, and bias or zero, in fp32."""
    k = tl.arange(0, 4)
    # one wide load of all columns, where four narrow ones would stride
    wide = tl.load(
        weight_ptr + channels[:, None].to(tl.int64) * W + k[None, :],
        mask=mask[:, None] & (k[None, :] < W),
        other=0.0,
    ).to(tl.float32)
    even, odd = tl.split(tl.reshape(wide, [channels.shape[0], 2, 2]))
    tap0, tap2 = tl.split(even)
    tap1, tap3 = tl.split(odd)
    bias = tl.zeros(channels.shape, tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    return (tap0, tap1, tap2, tap3), bias


@jit
def weigh(past, x, taps, bias, PAST: tl.constexpr, SILU: tl.constexpr):
    """act(bias + taps . (past, x)), in fp32; every kernel sums in this order, the step's too."""
    y = bias
    for k in tl.static_range(PAST):
        y += taps[k] * past[k]
    y += taps[PAST] * x
    if SILU:
        # y / (1 + exp(-y)) in 6 instructions: a division checks ranges and takes 8 alone
        root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * y))
        y = y * root * root
    return y


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
    past = to_fp32(_load_past(x_ptr, x_stride_l, state_ptr, state_stride_w, 0, first, mask, PAST,
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
        rows = _load_past(x_ptr, x_stride_l, state_ptr, state_stride_w, 0, length, mask, PAST,
                          HAS_STATE)  # fmt: skip
        places = final_ptr + batch * PAST * width + channels
        for k in tl.static_range(PAST):
            tl.store(places + k * width, rows[k], mask=mask)


@jit
def _edges_kernel(x_ptr, weight_ptr, bias_ptr, state_ptr, cu_seqlens_ptr, y_ptr, final_ptr,
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
    past = to_fp32(_load_past(x_ptr, x_stride_l, state_ptr, state_stride_w, start, start, mask,
                               PAST, HAS_STATE))  # fmt: skip
    for k in tl.static_range(PAST):
        here = mask & (start + k < end)
        x = _load_row(x_ptr, x_stride_l, state_ptr, state_stride_w, start, start + k, here, PAST,
                      False).to(tl.float32)  # fmt: skip
        y = weigh(past, x, taps, bias, PAST, SILU)
        places = y_ptr + (start + k).to(tl.int64) * width + channels
        tl.store(places, y.to(y_ptr.dtype.element_ty), mask=here)
        past = append(past[1:], x)
    rows = _load_past(x_ptr, x_stride_l, state_ptr, state_stride_w, start, end, mask, PAST,
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
    x, weight, bias, initial_state = map(_rows, (x, weight.flatten(), bias, initial_state))
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
            _edges_kernel[(n_blocks * final_state.shape[0],)](
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


def _rows(t: Tensor | None) -> Tensor | None:
    """The tensor itself where its last dimension is contiguous."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


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


@torch.library.custom_op("hybridzoo::causal_conv1d_triton_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    def again(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> Any:
        return reference.run(
            x, weight, bias, activation="silu" if silu else None, initial_state=state,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip

    return recomputed_gradients(again, (x, weight, bias, initial_state), (dy, dfinal_state))


@_backward.register_fake
def _(dy: Tensor, dfinal_state: Tensor, *inputs: Any) -> list[Tensor]:
    return [dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:4]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor, dfinal_state: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = _backward(dy, dfinal_state, *tensors, ctx.silu)
    present = (None if t is None else g for t, g in zip(tensors[:4], grads, strict=True))
    return *present, None, None


_causal_conv1d.register_autograd(_differentiate, setup_context=_setup_context)
