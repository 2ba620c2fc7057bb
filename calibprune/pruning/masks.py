"""Which weights stay: boolean keep masks from scores, with exact counts whatever the ties.

Where scores are equal the lowest column is removed first. Scores are finite and compared in float32.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from calibprune.pruning.rows import RowShares, row_slices

GROUPS_AT_ONCE = 1 << 16
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Target:
    """What to remove from one linear: a fraction of its weights or, where it is given, all but N of every M."""

    sparsity: float
    n_of_m: tuple[int, int] | None = None
    """(kept, group)."""
    path: str = ""
    """Of the linear, inside its layer."""


def keep_in_rows(scores: Float[Tensor, "out in"], target: Target) -> Bool[Tensor, "out in"]:
    """Removes the lowest scores of every row, or of every N:M group."""
    if target.n_of_m:
        return keep_n_of_m(scores, *target.n_of_m)
    return keep_all_but_lowest_of_rows(scores, removed_of(scores.shape[1], target.sparsity))


def keep_in_matrices(
    scores: Sequence[Float[Tensor, "_ in"]],
    targets: Sequence[Target],
    shares: RowShares,
    per_row: bool = False,
) -> list[Bool[Tensor, "_ in"]]:
    """Removes the lowest scores of every whole matrix, of every row with `per_row`, or of every N:M group.

    `scores` are this worker's rows of the matrices, and so is what is returned. Collective.
    """
    if per_row or all(target.n_of_m for target in targets):
        return [keep_in_rows(part, target) for part, target in zip(scores, targets, strict=True)]
    whole = shares.gather(torch.cat(list(scores)).to(torch.float32)).split(shares.rows)
    return shares.mine(
        [
            keep_in_rows(part, target)
            if target.n_of_m
            else keep_all_but_lowest(part, removed_of(part.numel(), target.sparsity))
            for part, target in zip(whole, targets, strict=True)
        ]
    )


def removed_of(weights: int, sparsity: float) -> int:
    """How many of so many weights go: the whole part, whichever way the fraction was rounded."""
    return int(weights * sparsity + 1e-6)


def keep_all_but_lowest_of_rows(
    scores: Float[Tensor, "out in"], removed: int
) -> Bool[Tensor, "out in"]:
    """Removes exactly `removed` of every row's scores, the lowest."""
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    scores = scores.detach().to(torch.float32)
    threshold = _nth_lowest(scores, removed)[:, None]
    keep = scores > threshold
    rows = (keep.sum(1) != scores.shape[1] - removed).nonzero().squeeze(1)
    if len(rows):
        tied = scores[rows] == threshold[rows]
        below = (scores[rows] < threshold[rows]).sum(1, keepdim=True)
        keep[rows] |= tied & (tied.cumsum(1) > removed - below)
    return keep


def keep_all_but_lowest(scores: Float[Tensor, "out in"], removed: int) -> Bool[Tensor, "out in"]:
    """Removes exactly `removed` of the matrix's scores, the lowest; equal ones by column, then by row."""
    if not 0 <= removed <= scores.numel():
        raise ValueError(f"cannot remove {removed} of {scores.numel()} weights")
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    scores = scores.detach().to(torch.float32)
    threshold = _nth_lowest(scores.reshape(1, -1), removed)
    keep = scores > threshold
    surplus = removed - int((~keep).sum())
    if surplus == 0:
        return keep
    tied = scores == threshold
    kept_ties_from = tied.sum(0).cumsum(0)  # ties in this column and those before it
    removed_ties = int(kept_ties_from[-1]) + surplus
    column = int(torch.searchsorted(kept_ties_from, removed_ties))
    keep[:, column + 1 :] |= tied[:, column + 1 :]
    before = int(kept_ties_from[column - 1]) if column else 0
    keep[:, column] |= tied[:, column] & (tied[:, column].cumsum(0) > removed_ties - before)
    return keep


