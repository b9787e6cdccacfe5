"""grouped_mm: one matrix product an expert, over rows sorted by expert."""

from torch import Tensor

from hybridzoo.kernels.dispatch import Op

_grouped_mm = Op(
    "grouped_mm",
    {
        "torch": "hybridzoo.kernels.grouped_mm.torch_grouped_mm",
        "reference": "hybridzoo.kernels.grouped_mm.reference",
    },
)


@_grouped_mm.contract
def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix (MegaBlocks, arXiv 2211.15841, section 4).

        y[t] = weight[e] x[t]          for offsets[e - 1] <= t < offsets[e]

    Args:
        x: rows sorted by group, (t, k), fp32 / bf16 / fp16 / float64.
        weight: one [out, in] matrix a group, (e, n, k), x.dtype.
        offsets: end of each group, (e,) int32, ascending, the last is t; groups may be empty.

    Returns:
        y, (t, n), x.dtype, accumulated in fp32. An empty group's weight gets a zero gradient.

    Raises:
        BackendError: no backend supports these dtypes, device or sizes; the message gives each
            one's reason.
    """
    return _grouped_mm(x, weight, offsets)
