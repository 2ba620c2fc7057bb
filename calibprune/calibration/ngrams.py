"""Measures on n-grams of token ids: how much a sample repeats itself, and how similar two collections of documents are.

Pure functions on arrays. Repetition is counted exactly, in compiled code, in many samples at once, which are end to end
in one array: sample i is tokens[offsets[i] : offsets[i + 1]]. Similarities depend on the size of the collections: cut
these to one size first.
"""

from collections.abc import Sequence

import numba
import numpy as np
from jaxtyping import Float32, Int, Int32, Int64, UInt32, UInt64

PERMUTATIONS = 1024
"""Permutations of a signature: the estimate's standard deviation is sqrt(J (1 - J) / permutations), at most 0.016."""
_SEED = 0

_compiled = numba.njit(nogil=True, cache=True)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BASE = np.uint64(0xD6E8FEB86659FD93)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_ONE = np.uint64(1)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


def repetition_share(
    tokens: Int32[np.ndarray, " tokens"], offsets: Int64[np.ndarray, " samples+1"], ngram: int
) -> Float32[np.ndarray, " samples"]:
    """Returns the share of each sample's n-grams that occurred in it before; 0 for a sample shorter than an n-gram."""
    return _shares(tokens, offsets, ngram)


def longest_repeat(
    tokens: Int32[np.ndarray, " tokens"], offsets: Int64[np.ndarray, " samples+1"]
) -> Int32[np.ndarray, " samples"]:
    """Returns the tokens of the longest passage that occurs in a sample twice; the two may overlap, as in a loop."""
    return _longest(tokens, offsets)


def ngram_hashes(
    tokens: Int32[np.ndarray, " tokens"], offsets: Int64[np.ndarray, " samples+1"], ngram: int
) -> tuple[UInt64[np.ndarray, " ngrams"], UInt64[np.ndarray, " samples+1"]]:
    """Returns (64-bit hashes of the n-grams of all samples, end to end; the bounds of each sample's hashes).

    A sample shorter than an n-gram counts as one n-gram.
    """
    lengths = np.diff(offsets)
    ends = np.cumsum(np.maximum(lengths - ngram + 1, 1))
    bounds = np.concatenate([[0], ends]).astype(np.int64)
    return _hashes(tokens, offsets, bounds, ngram), bounds.astype(np.uint64)


def document_ngram_hashes(
    documents: Sequence[Int[np.ndarray, " _"]], ngram: int
) -> UInt64[np.ndarray, " occurrences"]:
    """Returns a 64-bit hash of every n-gram of every document, in order; n-grams do not cross documents."""
    long_enough = [document for document in documents if len(document) >= ngram]
    tokens = np.concatenate([np.empty(0, np.int32), *long_enough]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in long_enough])]).astype(np.int64)
    return ngram_hashes(tokens, offsets, ngram)[0]


def signature(
    hashes: UInt64[np.ndarray, " _"], permutations: int = PERMUTATIONS
) -> UInt32[np.ndarray, " permutations"]:
    """Returns the MinHash signature of a set of n-grams, by their hashes; repeated hashes do not matter."""
    from rensa import RMinHash  # type: ignore[attr-defined]

    hashes = np.ascontiguousarray(hashes, np.uint64)
    whole = np.array([0, len(hashes)], np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, whole, permutations, _SEED)
    return np.array(matrix.to_rows()[0], np.uint32)


def jaccard(
    ours: UInt32[np.ndarray, " permutations"], theirs: UInt32[np.ndarray, " permutations"]
) -> float:
    """Estimates |A and B| / |A or B| of two sets from their signatures (Broder 1997)."""
    return float(np.mean(ours == theirs))


def coverage(
    ours: UInt64[np.ndarray, " distinct"],
    occurrences: Int[np.ndarray, " distinct"],
    theirs: UInt64[np.ndarray, " _"],
) -> float:
    """Returns the share of our n-gram occurrences that are n-grams of theirs; 0 where either has none.

    `ours` and `theirs` are distinct hashes, theirs in ascending order; `occurrences` counts each of ours.
    """
    if not len(ours) or not len(theirs):
        return 0.0
    nearest = theirs[np.minimum(np.searchsorted(theirs, ours), len(theirs) - 1)]
    return float(occurrences[nearest == ours].sum() / occurrences.sum())


def token_counts(documents: Sequence[Int[np.ndarray, " _"]]) -> Int[np.ndarray, " vocabulary"]:
    """Counts the occurrences of every token id, up to the largest that occurs."""
    return np.bincount(np.concatenate([np.empty(0, np.int64), *documents]).astype(np.int64))


def unigram_divergence(ours: Int[np.ndarray, " _"], theirs: Int[np.ndarray, " _"]) -> float:
    """Returns the Jensen-Shannon divergence of two token counts in bits, from 0 (equal) to 1 (no token in common).

    Lin 1991, equation 4.1 with equal weights. Raises ValueError where one has no token.
    """
    size = max(len(ours), len(theirs))
    shares = np.zeros((2, size))
    for row, counts in zip(shares, (ours, theirs), strict=True):
        if not counts.sum():
            raise ValueError("no token was counted")
        row[: len(counts)] = counts / counts.sum()
    between = _entropy(shares.mean(0)) - np.mean([_entropy(row) for row in shares])
    return float(min(max(between, 0.0), 1.0))  # any excess is rounding


