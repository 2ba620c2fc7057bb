"""How much of a sample has been said before in that same sample, counted exactly, in compiled code.

Many samples lie end to end in one array: sample i is tokens[offsets[i] : offsets[i + 1]].
"""

import numba
import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt64

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
    """Of each sample's n-grams, the share that stood in it before; 0 for a sample shorter than an n-gram."""
    return _shares(tokens, offsets, ngram)


def longest_repeat(
    tokens: Int32[np.ndarray, " tokens"], offsets: Int64[np.ndarray, " samples+1"]
) -> Int32[np.ndarray, " samples"]:
    """Tokens of the longest passage that stands in a sample twice; the two places may overlap, as loops do."""
    return _longest(tokens, offsets)


def ngram_hashes(
    tokens: Int32[np.ndarray, " tokens"], offsets: Int64[np.ndarray, " samples+1"], ngram: int
) -> tuple[UInt64[np.ndarray, " ngrams"], UInt64[np.ndarray, " samples+1"]]:
    """(64-bit hashes of the n-grams of every sample end to end, where each sample's begin and end).

    A sample shorter than an n-gram counts as one.
    """
    lengths = np.diff(offsets)
    ends = np.cumsum(np.maximum(lengths - ngram + 1, 1))
    bounds = np.concatenate([[0], ends]).astype(np.int64)
    return _hashes(tokens, offsets, bounds, ngram), bounds.astype(np.uint64)


@_compiled
def _mixed(value):
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit depends on every other."""
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
    """A power of two of at least twice `count`."""
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
    # Where n-grams of this hash began first, plus one. Places grow from sample to sample, so an entry of a sample
    # before this one is known by its value, and the table is never emptied.
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
        for place in range(length):  # of the polynomial of the tokens so far
            sums[place + 1] = sums[place] * _BASE + _mixed(np.uint64(tokens[start + place]) + _ONE)
        # A passage that stands there twice holds shorter ones that do. Doubling first: most are short.
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
    """Whether a passage of `wanted` tokens stands twice in the sample; equal hashes are compared token by token."""
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