def keep_n_of_m(scores: Float[Tensor, "out in"], kept: int, group: int) -> Bool[Tensor, "out in"]:
    """Keeps the `kept` highest scores of every `group` consecutive columns.

    Raises ValueError if the width is no multiple of `group`.
    """
    check_width(scores.shape[1], group)
    scores = scores.detach().to(torch.float32).contiguous()
    if scores.device.type != "cpu":
        return _keep_n_of_m_torch(scores, kept, group)
    keep = torch.empty(scores.shape, dtype=torch.bool)
    grouped, flags = scores.view(-1, group).numpy(), keep.view(-1, group).numpy()
    on_threads(
        lambda rows: _keep_groups(grouped[rows], group - kept, flags[rows]),
        row_slices([len(grouped)], GROUPS_AT_ONCE),
    )
    return keep


def check_width(width: int, group: int) -> None:
    """Raises ValueError if rows of this many inputs cannot be cut into groups."""
    if width % group:
        raise ValueError(
            f"an N:{group} pattern needs rows of a multiple of {group} inputs, not {width}"
        )


def runs_compiled(device: torch.device) -> bool:
    """Whether rows are worked on by compiled loops rather than by tensor operations."""
    return device.type == "cpu"


def on_threads(work: Callable[[slice], None], parts: Sequence[slice]) -> None:
    """Runs `work`, code that leaves the GIL alone, on slices of the rows, on as many threads as torch has.

    Torch itself keeps to one thread meanwhile, for a single slice too: after every operation its own threads spin for
    a while, waiting for the next, and would take the cores from the work; and on some processors the last bits of a
    product of few rows depend on how many there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1 or len(parts) < 2:
            for part in parts:
                work(part)
        else:
            for _ in _pool(threads).map(work, parts):
                pass
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


@numba.njit(nogil=True, cache=True)
@no_type_check  # jaxtyping cannot look into compiled code
def mark_kept(scores: np.ndarray, removed: int, keep: np.ndarray) -> None:
    """Writes into `keep` which scores of one group stay: all but the `removed` lowest, in compiled code."""
    for i in range(scores.shape[0]):
        lower = 0
        for j in range(scores.shape[0]):
            lower += scores[j] < scores[i] or (scores[j] == scores[i] and j < i)
        keep[i] = lower >= removed


@numba.njit(nogil=True, cache=True)
@no_type_check
def _keep_groups(scores: np.ndarray, removed: int, keep: np.ndarray) -> None:
    for row in range(scores.shape[0]):
        mark_kept(scores[row], removed, keep[row])


def _keep_n_of_m_torch(
    scores: Float32[Tensor, "out in"], kept: int, group: int
) -> Bool[Tensor, "out in"]:
    grouped = scores.unflatten(1, (-1, group))
    columns = torch.arange(group, device=scores.device)
    lower = torch.zeros(grouped.shape, dtype=torch.int16, device=scores.device)
    for j in range(group):
        other = grouped[..., j, None]
        lower += (other < grouped) | ((other == grouped) & (columns > j))
    return (lower >= group - kept).flatten(1)


def _nth_lowest(scores: Float32[Tensor, "rows width"], n: int) -> Float32[Tensor, " rows"]:
    """Every row's n-th lowest score, counted from 1."""
    if scores.device.type == "cpu":  # far faster than torch.sort, topk or kthvalue
        values, lowest = scores.numpy(), np.empty(len(scores), np.float32)

        def select(rows: slice) -> None:
            lowest[rows] = np.partition(values[rows], n - 1, axis=1)[:, n - 1]

        on_threads(select, row_slices([len(values)], ROWS_AT_ONCE))
        return torch.from_numpy(lowest)
    if scores.shape[0] == 1:  # a GPU selects within one row on a single block
        return scores.sort(dim=1).values[:, n - 1]
    return scores.kthvalue(n, dim=1).values
