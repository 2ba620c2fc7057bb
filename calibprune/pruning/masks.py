"""Which weights stay: boolean keep masks from scores, with exact counts whatever the ties.

Where scores are equal the lowest column is removed first. Scores are at least 0, finite and compared in float32.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor

from calibprune.gang import ALONE, Gang
from calibprune.pruning.rows import RowShares, row_slices

GROUPS_AT_ONCE = 1 << 16
ROWS_AT_ONCE = 64

DIGITS = ((20, 11), (10, 10), (0, 10))
"""The lowest bit and the number of bits of each digit of a score, the highest first. Numbers from 0 on are in the same
order as their bits, of which float32 has 31 beside the sign."""
SCORES_AT_ONCE = 1 << 18
GPU_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Target:
    """What to remove from one linear: a fraction of its weights or, where it is given, all but N of every M."""

    sparsity: float
    n_of_m: tuple[int, int] | None = None
    """(kept, group)."""
    path: str = ""
    """Path of the linear inside its layer."""


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
    compared = [number for number, target in enumerate(targets) if not target.n_of_m]
    removed = [
        removed_of(shares.rows[number] * scores[number].shape[1], targets[number].sparsity)
        for number in compared
    ]
    keeps = keep_all_but_lowest_of_matrices([scores[n] for n in compared], removed, shares.gang)
    of_number = dict(zip(compared, keeps, strict=True))
    return [
        of_number[number] if number in of_number else keep_in_rows(part, target)
        for number, (part, target) in enumerate(zip(scores, targets, strict=True))
    ]


def zeroed(
    weight: Float[Tensor, "out in"], keep: Bool[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """Returns the weights that stay, and zeros: several times as fast as torch's masked_fill on CPUs."""
    bits = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize])
    return (bits * keep).view(weight.dtype)


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
    (keep,) = keep_all_but_lowest_of_matrices([scores], [removed])
    return keep


def keep_all_but_lowest_of_matrices(
    scores: Sequence[Float[Tensor, "_ in"]], removed: Sequence[int], gang: Gang = ALONE
) -> list[Bool[Tensor, "_ in"]]:
    """Does the same with matrices of which every worker has some rows, in order of rank. Collective.

    Neither sorts nor gathers scores: the highest score that goes is found digit by digit, from how many scores of all
    workers have each digit. Raises ValueError for more scores to remove than there are.
    """
    parts = [part.detach().to(torch.float32).contiguous().view(torch.int32) for part in scores]
    device = parts[0].device
    found = torch.zeros(len(parts), dtype=torch.int64, device=device)  # the digits, put together
    left = torch.tensor(removed, device=device)
    for number, (lowest_bit, bits) in enumerate(DIGITS):
        counts = gang.add(_digits(parts, found, lowest_bit, bits))
        if number == 0:
            for size, count in zip(counts.sum(1).tolist(), removed, strict=True):
                if not 0 <= count <= size:
                    raise ValueError(f"cannot remove {count} of {size} weights")
        up_to = counts.cumsum(1)
        digit = torch.searchsorted(up_to, left[:, None])
        left = left - torch.where(digit > 0, up_to.gather(1, (digit - 1).clamp(min=0)), 0)[:, 0]
        found = (found << bits) + digit[:, 0]
    keeps = [part > int(highest) for part, highest in zip(parts, found.tolist(), strict=True)]
    equal = counts.gather(1, digit)[:, 0]
    split = (left != equal).nonzero()[:, 0].tolist()  # of whose equal scores some stay
    if split:
        tied = [parts[number] == int(found[number]) for number in split]
        for number, stays in zip(split, _all_but_first(tied, left[split], gang), strict=True):
            keeps[number] |= stays
    return keeps


