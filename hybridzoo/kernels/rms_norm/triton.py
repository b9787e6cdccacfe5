"""rms_norm in Triton: residual add, mean square and weight in one pass over a row."""

from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels.adjoint import recomputed_gradients
from hybridzoo.kernels.jit import available, jit, tl, triton
from hybridzoo.kernels.rms_norm import reference

__all__ = ["available", "run", "why_not"]

# a row lies in the registers of one program
MAX_WIDTH = 16384
# elements of a program, made of as many rows as it takes; and of a warp, 16 a lane
TILE = 2048
PER_WARP = 512


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
    y, h = _rms_norm(x, weight, residual, eps, weight_fp32)
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


@torch.library.custom_op("hybridzoo::rms_norm_triton_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dh: Tensor,
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_fp32: bool,
) -> list[Tensor]:
    def again(x: Tensor, weight: Tensor | None, residual: Tensor | None) -> Any:
        y, h = reference.run(x, weight, eps=eps, residual=residual, weight_fp32=weight_fp32)
        return y if residual is None else (y, h)

    cotangents = (dy,) if residual is None else (dy, dh)
    return recomputed_gradients(again, (x, weight, residual), cotangents)


@_backward.register_fake
def _(dy: Tensor, dh: Tensor, *inputs: Any) -> list[Tensor]:
    return [dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:3]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, ctx.weight_fp32 = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = _backward(dy, dh, *tensors, ctx.eps, ctx.weight_fp32)
    present = (None if t is None else g for t, g in zip(tensors, grads, strict=True))
    return *present, None, None


_rms_norm.register_autograd(_differentiate, setup_context=_setup_context)
