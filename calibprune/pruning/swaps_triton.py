# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
"""The weighing of all exchanges of swaps in one GPU kernel, which holds no pair in memory.

Imported only where it is used: Triton comes with the CUDA builds of torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64
"""Kept weights that one program weighs in registers: of so many rows and columns."""


def lowest_scores(
    current: Tensor, base: Tensor, factor: Tensor, gram: Tensor, both_signs: bool
) -> Tensor:
    """Computes for every weight p the lowest base_r + factor_r * current_p * G_pr over all r, [out, in] all of them.

    `both_signs`: the lowest of the negated magnitudes instead. Raises ValueError for tensors that do not lie by rows.
    """
    if current.stride(1) != 1 or gram.stride(1) != 1:
        raise ValueError("the kernel reads weights and Gram matrix row by row")
    rows, width = current.shape
    lowest = torch.empty(rows, width, dtype=torch.float32, device=current.device)
    if rows:
        base, factor = base.T.contiguous(), factor.T.contiguous()
        # programs that read the same columns of the Gram matrix run side by side
        grid = triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS)
        _kernel[grid](
            current, base, factor, gram, lowest, rows, width, current.stride(0), gram.stride(0),
            BOTH_SIGNS=both_signs, HEIGHT=ROWS, WIDTH=COLUMNS,
            # given, since the last bits depend on it
            enable_fp_fusion=True,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return lowest


@triton.jit
def _kernel(
    current, base, factor, gram, lowest, rows, width, current_stride, gram_stride,
    BOTH_SIGNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    value = tl.load(
        current + row.to(tl.int64)[:, None] * current_stride + column[None, :],
        mask=inside,
        other=0.0,
    )
    best = tl.full((HEIGHT, WIDTH), 3e38, dtype=tl.float32)
    for _ in tl.range(width, loop_unroll_factor=2):
        products = tl.load(gram + column, mask=column < width, other=0.0)
        start = tl.load(base + row, mask=row < rows, other=0.0)
        times = tl.load(factor + row, mask=row < rows, other=0.0)
        score = start[:, None] + times[:, None] * (value * products[None, :])
        best = tl.minimum(best, -tl.abs(score) if BOTH_SIGNS else score)
        # pointers move on, which have 64 bits: the Gram matrix may have more than 2^31 entries
        gram += gram_stride
        base += rows
        factor += rows
    tl.store(lowest + row.to(tl.int64)[:, None] * width + column[None, :], best, mask=inside)
