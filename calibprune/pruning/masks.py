"""Which weights stay: boolean keep masks from scores, with exact counts whatever the ties.

Where scores are equal the lowest column is removed first. Scores are finite and compared in float32.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from calibprune.gang import ALONE, Gang

GROUPS_AT_ONCE = 1 << 16
ROWS_AT_ONCE = 64


def keep_lowest_removed(scores: Float[Tensor, "out in"], sparsity: float) -> Bool[Tensor, "out in"]:
    """Removes the lowest int(in * sparsity) scores of every row."""
    removed = int(scores.shape[1] * sparsity)
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


def keep_all_but_lowest(
    scores: Sequence[Float[Tensor, "_ in"]], removed: Sequence[int], gang: Gang = ALONE
) -> list[Bool[Tensor, "_ in"]]:
    """Removes exactly so many of each matrix's scores, the lowest; equal ones by column, then by row.

    A gang's workers hold the matrices' rows in order of rank, each as many as it likes, and each gets its rows'
    answer; `removed` counts whole matrices. Collective.
    """
    scores = [part.detach().to(torch.float32).contiguous() for part in scores]
    if gang.size == 1:
        for part, count in zip(scores, removed, strict=True):
            if not 0 <= count <= part.numel():
                raise ValueError(f"cannot remove {count} of {part.numel()} weights")
        thresholds = [
            _nth_lowest(part.view(1, -1), count)[0] if count else part.new_tensor(-math.inf)
            for part, count in zip(scores, removed, strict=True)
        ]
    else:
        thresholds = _nth_lowest_in_gang(scores, removed, gang)
    keeps = [part > threshold for part, threshold in zip(scores, thresholds, strict=True)]
    gone = torch.stack([(~keep).sum() for keep in keeps])
    surplus = (gang.add(gone).cpu() - torch.tensor(removed)).tolist()
    return [
        keep | _last_ties(part == threshold, too_many, gang) if too_many else keep
        for keep, part, threshold, too_many in zip(keeps, scores, thresholds, surplus, strict=True)
    ]


def _last_ties(
    tied: Bool[Tensor, "rows columns"], count: int, gang: Gang
) -> Bool[Tensor, "rows columns"]:
    """Of a matrix's marked entries the last `count`, by column, then by row."""
    of_rank = torch.zeros(gang.size, tied.shape[1], dtype=torch.int64, device=tied.device)
    of_rank[gang.rank] = tied.sum(0)
    in_column = gang.add(of_rank).sum(0)
    before = in_column.cumsum(0) - in_column + of_rank[: gang.rank].sum(0)
    return tied & (tied.cumsum(0) + before > in_column.sum() - count)


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
        row_slices(len(grouped), GROUPS_AT_ONCE),
    )
    return keep


def check_width(width: int, group: int) -> None:
    """Raises ValueError if rows of this many inputs cannot be cut into groups."""
    if width % group:
        raise ValueError(
            f"an N:{group} pattern needs rows of a multiple of {group} inputs, not {width}"
        )


def on_threads(work: Callable[[slice], None], parts: Sequence[slice]) -> None:
    """Runs `work`, code that leaves the GIL alone, on slices of the rows, on as many threads as torch has.

    Torch itself keeps to the calling thread meanwhile: after every operation its own threads spin for a while,
    waiting for the next, and would take the cores from the work.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) < 2:
        for part in parts:
            work(part)
        return
    torch.set_num_threads(1)
    try:
        for _ in _pool(threads).map(work, parts):
            pass
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def row_slices(rows: int, most: int) -> list[slice]:
    """Slices of at most so many rows."""
    return [slice(start, min(start + most, rows)) for start in range(0, rows, most)]


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
    lower = torch.zeros(grouped.shape, dtype=torch.uint8, device=scores.device)
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

        on_threads(select, row_slices(len(values), ROWS_AT_ONCE))
        return torch.from_numpy(lowest)
    if scores.shape[0] == 1:  # a GPU selects within one row on a single block
        return scores.sort(dim=1).values[:, n - 1]
    return scores.kthvalue(n, dim=1).values


DIGITS = ((21, 11), (10, 11), (0, 10))  # (lowest bit, bits) of a float32 in turn, the highest first


def _nth_lowest_in_gang(
    scores: Sequence[Float32[Tensor, "_ columns"]], nth: Sequence[int], gang: Gang
) -> list[Float32[Tensor, ""]]:
    """Each matrix's n-th lowest score, counted from 1, over the rows of all workers; -inf for n = 0.

    Floats sort like integers once negative ones are turned round: their digits are counted over all workers, from
    the highest down, each time among the scores that share the digits found so far.
    """
    keys = [part.view(torch.int32) for part in scores]
    prefix, rest = [-1] * len(keys), list(nth)
    for low, bits in DIGITS:
        counts = torch.stack(
            [_count_digits(k, p, low, bits) for k, p in zip(keys, prefix, strict=True)]
        )
        sums = gang.add(counts.to(scores[0].device)).cpu().cumsum(1)
        for index, n in enumerate(rest):
            digit = int(torch.searchsorted(sums[index], n))
            if n and digit == sums.shape[1]:
                raise ValueError(f"cannot remove {nth[index]} weights: there are not so many")
            rest[index] = n - (int(sums[index, digit - 1]) if digit and n else 0)
            prefix[index] = digit if low == DIGITS[0][0] else prefix[index] << bits | digit
    offset = 1 << 31
    found = [(key - offset) ^ (0x7FFFFFFF if key < offset else 0) for key in prefix]
    values = torch.tensor(found, dtype=torch.int32).view(torch.float32).to(scores[0].device)
    return [
        value if n else value.new_tensor(-math.inf) for value, n in zip(values, nth, strict=True)
    ]


def _count_digits(bits: Tensor, prefix: int, low: int, width: int) -> Tensor:
    """How many keys have each value in bits [low, low + width), of those whose higher bits are `prefix`."""
    if bits.device.type == "cpu":
        counts = np.zeros(1 << width, np.int64)
        _count_digits_compiled(bits.numpy().ravel(), prefix, low, width, counts)
        return torch.from_numpy(counts)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).flatten().long() + (1 << 31)
    if prefix >= 0:
        keys = keys[keys >> (low + width) == prefix]
    return torch.bincount((keys >> low) & ((1 << width) - 1), minlength=1 << width)


@numba.njit(nogil=True, cache=True)
@no_type_check
def _count_digits_compiled(
    bits: np.ndarray, prefix: int, low: int, width: int, counts: np.ndarray
) -> None:
    mask = (1 << width) - 1
    for value in bits:
        key = np.int64(value ^ ((value >> np.int32(31)) & np.int32(0x7FFFFFFF))) + 2147483648
        if prefix < 0 or key >> (low + width) == prefix:
            counts[(key >> low) & mask] += 1
