"""Gradients of causal_conv1d in Triton: x and dy are read once, dx is written once.

With v[t] = bias + sum_k weight[k] x[t - PAST + k] and PAST = w - 1 inputs before the current one:

    g[t] = dy[t] act'(v[t])          dx[t] = sum_j weight[PAST - j] g[t + j]
    dbias = sum_t g[t]               dweight[k] = sum_t g[t] x[t - PAST + k]

so the floor is 6 bytes an element of bf16. Rows are cut into pieces, none of which holds two
sequences; a warp walks a piece in order with PAST rows of x and of g in registers, and the next
rows of x and of dy are on their way while it computes. It reads PAST rows of x before its own, for
v, and PAST rows of both behind them, for dx. Sums for the weights leave a piece once.
"""

from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels import partials
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
from hybridzoo.kernels.jit import jit, tl, triton
from hybridzoo.kernels.partials import column_sums

# channels of a warp, 2 a lane: a lane keeps 16 fp32 values of each, 32 of the 80 registers that
# leave a multiprocessor 24 warps
BLOCK = 64
MAX_REGISTERS = 80
# where a piece is read from memory, no register that all lanes share holds it: 20 warps
MAX_REGISTERS_OF_PACKS = 96
# of x and of dy, a channel of a lane, which are on their way while as many are computed: 2 KiB a
# warp, 48 KiB of 24 warps. Of 4.8 TB/s a multiprocessor has 36 KiB a microsecond, about a load's
# latency, 24 of them read
LANE_BYTES = 16
# pieces that an H200 holds at once, 24 a multiprocessor. Sums of 4 (w + 1) bytes a channel and
# piece are written and read once: 4 MiB each way of one wave
PIECES = 3168
# of a piece; 3 (w - 1) rows are read twice
MIN_ROWS = 8


@jit
def _piece(cu_ptr, piece, n_seqs, n_steps, length, size, HAS_CU: tl.constexpr):
    """(sequence, its start and end, first row) of a piece; one without rows begins at the end.

    Sequence s of a pack, from a to b, has the pieces s + a // size and on: it never has more than
    are left before the next one's, s + 1 + b // size, so nobody adds up lengths.
    """
    sequence, start, end, first = piece * 0, piece * 0, piece * 0 + length, piece * size
    if HAS_CU:
        # the last sequence whose first piece is not behind this one, bit by bit
        for k in range(n_steps):
            later = sequence + (1 << (n_steps - 1 - k))
            first_piece = tl.load(cu_ptr + later, mask=later < n_seqs, other=0) // size + later
            sequence = tl.where((later < n_seqs) & (first_piece <= piece), later, sequence)
        start, end = tl.load(cu_ptr + sequence), tl.load(cu_ptr + sequence + 1)
        first = start + (piece - sequence - start // size) * size
    return sequence, start, end, first


@jit
def _zeros(N: tl.constexpr, C: tl.constexpr):
    """N rows (C,)."""
    zeros = ()
    for _ in tl.static_range(N):
        zeros = append(zeros, tl.zeros([C], tl.float32))
    return zeros


@jit
def _before_activation(past, x, dy, taps, bias, PAST: tl.constexpr, SILU: tl.constexpr):
    """The gradient g of what the activation is of, from that of y."""
    g = dy.to(tl.float32)
    if SILU:
        v = weigh(past, x, taps, bias, PAST, False)
        root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * v))
        s = root * root
        # of v s: s + v s (1 - s)
        g *= s + s * (v - v * s)
    return g


@jit
def _add_products(sums, g, rows):
    """Each sum and g times its row."""
    grown = ()
    for k in tl.static_range(len(rows)):
        grown = append(grown, sums[k] + g * rows[k])
    return grown


