"""rms_norm in Triton: residual add, mean square and weight in one pass over a row, and back.

The backward reads h, dy and dh and writes the stream's gradient, and x's where its dtype is
another: those bytes are the floor. Of the forward only h is kept, which the stream keeps anyway;
1 / rms is made again from the row, which lies in registers, so the op needs no third result.
"""

from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels import partials
from hybridzoo.kernels.dispatch import needs_gradient
from hybridzoo.kernels.jit import available, jit, tl, triton
from hybridzoo.kernels.partials import column_sums

__all__ = ["available", "run", "why_not"]

# a row lies in the registers of one program
MAX_WIDTH = 16384
# elements of a program, made of as many rows as it takes; and of a warp, 16 a lane
TILE = 2048
PER_WARP = 512
# warps of a multiprocessor that a backward counts on, by the bytes of its widest element: so many
# registers does a lane of theirs need. Its programs stay and take every so many rows: of 4096 in
# bf16, 3 of 24 KiB on their way, 132 x 3 x 16 KiB of sums, 6 MiB
BACKWARD_WARPS = {2: 24, 4: 16}
# bytes of a row from which on dh would fill registers that are not there, and is read when the sums
# are done
LATE_BYTES = 65536


def why_not(
    x: Tensor, weight: Tensor | None = None, *, residual: Tensor | None = None, **_: object
) -> str | None:
    """Takes fp32, bf16 and fp16, rows of up to 16384."""
    reason = available(x.device)
    if reason is not None:
        return reason
    for t in (x, weight, residual):
        if t is not None and t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 and float16, not {t.dtype}"
    if x.shape[-1] > MAX_WIDTH:
        return f"x is {x.shape[-1]} wide, its limit is {MAX_WIDTH}"
    return None


