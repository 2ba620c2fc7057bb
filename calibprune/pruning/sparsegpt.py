"""SparseGPT: weights are removed column by column, and those still to come make up for it.

Frantar & Alistarh 2023 (arXiv 2301.00774), algorithm 1. On CPUs the columns run in compiled code, row by
row; elsewhere as tensor operations over all rows at once. Either way a row's result, given which of its
weights stay, does not depend on the rows beside it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from calibprune.config import SparseGPT
from calibprune.pruning.masks import (
    check_width,
    for_row_chunks,
    keep_all_but_lowest,
    keep_n_of_m,
    mark_kept,
)
from calibprune.pruning.rows import RowShares, row_chunk
from calibprune.pruning.statistics import Statistics, full_float32

INVERSE_COLUMNS = {"cpu": 192}
GPU_INVERSE_COLUMNS = 2048

VECTOR = 32  # float32 values in one turn of the vectorised loop

# (weights so far, first column, last column + 1) -> which weights of these columns stay
ChooseKeep = Callable[[Float32[Tensor, "out in"], int, int], Bool[Tensor, "out columns"]]


class NotPositiveDefinite(ValueError):
    """The damped Gram matrix has no Cholesky factor; `enough` is a damping with which it has one."""

    def __init__(self, damping: float, enough: float | None):
        advice = "no damping helps" if enough is None else f"damping {enough:g} would do"
        super().__init__(
            f"the Gram matrix of the inputs is not positive definite with damping {damping:g}: {advice}"
        )
        self.damping = damping
        self.enough = enough


@torch.no_grad()
def prune(
    weights: list[Float[Tensor, "_ in"]],
    statistics: Statistics,
    sparsities: list[float],
    n_of_m: tuple[int, int] | None,
    settings: SparseGPT,
    shares: RowShares | None = None,
) -> list[Float[Tensor, "_ in"]]:
    """Prunes linears that share one input, and updates what stays to keep their outputs.

    Unstructured: of every block of `blocksize` columns, the round(out * columns * sparsity) lowest scores over
    all rows of one linear go (the authors' code removes one more, and every tie). N:M: the choice is made at
    each group's first column, from the weights updated so far, row by row; sparsities are not used.
    Needs `gram`. `shares`: `weights` are only this worker's rows, as it says; collective if unstructured. Raises
    NotPositiveDefinite, and ValueError if width or blocksize do not fit the pattern.
    """
    if statistics.gram is None:
        raise ValueError("SparseGPT needs the Gram matrix of the inputs")
    if n_of_m:
        check_width(weights[0].shape[1], n_of_m[1])
        check_width(settings.blocksize, n_of_m[1])
    upper = inverse_factor(statistics.gram, settings.damping)
    stacked = torch.cat([weight.to(torch.float32) for weight in weights])
    stacked[:, statistics.gram.diagonal() == 0] = 0
    rows = [len(weight) for weight in weights]
    shares = shares or RowShares.of(weights)

    def lowest_of_each_linear(
        current: Float32[Tensor, "out in"], start: int, stop: int
    ) -> Bool[Tensor, "out columns"]:
        scores = (current[:, start:stop] / upper.diagonal()[start:stop]).square()
        removed = [
            round(out * (stop - start) * sparsity)
            for out, sparsity in zip(shares.rows, sparsities, strict=True)
        ]
        return torch.cat(keep_all_but_lowest(scores.split(rows), removed, shares.gang))

    chosen = n_of_m or lowest_of_each_linear
    solved = solve(stacked, upper, settings.blocksize, chosen, rows)
    return [
        part.to(weight.dtype, copy=True)
        for part, weight in zip(solved.split(rows), weights, strict=True)
    ]


def inverse_factor(gram: Float32[Tensor, "in in"], damping: float) -> Float32[Tensor, "in in"]:
    """The upper triangular U with U^T U = H^-1, H being the Gram matrix made safe to invert.

    Inputs that were always zero get H_jj = 1; then damping * mean(diag H) is added to the diagonal. From the
    Cholesky factor of H with rows and columns reversed, H = R R^T with R upper triangular, so U = R^-1: one
    factorisation and one triangular solve. Raises NotPositiveDefinite.
    """
    factor = _reversed_cholesky(gram, damping)
    if factor is None:
        larger = (damping * 10.0**power for power in range(1, 13))
        enough = next((d for d in larger if _reversed_cholesky(gram, d) is not None), None)
        raise NotPositiveDefinite(damping, enough)
    inverse = torch.zeros_like(factor)
    columns = INVERSE_COLUMNS.get(factor.device.type, GPU_INVERSE_COLUMNS)
    with (
        full_float32()
    ):  # column by column of the identity, each from its 1 down: a third of the work
        for start in range(0, len(factor), columns):
            identity = torch.eye(len(factor) - start, columns, device=factor.device)
            part = identity[:, : len(factor) - start]
            inverse[start:, start : start + columns] = torch.linalg.solve_triangular(
                factor[start:, start:], part, upper=False
            )
    return inverse.tril_().flip(0, 1).contiguous()


def solve(
    weights: Float32[Tensor, "out in"],
    upper: Float32[Tensor, "in in"],
    blocksize: int,
    chosen: tuple[int, int] | ChooseKeep,
    rows: list[int] | None = None,
) -> Float32[Tensor, "out in"]:
    """Runs the columns from left to right; returns new weights with exact zeros where they were removed.

    `upper` is `inverse_factor`'s; `chosen` an N:M pattern or what chooses a block's weights before its first
    column; `rows` the rows of each of the stacked linears. arXiv 2301.00774, algorithm 1.
    """
    weights = weights.clone(memory_format=torch.contiguous_format)
    width, rows = weights.shape[1], rows or [len(weights)]
    on_cpu = weights.device.type == "cpu"
    solve_block = _solve_block_compiled if on_cpu else _solve_block_tensors
    with _torch_threads_idle() as threads:
        for start in range(0, width, blocksize):
            stop = min(start + blocksize, width)
            if isinstance(chosen, tuple):
                keep, n_of_m = torch.ones_like(weights[:, start:stop], dtype=torch.bool), chosen
            else:
                keep, n_of_m = chosen(weights, start, stop).contiguous(), None
            solve_block(weights, keep, upper, start, n_of_m=n_of_m, rows=rows, threads=threads)
    return weights


@contextmanager
def _torch_threads_idle() -> Iterator[int]:
    """Runs torch on the calling thread alone; yields how many threads it had.

    After every operation torch's threads spin for milliseconds, waiting for the next: that would take the
    cores from the compiled code between two operations.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _reversed_cholesky(
    gram: Float32[Tensor, "in in"], damping: float
) -> Float32[Tensor, "in in"] | None:
    """Lower Cholesky factor of the damped Gram matrix with rows and columns reversed, None if it has none."""
    damped = gram.flip(0, 1)
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    with full_float32():
        factor, failed = torch.linalg.cholesky_ex(damped)
    return None if failed.item() else factor


def _solve_block_tensors(
    weights: Float32[Tensor, "out in"],
    keep: Bool[Tensor, "out columns"],
    upper: Float32[Tensor, "in in"],
    start: int,
    *,
    n_of_m: tuple[int, int] | None,
    rows: list[int],
    threads: int,
) -> None:
    """Solves one block and updates the columns after it, in place; the block is held transposed."""
    stop = start + keep.shape[1]
    inner = upper[start:stop, start:stop]
    pivots = inner.diagonal()
    block = weights[:, start:stop].T.contiguous()
    keep_columns = keep.T.contiguous()
    errors = torch.zeros_like(block)
    for i in range(len(block)):
        if n_of_m and i % n_of_m[1] == 0:
            group = slice(i, i + n_of_m[1])
            scores = (block[group] / pivots[group, None]).square()
            keep_columns[group] = keep_n_of_m(scores.T, *n_of_m).T
        errors[i] = (block[i] / pivots[i]).masked_fill(keep_columns[i], 0)
        block[i:].addcmul_(inner[i, i:, None], errors[i], value=-1)
        block[i].masked_fill_(~keep_columns[i], 0)
    weights[:, start:stop] = block.T
    with full_float32():
        for tail, error in zip(
            weights[:, stop:].split(rows), errors.T.contiguous().split(rows), strict=True
        ):
            chunk = row_chunk(weights.device)
            for part, part_error in zip(tail.split(chunk), error.split(chunk), strict=True):
                part.addmm_(part_error, upper[start:stop, stop:], alpha=-1)


def _solve_block_compiled(
    weights: Float32[Tensor, "out in"],
    keep: Bool[Tensor, "out columns"],
    upper: Float32[Tensor, "in in"],
    start: int,
    *,
    n_of_m: tuple[int, int] | None,
    rows: list[int],
    threads: int,
) -> None:
    """The same in compiled code, a row at a time: no product spans rows, so any split gives the same bits."""
    pattern = n_of_m or (0, 0)
    values, flags, factor = weights.numpy(), keep.numpy(), upper.contiguous().numpy()
    for_row_chunks(
        lambda part: _solve_rows(values[part], flags[part], factor, start, pattern),
        len(weights),
        threads,
    )


@numba.njit(nogil=True, cache=True, error_model="numpy")
@no_type_check  # jaxtyping cannot look into compiled code
def _solve_rows(
    weights: np.ndarray,
    keep: np.ndarray,
    upper: np.ndarray,
    start: int,
    pattern: tuple[int, int],  # (0, 0): `keep` says what stays
) -> None:
    kept, group = pattern
    columns = keep.shape[1]
    stop = start + columns
    inner = upper[start:stop, start:stop].copy()  # near in memory
    errors = np.empty(columns, np.float32)  # of the removed weights, in order
    removed = np.empty(columns, np.int64)  # their columns
    scores = np.empty(group, np.float32)
    for row in range(weights.shape[0]):
        count = 0
        for i in range(columns):
            weight = weights[row, start:stop]
            if group > 0 and i % group == 0:
                for k in range(group):
                    scores[k] = (weight[i + k] / inner[i + k, i + k]) ** 2
                mark_kept(scores, group - kept, keep[row, i : i + group])
            if keep[row, i]:
                continue
            error = weight[i] / inner[i, i]
            errors[count], removed[count] = error, start + i
            count += 1
            first = i // VECTOR * VECTOR  # whole vectors; U is zero left of the diagonal
            target, factor = weight[first:], inner[i, first:]
            for k in range(len(target)):
                target[k] -= error * factor[k]
            weight[i] = 0
        _subtract(weights[row, stop:], errors[:count], removed[:count], upper)


@numba.njit(nogil=True, cache=True, error_model="numpy")
@no_type_check
def _subtract(
    target: np.ndarray, errors: np.ndarray, columns: np.ndarray, upper: np.ndarray
) -> None:
    """Last columns of a row -= sum of errors_i * upper[columns_i], four rows of `upper` at a time."""
    first = upper.shape[1] - len(target)
    fours = len(errors) // 4 * 4
    for i in range(0, fours, 4):
        e0, e1, e2, e3 = errors[i], errors[i + 1], errors[i + 2], errors[i + 3]
        u0, u1 = upper[columns[i], first:], upper[columns[i + 1], first:]
        u2, u3 = upper[columns[i + 2], first:], upper[columns[i + 3], first:]
        for k in range(len(target)):
            target[k] -= (e0 * u0[k] + e1 * u1[k]) + (e2 * u2[k] + e3 * u3[k])
    for i in range(fours, len(errors)):
        error, factor = errors[i], upper[columns[i], first:]
        for k in range(len(target)):
            target[k] -= error * factor[k]
