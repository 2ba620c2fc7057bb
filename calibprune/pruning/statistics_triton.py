# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
"""Scaling, rounding and adding of a block of a Gram matrix in one GPU kernel, which reads and writes each number once.

Imported only where it is used: Triton comes with the CUDA builds of torch.
"""

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 2048
"""Columns that one program adds."""


def add_scaled(sums: Tensor, product: Tensor, scale: float, first_row: int) -> None:
    """Adds rint(product * scale) to the rows of `sums` from `first_row` on, nothing above the diagonal.

    `sums` [in, in] is int64, `product` [rows, columns] float32. Raises ValueError for tensors that do not lie row by
    row.
    """
    if sums.stride(1) != 1 or product.stride(1) != 1:
        raise ValueError("the kernel reads sums and product row by row")
    rows, columns = product.shape
    _kernel[(rows, triton.cdiv(columns, COLUMNS))](
        sums,
        product,
        scale,
        first_row,
        columns,
        sums.stride(0),
        product.stride(0),
        WIDTH=COLUMNS,
        # given, since the last bits depend on it
        enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]
    )


@triton.jit
def _kernel(
    sums, product, scale, first_row, columns, sums_stride, product_stride, WIDTH: tl.constexpr
):
    # places in the matrices take 64 bits: from 46,341 columns on there are more than 2^31
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (column < columns) & (column <= first_row + row)
    value = tl.load(product + row * product_stride + column, mask=inside, other=0.0) * scale
    # numbers from 2^23 on are whole; adding 2^23 to smaller ones rounds them, ties to even
    whole = tl.where(value < 0, -8388608.0, 8388608.0)
    value = tl.where(tl.abs(value) < 8388608.0, (value + whole) - whole, value)
    place = sums + (first_row + row) * sums_stride + column
    total = tl.load(place, mask=inside, other=0)
    tl.store(place, total + value.to(tl.int64), mask=inside)