def _entropy(shares: np.ndarray) -> float:
    present = shares[shares > 0]
    return float(-(present * np.log2(present)).sum())


@_compiled
def _mixed(value):
    """Applies the finaliser of SplitMix64 (Steele et al. 2014): every bit depends on every other."""
    value = (value ^ (value >> _S30)) * _FIRST
    value = (value ^ (value >> _S27)) * _SECOND
    return value ^ (value >> _S31)


@_compiled
def _hash(tokens, start, stop):
    value = np.uint64(stop - start) * _SECOND
    for place in range(start, stop):
        value = (value ^ (np.uint64(tokens[place]) + _ONE)) * _GOLDEN
        value ^= value >> _S31
    return _mixed(value)


@_compiled
def _hashes(tokens, offsets, bounds, ngram):
    hashes = np.empty(bounds[-1], np.uint64)
    for sample in range(len(offsets) - 1):
        start, stop = offsets[sample], offsets[sample + 1]
        for number in range(bounds[sample + 1] - bounds[sample]):
            first = start + number
            hashes[bounds[sample] + number] = _hash(tokens, first, min(first + ngram, stop))
    return hashes


@_compiled
def _same(tokens, a, b, length):
    for step in range(length):  # noqa: SIM110 (compiled: a plain loop)
        if tokens[a + step] != tokens[b + step]:
            return False
    return True


@_compiled
def _slots(count):
    """Returns a power of two of at least twice `count`."""
    slots = 2
    while slots < 2 * count:
        slots *= 2
    return slots


@_compiled
def _longest_sample(offsets):
    longest = 1
    for sample in range(len(offsets) - 1):
        longest = max(longest, offsets[sample + 1] - offsets[sample])
    return longest


@_compiled
def _shares(tokens, offsets, ngram):
    samples = len(offsets) - 1
    shares = np.zeros(samples, np.float32)
    # Each slot has the first position of an n-gram with this hash, plus one. Positions grow from sample to sample, so
    # that entries of earlier samples can be recognised by their value, and the table is never emptied.
    table = np.zeros(_slots(_longest_sample(offsets)), np.int64)
    for sample in range(samples):
        start, stop = offsets[sample], offsets[sample + 1]
        count = stop - start - ngram + 1
        if count < 1:
            continue
        last = np.uint64(_slots(count) - 1)
        repeated = 0
        for first in range(start, start + count):
            slot = _hash(tokens, first, first + ngram) & last
            while table[slot] > start and not _same(tokens, table[slot] - 1, first, ngram):
                slot = (slot + _ONE) & last
            if table[slot] > start:
                repeated += 1
            else:
                table[slot] = first + 1
        shares[sample] = repeated / count
    return shares


@_compiled
def _longest(tokens, offsets):
    samples, most = len(offsets) - 1, _longest_sample(offsets)
    longest = np.zeros(samples, np.int32)
    sums = np.zeros(most + 1, np.uint64)
    slots = _slots(most)
    table, stamps, stamp = np.zeros(slots, np.int32), np.zeros(slots, np.int64), 0
    for sample in range(samples):
        start, stop = offsets[sample], offsets[sample + 1]
        length = stop - start
        for place in range(length):  # prefix sums of a polynomial in the tokens
            sums[place + 1] = sums[place] * _BASE + _mixed(np.uint64(tokens[start + place]) + _ONE)
        # A passage that occurs twice contains shorter ones that do, so that bisection works. The length is first
        # doubled, since most repeats are short.
        found, missing, step = 0, length, 1
        while found + 1 < missing:
            wanted = min(found + step, missing - 1) if step else (found + missing) // 2
            stamp += 1
            if _repeats(tokens, start, length, wanted, sums, table, stamps, stamp):
                found, step = wanted, 2 * step
            else:
                missing, step = wanted, 0
        longest[sample] = found
    return longest


@_compiled
def _repeats(tokens, start, length, wanted, sums, table, stamps, stamp):
    """Returns whether a passage of `wanted` tokens occurs twice in the sample; equal hashes are compared by token."""
    power, factor, exponent = _ONE, _BASE, wanted
    while exponent:
        if exponent & 1:
            power *= factor
        factor *= factor
        exponent >>= 1
    count = length - wanted + 1
    last = np.uint64(_slots(count) - 1)
    for place in range(count):
        value = sums[place + wanted] - sums[place] * power
        slot = _mixed(value) & last
        while stamps[slot] == stamp:
            other = table[slot]
            same = sums[other + wanted] - sums[other] * power == value
            if same and _same(tokens, start + other, start + place, wanted):
                return True
            slot = (slot + _ONE) & last
        table[slot], stamps[slot] = place, stamp
    return False
