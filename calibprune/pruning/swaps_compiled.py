"""Exchanges of swaps in compiled code for CPUs: the same as by tensor operations, with less weighing.

All pairs are weighed once. Later a kept weight is weighed anew only where it might have come to improve: its best
return of before, less the most by which any return has changed since, bounds its best return now from below.
"""

from typing import no_type_check

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

NEVER = np.float32(3e38)
UNKNOWN = np.float32(-1e18)
"""A score that is lower than any, and whose square is a number."""
LEVELS = 16
"""Values that weights are bounded with, in fours."""
ROOT = np.float32(2**-0.5)
"""From one to the next."""

# No sum is reordered, and a minimum has no order: the compiler may vectorise, and results stay what they are.
_compiled = numba.njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "ninf", "nsz", "contract"}
)


@intrinsic
def _min(typing, left, right):
    """Returns the lower of two float32 numbers; a loop that keeps the lowest so far is vectorised, as no other is."""

    def emit(context, builder, signature, values):
        number = values[0].type
        lower = builder.module.declare_intrinsic(
            "llvm.minnum", [number], ir.FunctionType(number, [number, number])
        )
        return builder.call(lower, values, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), emit


@_compiled
@no_type_check  # jaxtyping cannot look into compiled code
def exchange_rows(w, v, c, gram, diagonal, reach, least, group, max_swaps, updates):
    """Exchanges weights of rows `v` and keeps their slopes `c` up to date, both in place.

    The arguments are arrays of `swaps.Rows`, float32. What becomes of a row does not depend on the rows beside it.
    """
    squares = np.diag(gram).copy()  # near in memory
    for row in range(len(w)):
        _exchange_row(
            w[row], v[row], c[row], gram, squares, diagonal, reach, least[row], group, max_swaps, updates
        )  # fmt: skip


@_compiled
@no_type_check
def _exchange_row(w, v, c, gram, squares, diagonal, reach, least, group, max_swaps, updates):
    width, left = len(w), max_swaps
    offset, factor = np.empty(width, np.float32), np.empty(width, np.float32)
    lowest, level = np.full(width, UNKNOWN), np.empty(width, np.int64)
    scores, doubtful = np.empty(width, np.float32), np.empty(width, np.int64)
    gone = np.empty(max_swaps, np.int64)
    for j in range(width):
        _set_return(w, v, diagonal, offset, factor, j, updates)
        level[j] = _level(v[j], reach[j])
    while True:
        count = _find_doubtful(
            v, c, squares, offset, factor, lowest, level, least, doubtful, group, updates
        )
        _weigh(v, c, gram, offset, factor, lowest, doubtful[:count], group, updates)
        weighed, made = c.copy(), 0
        order = _in_order(v, c, squares, lowest, least, doubtful[:count], updates)
        for p in order[:max_swaps]:
            value, start = v[p], p - p % group
            back = _scores(value, gram[p], c, offset, factor, scores, start, start + group, updates)
            if not _taken(v, c, squares, p) + _back(back, updates) < -least:
                continue
            if updates and back == 0:
                continue
            r = start
            while scores[r] != back:
                r += 1
            x = (c[r] + value * gram[p, r]) / diagonal[r] if updates else w[r]
            if x == 0:
                continue
            removed, returned = gram[p], gram[r]
            for j in range(width):
                c[j] += value * removed[j] - x * returned[j]
            v[p], v[r] = 0, x
            _set_return(w, v, diagonal, offset, factor, p, updates)
            _set_return(w, v, diagonal, offset, factor, r, updates)
            lowest[r], level[r], gone[made] = UNKNOWN, _level(x, reach[r]), p
            made += 1
            if made == left:
                return
        if made == 0:
            return
        left -= made
        if group < width:
            lowest[:] = UNKNOWN  # pairs are few: all are weighed anew
        else:
            _lower_bounds(v, c, weighed, gram, offset, factor, lowest, gone[:made], updates)


@_compiled
@no_type_check
def _find_doubtful(v, c, squares, offset, factor, lowest, level, least, doubtful, group, updates):
    """Writes into `doubtful` the kept weights that an exchange may improve, by bounds; returns how many.

    The first bound is `lowest`; the second is what the returns could come to if all inputs were as like p as that
    which is most like it: |v_p G_pr| <= |v_p| reach_p sqrt(G_rr), with 2^(level / 2) for |v_p| reach_p.
    """
    width, count = len(v), 0
    changes = np.empty(width, np.float32)
    for p in range(width):
        changes[p] = _taken(v, c, squares, p) + _back(lowest[p], updates)
    for p in range(width):
        doubtful[count] = p
        count += (v[p] != 0) & (changes[p] < -least)
    if group < width or count < LEVELS:
        return count
    base, steep = np.empty(width, np.float32), np.empty(width, np.float32)
    for j in range(width):
        score = offset[j] + factor[j] * c[j]
        base[j] = -abs(score) if updates else score
        steep[j] = abs(factor[j]) * np.sqrt(squares[j])
    highest = level[doubtful[:count]].max()
    bounds = np.empty(LEVELS, np.float32)
    for first in range(0, LEVELS, 4):
        size = np.float32(1.001 * 2 ** (0.5 * (highest - first)))  # for rounding
        s0, s1, s2, s3 = size, size * ROOT, size * ROOT * ROOT, size * ROOT * ROOT * ROOT
        m0 = m1 = m2 = m3 = NEVER
        for j in range(width):
            start, slope = base[j], steep[j]
            m0, m1 = _min(m0, start - slope * s0), _min(m1, start - slope * s1)
            m2, m3 = _min(m2, start - slope * s2), _min(m3, start - slope * s3)
        bounds[first], bounds[first + 1], bounds[first + 2], bounds[first + 3] = m0, m1, m2, m3
    some, count = doubtful[:count], 0
    for p in some:
        lowest[p] = max(lowest[p], bounds[min(highest - level[p], LEVELS - 1)])
        doubtful[count] = p
        count += _taken(v, c, squares, p) + _back(lowest[p], updates) < -least
    return count


