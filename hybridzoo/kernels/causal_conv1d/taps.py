"""What the kernels of the convolution share, its step's too: rows, their past, taps, the sum.

A row is a vector of channels, and t a scalar.
"""

from torch import Tensor

from hybridzoo.kernels.jit import jit, tl, triton

# what a piece costs besides its rows, in rows: the wait for its first loads, and its end. A guess
IDLE_ROWS = 12


def split_rows(length: int, n_columns: int, at_once: int, multiple: int, least: int) -> int:
    """Rows of a piece of each column: as many pieces as fill one to four waves of `at_once`.

    Pieces are equal and end together, so that a part of a wave costs as much as a whole one.
    """
    costs = []
    for n_waves in range(1, 5):
        n_pieces = max(1, n_waves * at_once // max(1, n_columns))
        rows = max(least, triton.cdiv(triton.cdiv(length, n_pieces), multiple) * multiple)
        n_needed = triton.cdiv(triton.cdiv(length, rows) * n_columns, at_once)
        costs.append((n_needed * (rows + IDLE_ROWS), rows))
    return min(costs)[1]


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
def load_rows(ptr, stride, row, n_rows, mask, N: tl.constexpr, ALL: tl.constexpr):
    """Rows from `row` to row + N - 1, zero from n_rows on, unless ALL are known to be before it."""
    rows = ()
    ptr += tl.cast(row, tl.int64) * stride
    for u in tl.static_range(N):
        here = mask if ALL else mask & (row + u < n_rows)
        loaded = tl.load(ptr + tl.cast(u, tl.int64) * stride, mask=here, other=0.0)
        rows = append(rows, pair(loaded))
    return rows


@jit
def pair(row):
    """A row of halves as one of int32, even places in the low bits; other rows as they are.

    Each value that a loop hands on to its next step takes a register, a half too: unpaired, a
    backward that needs 80 registers needs 96, and an instruction more an element.
    """
    if row.dtype.primitive_bitwidth == 16:
        bits = tl.reshape(row.to(tl.int16, bitcast=True), [row.shape[0] // 2, 2])
        low, high = tl.split(bits)
        row = (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)
    return row


@jit
def unpair(row, kind: tl.constexpr):
    """In fp32, a row that was of this type before `pair`."""
    if kind == tl.bfloat16:
        low = (row << 16).to(tl.float32, bitcast=True)
        high = (row & -65536).to(tl.float32, bitcast=True)
        row = tl.reshape(tl.join(low, high), [row.shape[0] * 2])
    elif kind == tl.float16:
        low = row.to(tl.int16).to(tl.float16, bitcast=True)
        high = (row >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        row = tl.reshape(tl.join(low, high), [row.shape[0] * 2]).to(tl.float32)
    return row


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