@jit
def _counts(first, end, rows, PAST: tl.constexpr, UNROLL: tl.constexpr):
    """Rows to the end of the sequence, of the piece, that it reads, and of steps without masks.

    Such a step's rows are the piece's own, and the next step's are the sequence's.
    """
    n_left = tl.maximum(end - first, 0)
    n_own = tl.minimum(n_left, rows)
    n_whole = tl.maximum(tl.minimum(n_own, n_left - UNROLL), 0) // UNROLL * UNROLL
    return n_left, n_own, tl.minimum(n_left, n_own + PAST), n_whole


@jit
def _load_both(x_ptr, dy_ptr, X_STRIDE: tl.constexpr, DY_STRIDE: tl.constexpr, row, n_rows, mask,
               N: tl.constexpr, ALL: tl.constexpr):  # fmt: skip
    """`load_rows` of x and of dy."""
    xs = load_rows(x_ptr, X_STRIDE, row, n_rows, mask, N, ALL)
    return xs, load_rows(dy_ptr, DY_STRIDE, row, n_rows, mask, N, ALL)


@jit
def _walk(xs, dys, past, gs, sums, x_ptr, dy_ptr, dx_ptr, X_STRIDE: tl.constexpr,
          DY_STRIDE: tl.constexpr, DX_STRIDE: tl.constexpr, row, n_own, n_read, mask, taps, bias,
          W: tl.constexpr, SILU: tl.constexpr, ALL: tl.constexpr):  # fmt: skip
    """On by these rows while the next are read; returns those, and past, gs and sums behind these.

    Each row's g goes into the sums and ends dx of the row PAST before it. Unless ALL are the
    piece's own, those from n_own on only end dx.
    """
    N: tl.constexpr = len(xs)
    next_xs, next_dys = _load_both(x_ptr, dy_ptr, X_STRIDE, DY_STRIDE, row + N, n_read, mask, N,
                                   ALL)  # fmt: skip
    PAST: tl.constexpr = W - 1
    dx_ptr += tl.cast(row, tl.int64) * DX_STRIDE
    for u in tl.static_range(N):
        x = unpair(xs[u], dx_ptr.dtype.element_ty)
        dy = unpair(dys[u], dx_ptr.dtype.element_ty)
        g = _before_activation(past, x, dy, taps, bias, PAST, SILU)
        past, gs = append(past, x), append(gs, g)
        own = g if ALL else tl.where(row + u < n_own, g, 0.0)
        sums = append(_add_products(sums, own, past), sums[W] + own)
        dx = taps[PAST] * gs[0]
        for j in tl.static_range(1, W):
            dx += taps[PAST - j] * gs[j]
        here = mask if ALL else mask & (row + u < n_own + PAST)
        if u < PAST:
            # the first PAST are of the piece before
            here = here & (row + u >= PAST)
        place = dx_ptr + tl.cast(u, tl.int64) * DX_STRIDE
        tl.store(place, dx.to(dx_ptr.dtype.element_ty), mask=here)
        past, gs = past[1:], gs[1:]
    return next_xs, next_dys, past, gs, sums


