"""Sums of partial sums: the gradients of weights, in one order and without atomics.

Each program of a backward keeps fp32 sums over the rows that are its own and writes them as a row
of a workspace. What launches next adds these rows up, a block of columns a program.
"""

from hybridzoo.kernels.jit import jit, tl

# rows of a workspace whose loads are in flight together, columns of a program: 128 bytes
ROWS = 128
COLUMNS = 32
WARPS = 8


@jit
def column_sums(ptr, n_rows, stride, columns, mask, ROWS: tl.constexpr):
    """(C,) fp32: these columns of n_rows rows, `stride` apart."""
    rows = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros([ROWS, columns.shape[0]], tl.float32)
    for first in range(0, n_rows, ROWS):
        places = (first + rows).to(tl.int64) * stride + columns[None, :]
        here = (first + rows < n_rows) & mask[None, :]
        sums += tl.load(ptr + places, mask=here, other=0.0)
    return tl.sum(sums, axis=0)
