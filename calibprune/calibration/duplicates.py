"""Finds equal samples by a hash of each, and nearly equal ones by MinHash signatures, band by band.

A signature has one byte for each permutation, stored as bands of bytes; samples that agree on a whole band are
compared on all bytes. Signatures are in files, of which one band at a time is in memory.
"""

from hashlib import blake2b
from typing import NamedTuple, Protocol

import numba
import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt64

from calibprune.calibration.ngrams import ngram_hashes

RECALL = 0.99
"""Share of the pairs with exactly the wanted similarity that agree on at least one band."""
CHANCE = 1 / 256
"""Probability that two different minima have the same last byte."""
_SEED = 20260101
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Bands(NamedTuple):
    count: int
    rows: int
    """Number of permutations in a band, one byte each."""


def bands(similarity: float, permutations: int) -> Bands:
    """Returns the longest bands with which a share `RECALL` of the pairs of this similarity agrees on one or more.

    A pair agrees on a band of r bytes with probability p^r, and on at least one of b bands with 1 - (1 - p^r)^b
    (Leskovec et al., Mining of Massive Datasets, section 3.4), where p is the similarity plus equal bytes by chance.
    """
    agree = similarity + (1 - similarity) * CHANCE
    for rows in range(min(16, permutations), 1, -1):
        count = permutations // rows
        if 1 - (1 - agree**rows) ** count >= RECALL:
            return Bands(count, rows)
    return Bands(permutations, 1)


def sample_hashes(
    tokens: Int32[np.ndarray, " tokens"], offsets: Int64[np.ndarray, " samples+1"]
) -> UInt64[np.ndarray, " samples"]:
    """Hashes every sample's tokens to 64 bits: among 10 million samples, two collide once in 370,000 runs."""
    data = np.ascontiguousarray(tokens).data.cast("B")
    pairs = zip(4 * offsets[:-1], 4 * offsets[1:], strict=True)
    digests = b"".join(blake2b(data[first:last], digest_size=8).digest() for first, last in pairs)
    return np.frombuffer(digests, "<u8")


def signatures(
    tokens: Int32[np.ndarray, " tokens"],
    offsets: Int64[np.ndarray, " samples+1"],
    ngram: int,
    permutations: int,
) -> UInt8[np.ndarray, "samples permutations"]:
    """Returns the last byte of the smallest hash of each sample's n-grams, for every permutation (Broder 1997).

    b-bit minwise hashing (Li and König 2010): bytes agree with the Jaccard similarity J plus (1 - J) / 256.
    """
    from rensa import RMinHash  # type: ignore[attr-defined]

    hashes, bounds = ngram_hashes(tokens, offsets, ngram)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, bounds, permutations, _SEED)
    rows = matrix.to_rows()
    return np.array(rows, np.uint32).astype(np.uint8).reshape(len(offsets) - 1, permutations)


def first_equal(hashes: UInt64[np.ndarray, " samples"]) -> Int32[np.ndarray, " samples"]:
    """Returns for every sample the first one with the same hash, often itself."""
    return _firsts(hashes, np.argsort(hashes, kind="stable"))


class LoadBand(Protocol):
    def __call__(
        self, number: int, samples: Int32[np.ndarray, " some"] | None = None
    ) -> UInt8[np.ndarray, "some rows"]:
        """Loads a band of some samples, or of all of them."""
        ...


def first_near(
    band: LoadBand, samples: int, layout: Bands, similarity: float
) -> Int32[np.ndarray, " samples"]:
    """Returns for every sample the first one that is nearly equal to it, directly or through others; often itself.

    Candidates are pairs that agree on a whole band: 99 % of the pairs at the wanted similarity, more of those above
    it. Among many samples with the same band, each is compared with the first and with the previous one. A pair counts
    if its estimated similarity, with standard error sqrt(J (1 - J) / permutations), reaches the wanted one. Takes about
    30 bytes per sample.
    """
    parents = np.arange(samples, dtype=np.int32)
    for number in range(layout.count):
        keys = _keys(band(number))
        order = np.argsort(keys, kind="stable")
        pairs = np.empty(
            (_candidates(keys, order, parents, np.empty((0, 2), np.int32)), 2), np.int32
        )
        _candidates(keys, order, parents, pairs)
        del keys, order
        if not len(pairs):
            continue
        agreeing = np.zeros(len(pairs), np.int32)
        for other in range(layout.count):
            same = band(other, pairs[:, 0]) == band(other, pairs[:, 1])
            agreeing += same.sum(1, dtype=np.int32)
        share = agreeing / (layout.count * layout.rows)
        estimate = (share - CHANCE) / (1 - CHANCE)
        _join(parents, pairs[estimate >= similarity])
    return _roots(parents)


def _keys(values: UInt8[np.ndarray, "samples rows"]) -> UInt64[np.ndarray, " samples"]:
    """Returns each sample's band as one number, equal where the bytes are equal; hashed if more than eight."""
    count, rows = values.shape
    padded = np.zeros((count, -(-rows // 8) * 8), np.uint8)
    padded[:, :rows] = values
    words = padded.view("<u8")
    keys = words[:, 0]
    for word in words[:, 1:].T:
        keys = (keys ^ (keys >> np.uint64(29))) * _MULTIPLIER + word
    return np.ascontiguousarray(keys)


@numba.njit(nogil=True, cache=True)
def _root(parents, sample):
    while parents[sample] != sample:
        parents[sample] = parents[parents[sample]]
        sample = parents[sample]
    return sample


@numba.njit(nogil=True, cache=True)
def _firsts(keys, order):
    """Returns for every sample the first one with its key; `order` has equal keys side by side, in sample order."""
    firsts = np.empty(len(order), np.int32)
    for place in range(len(order)):
        sample = order[place]
        same = place > 0 and keys[order[place - 1]] == keys[sample]
        firsts[sample] = firsts[order[place - 1]] if same else sample
    return firsts


@numba.njit(nogil=True, cache=True)
def _candidates(keys, order, parents, pairs):
    """Finds pairs with equal keys that are not joined yet: each sample with the first of its key and the previous one.

    Writes as many pairs as there is room for; returns how many there are.
    """
    found, first = 0, 0
    for place in range(1, len(order)):
        sample = order[place]
        if keys[order[place - 1]] != keys[sample]:
            first = place
            continue
        for other in (first, place - 1):
            if _root(parents, order[other]) != _root(parents, sample):
                if found < len(pairs):
                    pairs[found, 0], pairs[found, 1] = order[other], sample
                found += 1
            if first == place - 1:
                break
    return found


@numba.njit(nogil=True, cache=True)
def _join(parents, pairs):
    """Joins the sets of every pair (Tarjan's union-find); a set's root is its first sample."""
    for number in range(len(pairs)):
        a, b = _root(parents, pairs[number, 0]), _root(parents, pairs[number, 1])
        parents[max(a, b)] = min(a, b)


@numba.njit(nogil=True, cache=True)
def _roots(parents):
    roots = np.empty_like(parents)
    for sample in range(len(parents)):
        roots[sample] = _root(parents, sample)
    return roots