@_compiled
@no_type_check
def _in_order(v, c, squares, lowest, least, doubtful, updates):
    """Returns those whose best exchange lowers the error, the best first; of equal ones, the first."""
    keys, count = np.empty(len(doubtful), np.int64), 0
    change = np.empty(1, np.float32)
    bits = change.view(
        np.int32
    )  # in the order of the numbers reversed, as long as these are negative
    for p in doubtful:
        change[0] = _taken(v, c, squares, p) + _back(lowest[p], updates)
        keys[count] = (-np.int64(bits[0]) << 32) + p
        count += change[0] < -least
    return np.sort(keys[:count]) & 0xFFFFFFFF


@_compiled
@no_type_check
def _lower_bounds(v, c, weighed, gram, offset, factor, lowest, gone, updates):
    """Lowers `lowest` by what any score may have fallen since the slope was `weighed`; weights that are `gone` since
    can return too."""
    weighed[gone] = c[gone]  # their scores are new
    most = np.float32(0)
    for r in range(len(c)):  # factors of the kept are 0
        change = factor[r] * (c[r] - weighed[r])
        most = _min(most, -abs(change) if updates else change)
    for p in range(len(c)):
        lowest[p] += most
    for r in gone:
        if v[r] == 0:
            returned, slope, plus, times = gram[r], c[r], offset[r], factor[r]
            for p in range(len(c)):
                score = plus + times * (slope + v[p] * returned[p])
                lowest[p] = _min(lowest[p], -abs(score) if updates else score)


@_compiled
@no_type_check
def _level(value, reach):
    """Returns twice the logarithm of |value| reach to the base of 2, rounded up."""
    size = abs(value) * reach
    return np.int64(np.ceil(2 * np.log2(size))) if size > 0 else -300


@_compiled
@no_type_check
def _set_return(w, v, diagonal, offset, factor, r, updates):
    """Sets what the return of weight r comes to once p is gone, by its pull c_r + v_p G_pr.

    The score is offset_r + factor_r * pull: the change of the error or, where the method updates weights, the root of
    what the error falls by, with whatever sign.
    """
    if v[r] != 0:
        offset[r], factor[r] = np.float32(0) if updates else NEVER, 0
    elif updates:
        offset[r], factor[r] = 0, 1 / np.sqrt(diagonal[r])
    else:
        offset[r], factor[r] = w[r] * w[r] * diagonal[r], -2 * w[r]


@_compiled
@no_type_check
def _taken(v, c, squares, p):
    """Returns the change of the error when weight p is taken away."""
    return 2 * v[p] * c[p] + v[p] * v[p] * squares[p]


@_compiled
@no_type_check
def _back(lowest, updates):
    """Returns the change of the error by the return with the lowest score."""
    return -lowest * lowest if updates else lowest


@_compiled
@no_type_check
def _weigh(v, c, gram, offset, factor, lowest, picked, group, updates):
    """Writes into `lowest` the lowest score of all returns for each of the `picked` weights, four at a time."""
    for first in range(0, len(picked), 4):
        some = picked[first : first + 4]
        if len(some) < 4 or group < len(v):
            for p in some:
                start = p - p % group
                lowest[p] = _lowest(v[p], gram[p], c, offset, factor, start, start + group, updates)
            continue
        p0, p1, p2, p3 = some
        v0, v1, v2, v3 = v[p0], v[p1], v[p2], v[p3]
        g0, g1, g2, g3 = gram[p0], gram[p1], gram[p2], gram[p3]
        m0 = m1 = m2 = m3 = NEVER
        for j in range(len(v)):
            slope, plus, times = c[j], offset[j], factor[j]
            s0 = plus + times * (slope + v0 * g0[j])
            s1 = plus + times * (slope + v1 * g1[j])
            s2 = plus + times * (slope + v2 * g2[j])
            s3 = plus + times * (slope + v3 * g3[j])
            m0 = _min(m0, -abs(s0) if updates else s0)
            m1 = _min(m1, -abs(s1) if updates else s1)
            m2 = _min(m2, -abs(s2) if updates else s2)
            m3 = _min(m3, -abs(s3) if updates else s3)
        lowest[p0], lowest[p1], lowest[p2], lowest[p3] = m0, m1, m2, m3


@_compiled
@no_type_check
def _lowest(value, g, c, offset, factor, start, stop, updates):
    # slices are indexed from 0, which is known not to count from the end
    g, c, offset, factor = g[start:stop], c[start:stop], offset[start:stop], factor[start:stop]
    lowest = NEVER
    for j in range(len(g)):
        score = offset[j] + factor[j] * (c[j] + value * g[j])
        lowest = _min(lowest, -abs(score) if updates else score)
    return lowest


@_compiled
@no_type_check
def _scores(value, g, c, offset, factor, scores, start, stop, updates):
    """Writes the scores of all returns and returns the lowest."""
    g, c, offset, factor = g[start:stop], c[start:stop], offset[start:stop], factor[start:stop]
    scores = scores[start:stop]
    lowest = NEVER
    for j in range(len(g)):
        score = offset[j] + factor[j] * (c[j] + value * g[j])
        scores[j] = -abs(score) if updates else score
        lowest = _min(lowest, scores[j])
    return lowest
