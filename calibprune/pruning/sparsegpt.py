"""SparseGPT: weights are removed column by column, and those still to come make up for it.

Frantar & Alistarh 2023 (arXiv 2301.00774), algorithm 1. Within a block the columns run in compiled code:
numba's on CPUs, Triton's on GPUs, or as tensor operations where there is neither. A row's result, given which of
its weights stay, does not depend on the rows beside it.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from calibprune.config.prune import SparseGPT
from calibprune.pruning.factor import inverse_factor
from calibprune.pruning.masks import (
    Target,
    check_width,
    keep_all_but_lowest_of_matrices,
    keep_all_but_lowest_of_rows,
    keep_n_of_m,
    mark_kept,
    on_threads,
    removed_of,
    runs_compiled,
)
from calibprune.pruning.rows import RowShares, row_chunk, row_slices
from calibprune.pruning.statistics import Statistics, full_float32

LARGEST_GROUP = (
    8  # of N:M, for which the GPU kernel is compiled in seconds: it has M^2 steps, each written out
)

LANES = 64  # rows that the compiled code solves side by side

# (weights so far, first column, last column + 1) -> which weights of these columns stay
ChooseKeep = Callable[[Float32[Tensor, "out in"], int, int], Bool[Tensor, "out columns"]]


@torch.no_grad()
def prune(
    weights: list[Float[Tensor, "_ in"]],
    statistics: Statistics,
    targets: list[Target],
    settings: SparseGPT,
    shares: RowShares | None = None,
) -> list[Float[Tensor, "_ in"]]:
    """Prunes linears that share one input, and updates what stays to keep their outputs.

    Unstructured: of every block of `blocksize` columns, the round(out * columns * sparsity) lowest scores over
    all rows of one linear go (the authors' code removes one more, and every tie), or the lowest of every row with
    `per_row`. N:M: the choice is made at each group's first column, from the weights updated so far, row by row.
    As the authors' code does, all weights of inputs that are always zero go too: a block or a group with more such
    weights than are to be removed loses more than was asked.
    Needs `gram`. `shares`: `weights` are only this worker's rows, as it says; collective. Raises
    NotPositiveDefinite, and ValueError if width or blocksize do not fit the pattern.
    """
    if statistics.gram is None:
        raise ValueError("SparseGPT needs the Gram matrix of the inputs")
    for target in targets:
        if target.n_of_m:
            check_width(weights[0].shape[1], target.n_of_m[1])
            check_width(settings.blocksize, target.n_of_m[1])
    shares = shares or RowShares.of(weights)
    upper = inverse_factor(statistics.gram, settings.damping, shares.gang)
    stacked = torch.cat([weight.to(torch.float32) for weight in weights])
    stacked[:, statistics.gram.diagonal() == 0] = 0
    rows = [len(weight) for weight in weights]

    def lowest_scores(
        current: Float32[Tensor, "out in"], start: int, stop: int
    ) -> Bool[Tensor, "out columns"]:
        scores = (current[:, start:stop] / upper.diagonal()[start:stop]).square()
        if settings.per_row:
            keep = []
            for part, target in zip(scores.split(rows), targets, strict=True):
                before, after = (removed_of(edge, target.sparsity) for edge in (start, stop))
                keep.append(keep_all_but_lowest_of_rows(part, after - before))
            return torch.cat(keep)
        removed = [
            round(count * (stop - start) * target.sparsity)
            for count, target in zip(shares.rows, targets, strict=True)
        ]
        parts = scores.split(rows)
        return torch.cat(keep_all_but_lowest_of_matrices(parts, removed, shares.gang))

    patterns = [target.n_of_m for target in targets if target.n_of_m]
    if len(set(patterns)) > 1:  # of each linear its own
        solved = [
            solve(part, upper, settings.blocksize, pattern, chunk=shares.chunk)
            for part, pattern in zip(stacked.split(rows), patterns, strict=True)
        ]
    else:
        chosen = patterns[0] if patterns else lowest_scores
        solved = solve(stacked, upper, settings.blocksize, chosen, rows, shares.chunk).split(rows)
    return [part.to(weight.dtype, copy=True) for part, weight in zip(solved, weights, strict=True)]


def solve(
    weights: Float32[Tensor, "out in"],
    upper: Float32[Tensor, "in in"],
    blocksize: int,
    chosen: tuple[int, int] | ChooseKeep,
    rows: list[int] | None = None,
    chunk: int | None = None,
) -> Float32[Tensor, "out in"]:
    """Runs the columns from left to right; returns new weights with exact zeros where they were removed.

    `upper` is `inverse_factor`'s; `chosen` an N:M pattern or what chooses a block's weights before its first
    column; `rows` the rows of each of the stacked linears, which are updated `chunk` at a time.
    arXiv 2301.00774, algorithm 1.
    """
    weights = weights.clone(memory_format=torch.contiguous_format)
    width = weights.shape[1]
    # the same cuts whoever solves the rows: no product's shape depends on it
    parts = row_slices(rows or [len(weights)], chunk or row_chunk(weights.device, len(weights)))
    with full_float32():  # out here: the threads share the setting
        for start in range(0, width, blocksize):
            stop = min(start + blocksize, width)
            if isinstance(chosen, tuple):
                keep, n_of_m = torch.ones_like(weights[:, start:stop], dtype=torch.bool), chosen
            else:
                keep, n_of_m = chosen(weights, start, stop).contiguous(), None
            if runs_compiled(weights.device):
                on_threads(partial(_solve_part, weights, keep, upper, start, n_of_m), parts)
                continue
            errors = _block_solver(weights.device, n_of_m)(weights, keep, upper, start, n_of_m)
            for part in parts:
                _pass_on_errors(weights[part, stop:], errors[part], upper[start:stop, stop:])
    return weights


def _block_solver(device: torch.device, n_of_m: tuple[int, int] | None) -> Callable[..., Tensor]:
    """One kernel for a whole block where Triton is at hand and groups are small, else an operation at a time."""
    small = n_of_m is None or n_of_m[1] <= LARGEST_GROUP
    if device.type == "cuda" and small and importlib.util.find_spec("triton"):
        from calibprune.pruning.sparsegpt_triton import solve_block

        return solve_block
    return _solve_block_tensors


def _solve_part(
    weights: Float32[Tensor, "out in"],
    keep: Bool[Tensor, "out columns"],
    upper: Float32[Tensor, "in in"],
    start: int,
    n_of_m: tuple[int, int] | None,
    rows: slice,
) -> None:
    """Solves some rows of one block, in compiled code, and updates the columns after it, in place."""
    stop = start + keep.shape[1]
    errors = torch.zeros(rows.stop - rows.start, stop - start)
    _solve_rows(
        weights[rows].numpy(), keep[rows].numpy(), errors.numpy(), upper.numpy(), start, n_of_m or (0, 0)
    )  # fmt: skip
    _pass_on_errors(weights[rows, stop:], errors, upper[start:stop, stop:])


def _pass_on_errors(
    tail: Float32[Tensor, "out tail"],
    errors: Float32[Tensor, "out columns"],
    upper: Float32[Tensor, "columns tail"],
) -> None:
    """tail -= errors @ upper. On CPUs through memory of its own: last bits may depend on where a product lies."""
    if tail.device.type == "cpu":
        tail -= torch.mm(errors.contiguous(), upper)
    else:
        tail.addmm_(errors, upper, alpha=-1)


def _solve_block_tensors(
    weights: Float32[Tensor, "out in"],
    keep: Bool[Tensor, "out columns"],
    upper: Float32[Tensor, "in in"],
    start: int,
    n_of_m: tuple[int, int] | None,
) -> Float32[Tensor, "out columns"]:
    """Solves one block of all rows in place, column by column; returns the errors that the columns after it take on."""
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
    return errors.T.contiguous()


@numba.njit(nogil=True, cache=True, error_model="numpy")
@no_type_check  # jaxtyping cannot look into compiled code
def _solve_rows(
    weights: np.ndarray,
    keep: np.ndarray,
    errors: np.ndarray,
    upper: np.ndarray,
    start: int,
    pattern: tuple[int, int],  # (0, 0): `keep` says what stays
) -> None:
    """The same in compiled code. Every operation is on one row's own values, whatever rows stand beside it."""
    kept, group = pattern
    columns = keep.shape[1]
    inner = upper[start : start + columns, start : start + columns].copy()  # near in memory
    # transposed: the loop over rows is the vectorised one
    block = np.empty((columns, LANES), np.float32)
    error = np.empty(LANES, np.float32)
    scores = np.empty(group, np.float32)
    for first in range(0, weights.shape[0], LANES):
        lanes = min(LANES, weights.shape[0] - first)
        for i in range(columns):
            for row in range(lanes):
                block[i, row] = weights[first + row, start + i]
        for i in range(columns):
            if group > 0 and i % group == 0:
                for row in range(lanes):
                    for k in range(group):
                        scores[k] = (block[i + k, row] / inner[i + k, i + k]) ** 2
                    mark_kept(scores, group - kept, keep[first + row, i : i + group])
            pivot = inner[i, i]
            for row in range(lanes):
                removed = not keep[first + row, i]
                error[row] = block[i, row] / pivot if removed else np.float32(0)
                errors[first + row, i] = error[row]
            for j in range(i + 1, columns):
                factor = inner[i, j]
                for row in range(LANES):
                    block[j, row] -= error[row] * factor
        for row in range(lanes):
            for i in range(columns):
                if keep[first + row, i]:
                    weights[first + row, start + i] = block[i, row]
                else:
                    weights[first + row, start + i] = 0