def _all_but_first(
    marked: list[Bool[Tensor, "_ in"]], removed: Int64[Tensor, " matrices"], gang: Gang
) -> list[Bool[Tensor, "_ in"]]:
    """What is marked in each matrix without the first `removed`, counted by column, then by row. Collective."""
    mine = torch.stack([matrix.sum(0) for matrix in marked])
    up_to = gang.add(mine.clone()).cumsum(1)
    column = torch.searchsorted(up_to, removed[:, None])  # where the last one removed is
    inside = removed - torch.where(column > 0, up_to.gather(1, (column - 1).clamp(min=0)), 0)[:, 0]
    of_ranks = torch.zeros(len(marked), gang.size, dtype=torch.int64, device=mine.device)
    of_ranks[:, gang.rank] = mine.gather(1, column)[:, 0]
    inside -= gang.add(of_ranks)[:, : gang.rank].sum(1)
    stays = []
    for matrix, place, first in zip(marked, column[:, 0].tolist(), inside.tolist(), strict=True):
        kept = matrix.clone()
        kept[:, :place] = False
        kept[:, place] &= matrix[:, place].cumsum(0) > first
        stays.append(kept)
    return stays


def _digits(
    parts: Sequence[Int32[Tensor, "_ in"]],
    found: Int64[Tensor, " matrices"],
    lowest_bit: int,
    bits: int,
) -> Int64[Tensor, "matrices digits"]:
    """Counts how often each digit follows those found in the scores of each matrix."""
    if not runs_compiled(parts[0].device):
        return _digits_torch(parts, found, lowest_bit, bits)
    counts = torch.zeros(len(parts), 1 << bits, dtype=torch.int64)
    for number, (part, before) in enumerate(zip(parts, found.tolist(), strict=True)):
        scores = part.view(-1).numpy()
        pieces = row_slices([len(scores)], SCORES_AT_ONCE)
        of_pieces = np.zeros((len(pieces), 1 << bits), np.int64)

        def count(some: slice, scores=scores, before=before, of_pieces=of_pieces) -> None:
            _count_digits(
                scores[some], before, lowest_bit, bits, of_pieces[some.start // SCORES_AT_ONCE]
            )

        on_threads(count, pieces)
        counts[number] = torch.from_numpy(of_pieces.sum(0))
    return counts


def _digits_torch(
    parts: Sequence[Int32[Tensor, "_ in"]],
    found: Int64[Tensor, " matrices"],
    lowest_bit: int,
    bits: int,
) -> Int64[Tensor, "matrices digits"]:
    """Does the same with a few operations for as many matrices as fit."""
    digits, width = 1 << bits, parts[0].shape[1]
    counts = torch.zeros(len(parts) * (digits + 1), dtype=torch.int64, device=parts[0].device)
    most = max(1, GPU_SCORES_AT_ONCE // width)
    for start in range(0, max(map(len, parts)), most):
        of_rows = [part[start : start + most] for part in parts]
        rows = torch.cat(of_rows)
        lengths = torch.tensor([len(some) for some in of_rows], device=rows.device)
        number = torch.repeat_interleave(lengths, output_size=len(rows))[:, None]
        follows = (rows >> (lowest_bit + bits)) == found[number]
        digit = torch.where(follows, (rows >> lowest_bit) & (digits - 1), digits)
        place = (digit + number * (digits + 1)).view(-1)
        counts += torch.bincount(place, minlength=len(counts))
    return counts.view(len(parts), digits + 1)[:, :digits].contiguous()


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


@numba.njit(nogil=True, cache=True)
@no_type_check
def _count_digits(
    scores: np.ndarray, found: int, lowest_bit: int, bits: int, counts: np.ndarray
) -> None:
    for score in scores:
        if score >> (lowest_bit + bits) == found:
            counts[(score >> lowest_bit) & ((1 << bits) - 1)] += 1


def _nth_lowest(scores: Float32[Tensor, "rows width"], n: int) -> Float32[Tensor, " rows"]:
    """Every row's n-th lowest score, counted from 1."""
    if scores.device.type == "cpu":  # far faster than torch.sort, topk or kthvalue
        values, lowest = scores.numpy(), np.empty(len(scores), np.float32)

        def select(rows: slice) -> None:
            lowest[rows] = np.partition(values[rows], n - 1, axis=1)[:, n - 1]

        on_threads(select, row_slices([len(values)], ROWS_AT_ONCE))
        return torch.from_numpy(lowest)
    return scores.kthvalue(n, dim=1).values
