"""What the kernels of the convolution share, its step's too: rows, their past, taps, the sum.

A row is a vector of channels, and t a scalar; or rows are side by side, (T, channels), and t is
(T, 1) with pointers and masks of channels (1, channels).
"""

from torch import Tensor

from hybridzoo.kernels.jit import jit, tl


def rows_of(t: Tensor | None) -> Tensor | None:
    """The tensor itself where its last dimension is contiguous."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


@jit
def append(rows, row):
    """The tuple and one more."""
    # Triton compiles no star in a tuple
    return rows + (row,)  # noqa: RUF005


@jit
def load_row(x_ptr, x_stride, state_ptr, state_stride, start, t, mask, PAST: tl.constexpr,
              HAS_STATE: tl.constexpr):  # fmt: skip
    """Input t of a sequence that began at `start`; what lies before is its state's, or zero."""
    row = tl.load(x_ptr + t.to(tl.int64) * x_stride, mask=mask & (t >= start), other=0.0)
    if HAS_STATE:
        place = (t - start + PAST).to(tl.int64)
        old = tl.load(state_ptr + place * state_stride, mask=mask & (t < start), other=0.0)
        row = tl.where(t < start, old.to(row.dtype), row)
    return row


@jit
def load_past(x_ptr, x_stride, state_ptr, state_stride, start, t, mask, PAST: tl.constexpr,
               HAS_STATE: tl.constexpr):  # fmt: skip
    """The inputs t - PAST .. t - 1, oldest first."""
    past = ()
    for k in tl.static_range(PAST):
        row = load_row(x_ptr, x_stride, state_ptr, state_stride, start, t - PAST + k, mask, PAST,
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