def run(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    residual: Tensor | None = None,
    weight_fp32: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `hybridzoo.kernels.rms_norm.rms_norm`."""
    given = (x, weight, residual, eps, weight_fp32)
    is_recorded = needs_gradient(x, weight, residual)
    y, h = _Differentiable.apply(*given) if is_recorded else _rms_norm(*given)
    return y, x if residual is None else h


@jit(do_not_specialize=["n_rows", "n_inner"])
def _norm_kernel(x_ptr, weight_ptr, residual_ptr, y_ptr, h_ptr, eps, n_rows, n_inner, width,
                 x_stride_outer, x_stride_inner, x_stride_d,
                 residual_stride_outer, residual_stride_inner, residual_stride_d,
                 HAS_WEIGHT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, WEIGHT_FP32: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    outer, inner = (row // n_inner).to(tl.int64), (row % n_inner).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < n_rows) & (column < width)
    column64 = column.to(tl.int64)
    places = row.to(tl.int64) * width + column
    x_place = x_ptr + outer * x_stride_outer + inner * x_stride_inner + column64 * x_stride_d
    x = tl.load(x_place, mask=mask, other=0.0)
    h = x.to(tl.float32)
    if HAS_RESIDUAL:
        residual_place = residual_ptr + outer * residual_stride_outer + column64 * residual_stride_d
        residual_place += inner * residual_stride_inner
        residual = tl.load(residual_place, mask=mask, other=0.0)
        # each operand and the sum are rounded to the stream's dtype, as torch adds
        h = residual.to(tl.float32) + x.to(residual.dtype).to(tl.float32)
        h = h.to(residual.dtype)
        tl.store(h_ptr + places, h, mask=mask)
        h = h.to(tl.float32)
    y = h * tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / width + eps)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        if not WEIGHT_FP32:
            y = y.to(x.dtype).to(tl.float32)
        y *= weight
    tl.store(y_ptr + places, y.to(x.dtype), mask=mask)


@torch.library.custom_op("hybridzoo::rms_norm_triton", mutates_args=())
def _rms_norm(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, weight_fp32: bool
) -> tuple[Tensor, Tensor]:
    """The second result is h, or an empty tensor without a residual: an op returns no input."""
    y, h = _allocate(x, weight, residual, eps, weight_fp32)
    if y.numel() == 0:
        return y, h
    width = x.shape[-1]
    n_rows, block = x.numel() // width, triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    x = _three_dims(x)
    residual = x if residual is None else _three_dims(residual)
    with torch.cuda.device_of(x):
        _norm_kernel[(triton.cdiv(n_rows, rows),)](
            # a pointer is needed where nothing is read
            x, x if weight is None else weight.contiguous(), residual, y, h, eps,
            n_rows, x.shape[1], width, *x.stride(), *residual.stride(),
            HAS_WEIGHT=weight is not None, HAS_RESIDUAL=h.numel() > 0, WEIGHT_FP32=weight_fp32,
            ROWS=rows, BLOCK=block, num_warps=min(16, max(1, rows * block // PER_WARP)),
        )  # fmt: skip
    return y, h


def _three_dims(t: Tensor) -> Tensor:
    """A view (outer, inner, d): two dimensions of rows, so that slices of a batch need no copy."""
    while t.dim() < 3:
        t = t[None]
    return t.flatten(0, -3)


@_rms_norm.register_fake
def _allocate(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, weight_fp32: bool
) -> tuple[Tensor, Tensor]:
    h = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    return x.new_empty(x.shape), h


@jit(do_not_specialize=["n_rows", "n_inner"])
def _norm_backward_kernel(dy_ptr, dh_ptr, h_ptr, weight_ptr, dstream_ptr, dx_ptr, sums_ptr, eps,
                          n_rows, n_inner, width, dy_stride_outer, dy_stride_inner, dy_stride_d,
                          dh_stride_outer, dh_stride_inner, dh_stride_d, h_stride_outer,
                          h_stride_inner, h_stride_d, HAS_DH: tl.constexpr, HAS_WEIGHT:
                          tl.constexpr, HAS_DX: tl.constexpr, LATE: tl.constexpr, ROWS:
                          tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    column64 = column.to(tl.int64)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        outer, inner = (row // n_inner).to(tl.int64), (row % n_inner).to(tl.int64)
        mask = (row < n_rows) & (column < width)
        place = h_ptr + outer * h_stride_outer + inner * h_stride_inner + column64 * h_stride_d
        h = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        place = dy_ptr + outer * dy_stride_outer + inner * dy_stride_inner + column64 * dy_stride_d
        dy = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        place = dh_ptr + outer * dh_stride_outer + inner * dh_stride_inner + column64 * dh_stride_d
        if HAS_DH and not LATE:
            dh = tl.load(place, mask=mask, other=0.0)
        root = tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / width + eps)
        unit = h * root
        dunit = dy
        if HAS_WEIGHT:
            sums += dy * unit
            dunit *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        along = tl.sum(dunit * unit, axis=1, keep_dims=True) / width
        dstream = root * (dunit - unit * along)
        if HAS_DH and LATE:
            dh = tl.load(place, mask=mask, other=0.0)
        if HAS_DH:
            dstream += dh.to(tl.float32)
        places = row.to(tl.int64) * width + column
        tl.store(dstream_ptr + places, dstream.to(dstream_ptr.dtype.element_ty), mask=mask)
        if HAS_DX:
            tl.store(dx_ptr + places, dstream.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        places = sums_ptr + tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
        tl.store(places, tl.sum(sums, axis=0), mask=tl.arange(0, BLOCK) < width)


@jit(do_not_specialize=["n_partials"])
def _norm_sums_kernel(sums_ptr, dweight_ptr, n_partials, width, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = column_sums(sums_ptr, n_partials, width, columns, columns < width, ROWS)
    total = total.to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + columns, total, mask=columns < width)


@torch.library.custom_op("hybridzoo::rms_norm_triton_backward", mutates_args=())
def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, of x where its dtype is not h's, and of weight; an absent one's is (0,).

    What the forward rounds, h and y before the weight, is taken for exact, so that the place of the
    cast makes no difference. It has no formula of its own: a second derivative raises.
    """
    dstream, dx, dweight = _allocate_gradients(dy, dh, h, weight, eps)
    if h.numel() == 0:
        return dstream, dx, dweight.zero_()
    width = h.shape[-1]
    n_rows, block = h.numel() // width, triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    n_warps = min(16, max(1, rows * block // PER_WARP))
    item = max(dy.element_size(), h.element_size())
    n_resident = max(1, BACKWARD_WARPS[item] // n_warps)
    n_processors = torch.cuda.get_device_properties(h.device).multi_processor_count
    n_programs = min(n_resident * n_processors, triton.cdiv(n_rows, rows))
    sums = h.new_empty(n_programs if weight is not None else 0, width, dtype=torch.float32)
    has_dh, has_weight = dh is not None, weight is not None
    # a pointer is needed where nothing is read
    dh, weight = h if dh is None else dh, h if weight is None else weight.contiguous()
    dy, dh, h = map(_three_dims, (dy, dh, h))
    with torch.cuda.device_of(h):
        _norm_backward_kernel[(n_programs,)](
            dy, dh, h, weight, dstream, dx, sums, eps, n_rows, h.shape[1], width,
            *dy.stride(), *dh.stride(), *h.stride(), HAS_DH=has_dh, HAS_WEIGHT=has_weight,
            HAS_DX=dx.numel() > 0, LATE=block * item >= LATE_BYTES, ROWS=rows, BLOCK=block,
            # of the 65536 registers of a multiprocessor, by eights
            num_warps=n_warps, maxnreg=65536 // (32 * n_warps * n_resident) // 8 * 8,
        )  # fmt: skip
        if has_weight:
            _norm_sums_kernel[(triton.cdiv(width, partials.COLUMNS),)](
                sums, dweight, n_programs, width, ROWS=partials.ROWS, COLUMNS=partials.COLUMNS,
                num_warps=partials.WARPS,
            )  # fmt: skip
    return dstream, dx, dweight


@_backward.register_fake
def _allocate_gradients(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dy.new_empty(0 if dy.dtype == h.dtype else h.shape)
    dweight = dy.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return h.new_empty(h.shape), dx, dweight


class _Differentiable(torch.autograd.Function):
    """Joins the two ops, in a third of the host time of a formula that torch generates."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        residual: Tensor | None,
        eps: float,
        weight_fp32: bool,
    ) -> tuple[Tensor, Tensor]:
        y, h = _rms_norm(x, weight, residual, eps, weight_fp32)
        ctx.save_for_backward(x if residual is None else h, weight)
        ctx.eps, ctx.dtype, ctx.has_residual = eps, x.dtype, residual is not None
        # h may end here
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        dy = torch.zeros_like(h, dtype=ctx.dtype) if dy is None else dy
        # without a residual the op's h is empty, and x's gradient through it is autograd's own
        dh = dh if ctx.has_residual else None
        dstream, dx, dweight = _backward(dy, dh, h, weight, ctx.eps)
        dx = dstream if dy.dtype == h.dtype else dx
        dresidual = dstream if ctx.has_residual else None
        return dx, None if weight is None else dweight, dresidual, None, None
