# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
"""SparseGPT's columns of one block in one GPU kernel: its time is not that of launching thousands of small ones.

Imported only where it is used: Triton comes with the CUDA builds of torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Rows that one program holds in registers."""


def solve_block(
    weights: Tensor, keep: Tensor, upper: Tensor, start: int, n_of_m: tuple[int, int] | None
) -> Tensor:
    """What `sparsegpt._solve_block_tensors` does, shapes and all: in place, returns the errors [out, columns].

    Raises ValueError for tensors that do not lie row by row.
    """
    if any(tensor.stride(1) != 1 for tensor in (weights, keep, upper)):
        raise ValueError("the kernel reads weights, mask and factor row by row")
    rows, columns = keep.shape
    kept, group = n_of_m or (0, 1)
    errors = torch.empty(rows, columns, dtype=torch.float32, device=weights.device)
    if rows:
        _kernel[(triton.cdiv(rows, ROWS),)](
            weights, keep.view(torch.int8), upper, errors, rows, columns, start,
            weights.stride(0), upper.stride(0),
            WIDTH=triton.next_power_of_2(columns), HEIGHT=ROWS, KEPT=kept, GROUP=group,
            # given, since the last bits depend on it
            enable_fp_fusion=True,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return errors


@triton.jit
def _kernel(
    weights, keep, upper, errors, rows, columns, start, weights_stride, upper_stride,
    WIDTH: tl.constexpr, HEIGHT: tl.constexpr, KEPT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # places in the matrices take 64 bits: from 46,341 columns on there are more than 2^31
    row = (tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * weights_stride + start + column[None, :]
    block = tl.load(weights + place, mask=inside, other=0.0)
    stays = tl.load(keep + row[:, None] * columns + column[None, :], mask=inside, other=1).to(
        tl.int32
    )
    passed_on = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for i in range(columns):
        if GROUP > 1:  # noqa: SIM102 - known when the kernel is compiled
            if i % GROUP == 0:
                # rank the group's scores, of equal ones the lowest column first; keep the KEPT highest
                for j in tl.static_range(GROUP):
                    pivot_j = tl.load(upper + (start + i + j).to(tl.int64) * (upper_stride + 1))
                    weight_j = tl.sum(tl.where((column == i + j)[None, :], block, 0.0), 1)
                    ratio_j = tl.div_rn(weight_j, pivot_j)
                    lower = tl.zeros((HEIGHT,), dtype=tl.int32)
                    for k in tl.static_range(GROUP):
                        pivot_k = tl.load(upper + (start + i + k).to(tl.int64) * (upper_stride + 1))
                        weight_k = tl.sum(tl.where((column == i + k)[None, :], block, 0.0), 1)
                        ratio_k = tl.div_rn(weight_k, pivot_k)
                        below = ratio_k * ratio_k < ratio_j * ratio_j
                        if k < j:
                            below = below | (ratio_k * ratio_k == ratio_j * ratio_j)
                        lower += below.to(tl.int32)
                    chosen = (lower >= GROUP - KEPT).to(tl.int32)
                    stays = tl.where((column == i + j)[None, :], chosen[:, None], stays)
        here = (column == i)[None, :]
        pivot = tl.load(upper + (start + i).to(tl.int64) * (upper_stride + 1))
        factor = tl.load(
            upper + (start + i).to(tl.int64) * upper_stride + start + column,
            mask=(column > i) & (column < columns),
            other=0.0,
        )
        weight = tl.sum(tl.where(here, block, 0.0), 1)
        kept = tl.sum(tl.where(here, stays, 0), 1)
        error = tl.where(kept != 0, 0.0, tl.div_rn(weight, pivot))
        block -= error[:, None] * factor[None, :]
        passed_on = tl.where(here, error[:, None], passed_on)
    tl.store(weights + place, tl.where(stays != 0, block, 0.0), mask=inside)
    tl.store(errors + row[:, None] * columns + column[None, :], passed_on, mask=inside)