@jit(do_not_specialize=["length", "n_pieces", "n_seqs", "n_steps", "rows"])
def _conv_backward_kernel(x_ptr, dy_ptr, weight_ptr, bias_ptr, state_ptr, cu_ptr, dx_ptr, sums_ptr,
                     length, n_pieces, n_seqs, n_steps, rows, x_stride_b, dy_stride_b,
                     state_stride_b, state_stride_w, WIDTH: tl.constexpr, X_STRIDE: tl.constexpr,
                     DY_STRIDE: tl.constexpr, DX_STRIDE: tl.constexpr, W: tl.constexpr,
                     SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
                     HAS_CU: tl.constexpr, BLOCK: tl.constexpr,
                     UNROLL: tl.constexpr):  # fmt: skip
    PAST: tl.constexpr = W - 1
    n_blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0) // n_blocks
    batch = (program // n_pieces).to(tl.int64)
    channels = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channels < WIDTH if WIDTH % BLOCK else tl.full([BLOCK], True, tl.int1)
    sequence, start, end, first = _piece(cu_ptr, program % n_pieces, n_seqs, n_steps, length, rows,
                                         HAS_CU)  # fmt: skip
    n_left, n_own, n_read, n_whole = _counts(first, end, rows, PAST, UNROLL)
    x_ptr += batch * x_stride_b + channels
    state_ptr += (sequence.to(tl.int64) if HAS_CU else batch) * state_stride_b + channels
    past = load_past(x_ptr, X_STRIDE, state_ptr, state_stride_w, start, first, mask & (n_left > 0),
                     PAST, HAS_STATE)  # fmt: skip
    x_ptr += first.to(tl.int64) * X_STRIDE
    dy_ptr += batch * dy_stride_b + first.to(tl.int64) * DY_STRIDE + channels
    # a row ends dx PAST rows back
    dx_ptr += (batch * length + first - PAST) * DX_STRIDE + channels
    xs, dys = _load_both(x_ptr, dy_ptr, X_STRIDE, DY_STRIDE, 0, n_read, mask, UNROLL, False)
    # behind the loads, as it waits for its own
    taps, bias = load_taps(weight_ptr, bias_ptr, channels, mask, W, HAS_BIAS)
    past, gs, sums = to_fp32(past), _zeros(PAST, BLOCK), _zeros(W + 1, BLOCK)
    for row in range(0, n_whole, UNROLL):
        xs, dys, past, gs, sums = _walk(xs, dys, past, gs, sums, x_ptr, dy_ptr, dx_ptr, X_STRIDE,
                                        DY_STRIDE, DX_STRIDE, row, n_own, n_read, mask, taps, bias,
                                        W, SILU, True)  # fmt: skip
    for row in range(n_whole, n_own + PAST, UNROLL):
        xs, dys, past, gs, sums = _walk(xs, dys, past, gs, sums, x_ptr, dy_ptr, dx_ptr, X_STRIDE,
                                        DY_STRIDE, DX_STRIDE, row, n_own, n_read, mask, taps, bias,
                                        W, SILU, False)  # fmt: skip
    sums_ptr += program.to(tl.int64) * (W + HAS_BIAS) * WIDTH + channels
    for k in tl.static_range(W + HAS_BIAS):
        tl.store(sums_ptr + k * WIDTH, sums[k], mask=mask)


@jit(do_not_specialize=["n_partials"])
def _conv_sums_kernel(sums_ptr, dweight_ptr, dbias_ptr, n_partials, width, W: tl.constexpr,
                 HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    n_blocks = tl.cdiv(width, COLUMNS)
    tap = tl.program_id(0) // n_blocks
    channels = tl.program_id(0) % n_blocks * COLUMNS + tl.arange(0, COLUMNS)
    mask = channels < width
    total = column_sums(sums_ptr + tap * width, n_partials, (W + HAS_BIAS) * width, channels, mask,
                        ROWS)  # fmt: skip
    place = dweight_ptr + channels.to(tl.int64) * W + tap
    tl.store(place, total.to(dweight_ptr.dtype.element_ty), mask=mask & (tap < W))
    if HAS_BIAS:
        total = total.to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + channels, total, mask=mask & (tap == W))


@jit
def _gradients(x_ptr, x_stride, dy_ptr, dy_stride, state_ptr, state_stride, start, end, first, mask,
               taps, bias, PAST: tl.constexpr, SILU: tl.constexpr,
               HAS_STATE: tl.constexpr):  # fmt: skip
    """The g of rows first to first + PAST - 1, zero outside of the sequence."""
    past, gs = (), ()
    for k in tl.static_range(2 * PAST):
        t = first - PAST + k
        here = mask & (t >= start - PAST) & (t < end)
        x = load_row(x_ptr, x_stride, state_ptr, state_stride, start, t, here, PAST, HAS_STATE)
        x = x.to(tl.float32)
        if k >= PAST:
            place = dy_ptr + t.to(tl.int64) * dy_stride
            dy = tl.load(place, mask=here & (t >= start), other=0.0)
            gs = append(gs, _before_activation(past, x, dy, taps, bias, PAST, SILU))
            past = past[1:]
        past = append(past, x)
    return gs


@jit
def _store_last_rows(dx_ptr, dx_stride, dfinal_ptr, dfinal_stride, gs, taps, start, end, mask,
                     PAST: tl.constexpr):  # fmt: skip
    """The last PAST rows of dx once more, with what the state behind them adds."""
    for k in tl.static_range(PAST):
        t = end - PAST + k
        dx = tl.load(dfinal_ptr + k * dfinal_stride, mask=mask, other=0.0).to(tl.float32)
        for j in tl.static_range(PAST - k):
            dx += taps[PAST - j] * gs[k + j]
        place = dx_ptr + t.to(tl.int64) * dx_stride
        tl.store(place, dx.to(dx_ptr.dtype.element_ty), mask=mask & (t >= start))


@jit(do_not_specialize=["length"])
def _conv_states_kernel(x_ptr, dy_ptr, weight_ptr, bias_ptr, state_ptr, cu_ptr, dx_ptr, dfinal_ptr,
                   dstate_ptr, length, width, x_stride_b, x_stride_l, dy_stride_b, dy_stride_l,
                   dx_stride,
                   state_stride_b, state_stride_w, dfinal_stride_b, dfinal_stride_w,
                   W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
                   HAS_STATE: tl.constexpr, HAS_CU: tl.constexpr, HAS_FINAL: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    PAST: tl.constexpr = W - 1
    n_blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    channels = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = channels < width
    start, end, batch = length * 0, length, row
    if HAS_CU:
        start, end, batch = tl.load(cu_ptr + row), tl.load(cu_ptr + row + 1), row * 0
    x_ptr += batch * x_stride_b + channels
    dy_ptr += batch * dy_stride_b + channels
    state_ptr += row * state_stride_b + channels
    dfinal_ptr += row * dfinal_stride_b + channels
    taps, bias = load_taps(weight_ptr, bias_ptr, channels, mask, W, HAS_BIAS)
    if HAS_FINAL:
        gs = _gradients(x_ptr, x_stride_l, dy_ptr, dy_stride_l, state_ptr, state_stride_w, start,
                        end, end - PAST, mask, taps, bias, PAST, SILU, HAS_STATE)  # fmt: skip
        _store_last_rows(dx_ptr + batch * length * dx_stride + channels, dx_stride, dfinal_ptr,
                         dfinal_stride_w, gs, taps, start, end, mask, PAST)  # fmt: skip
    if HAS_STATE:
        gs = _gradients(x_ptr, x_stride_l, dy_ptr, dy_stride_l, state_ptr, state_stride_w, start,
                        end, start, mask, taps, bias, PAST, SILU, HAS_STATE)  # fmt: skip
        for k in tl.static_range(PAST):
            dstate = tl.zeros(channels.shape, tl.float32)
            for j in tl.static_range(k + 1):
                dstate += taps[k - j] * gs[j]
            if HAS_FINAL:
                # fewer tokens than PAST leave the end of the state in the next one
                last = (k - (end - start)).to(tl.int64)
                place = dfinal_ptr + last * dfinal_stride_w
                dstate += tl.load(place, mask=mask & (last >= 0), other=0.0).to(tl.float32)
            place = dstate_ptr + (row * PAST + k) * width + channels
            tl.store(place, dstate.to(dstate_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("hybridzoo::causal_conv1d_triton_backward", mutates_args=())
def causal_conv1d_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and initial_state; an absent one's is empty, shape (0,).

    It has no formula of its own, so that a second derivative raises.
    """
    return launch_backward(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu)


def launch_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    *,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op runs; `dx`, some channels of contiguous (b, l, more), is filled where given."""
    given = (dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu)
    dx, dweight, dbias, dstate = _allocate(*given, dx)
    x, dy, flat, bias, state, dfinal = map(
        rows_of, (x, dy, weight.flatten(), bias, initial_state, dfinal_state)
    )
    options: dict[str, Any] = {
        "W": weight.shape[1], "SILU": silu, "HAS_BIAS": bias is not None, "BLOCK": BLOCK,
        "HAS_STATE": state is not None, "HAS_CU": cu_seqlens is not None,
    }  # fmt: skip
    # a pointer is needed where nothing is read
    bias, state, final = (dx if t is None else t for t in (bias, state, dfinal))
    cu = dx if cu_seqlens is None else cu_seqlens.contiguous()
    inputs = (x, dy, flat, bias, state, cu, dx)
    # a stride of one row is never used, and any value would compile a kernel of its own
    strides = [s for t in (x, dy) for s in (t.stride(0) if len(t) > 1 else 0, t.stride(1))]
    strides += (dx.stride(1), *state.stride()[:2])
    with torch.cuda.device_of(x):
        _end(_launch(inputs, strides, options), dweight, dbias)
        if initial_state is not None or dfinal is not None:
            n_states = len(x) if cu_seqlens is None else len(cu) - 1
            _conv_states_kernel[(triton.cdiv(x.shape[2], BLOCK) * n_states,)](
                *inputs, final, dstate, *x.shape[1:], *strides, *final.stride()[:2],
                HAS_FINAL=dfinal is not None, num_warps=1, **options,
            )  # fmt: skip
    return dx, dweight, dbias, dstate


def _launch(inputs: tuple[Tensor, ...], strides: list[int], options: dict[str, Any]) -> Tensor:
    """Write dx; what the programs summed is (n, w, i), w + 1 with a bias."""
    x, cu = inputs[0], inputs[5]
    b, length, width = x.shape
    x_stride_b, x_stride, dy_stride_b, dy_stride, dx_stride, *state_strides = strides
    unroll, n_blocks = LANE_BYTES // x.element_size(), triton.cdiv(width, BLOCK)
    rows = split_rows(length, b * n_blocks, PIECES, unroll, MIN_ROWS)
    n_seqs, n_pieces = 0, triton.cdiv(length, rows)
    if options["HAS_CU"] and length:
        n_seqs = len(cu) - 1
        n_pieces = n_seqs + length // rows
    shape = (b * n_pieces, options["W"] + options["HAS_BIAS"], width)
    sums = x.new_empty(shape, dtype=torch.float32)
    n_registers = MAX_REGISTERS_OF_PACKS if options["HAS_CU"] else MAX_REGISTERS
    if sums.numel():
        # strides of rows are constants, which are offsets in the instructions: a model has few
        _conv_backward_kernel[(n_blocks * b * n_pieces,)](
            *inputs, sums, length, n_pieces, n_seqs, n_seqs.bit_length(), rows, x_stride_b,
            dy_stride_b, *state_strides, WIDTH=width, X_STRIDE=x_stride,
            DY_STRIDE=dy_stride, DX_STRIDE=dx_stride, UNROLL=unroll, num_warps=1,
            maxnreg=n_registers, **options,
        )  # fmt: skip
    return sums


def _end(sums: Tensor, dweight: Tensor, dbias: Tensor) -> None:
    """Add up what the programs summed."""
    n_partials, n_rows, width = sums.shape
    _conv_sums_kernel[(n_rows * triton.cdiv(width, partials.COLUMNS),)](
        sums, dweight, dbias, n_partials, width, W=dweight.shape[1],
        HAS_BIAS=n_rows > dweight.shape[1], ROWS=partials.ROWS, COLUMNS=partials.COLUMNS,
        num_warps=partials.WARPS,
    )  # fmt: skip


@causal_conv1d_backward.register_fake
def _allocate(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if dx is None:
        dx = x.new_empty(x.shape)
    else:
        # the kernels derive where a row begins
        assert len(dx) == 1 or dx.stride(0) == dx.shape[1] * dx.stride(1), "rows of dx lie apart"
    absent = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (bias, initial_state))
    return dx, weight.new_empty(weight.shape), *absent
