"""How alike two collections of documents are, as token ids: pure functions on arrays.

Collections of very different sizes are not alike by any of these measures: cut them to one size first.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt32, UInt64
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue] - a compiled module

PERMUTATIONS = 1024
"""The estimate's standard deviation is sqrt(J (1 - J) / permutations): at most 0.016."""
_SEED = 0
_ODD, _FIRST, _SECOND = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)


def ngram_hashes(
    documents: Sequence[Int[np.ndarray, " _"]], ngram: int
) -> UInt64[np.ndarray, " occurrences"]:
    """A 64-bit hash of every n-gram of every document, in order; n-grams do not cross documents."""
    found = [np.empty(0, np.uint64)]
    for document in documents:
        count = len(document) - ngram + 1
        if count <= 0:
            continue
        tokens = np.asarray(document).astype(np.uint64)
        hashes = np.zeros(count, np.uint64)
        for offset in range(ngram):
            hashes = _mixed(hashes * _ODD + tokens[offset : offset + count] + _ODD)
        found.append(hashes)
    return np.concatenate(found)


def signature(
    hashes: UInt64[np.ndarray, " _"], permutations: int = PERMUTATIONS
) -> UInt32[np.ndarray, " permutations"]:
    """The MinHash signature of a set of n-grams; how often one occurs does not matter."""
    hashes = np.ascontiguousarray(hashes, np.uint64)
    whole = np.array([0, len(hashes)], np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, whole, permutations, _SEED)
    return np.array(matrix.to_rows()[0], np.uint32)


def jaccard(
    ours: UInt32[np.ndarray, " permutations"], theirs: UInt32[np.ndarray, " permutations"]
) -> float:
    """|A and B| / |A or B| of two sets, estimated from their signatures (Broder 1997)."""
    return float(np.mean(ours == theirs))


def coverage(
    ours: UInt64[np.ndarray, " distinct"],
    occurrences: Int[np.ndarray, " distinct"],
    theirs: UInt64[np.ndarray, " _"],
) -> float:
    """The share of our n-gram occurrences that are n-grams of theirs; each of both once, theirs in ascending order.

    0 where either has none.
    """
    if not len(ours) or not len(theirs):
        return 0.0
    nearest = theirs[np.minimum(np.searchsorted(theirs, ours), len(theirs) - 1)]
    return float(occurrences[nearest == ours].sum() / occurrences.sum())


def token_counts(documents: Sequence[Int[np.ndarray, " _"]]) -> Int[np.ndarray, " vocabulary"]:
    """How often every token id occurs, up to the largest that does."""
    return np.bincount(np.concatenate([np.empty(0, np.int64), *documents]).astype(np.int64))


def unigram_divergence(ours: Int[np.ndarray, " _"], theirs: Int[np.ndarray, " _"]) -> float:
    """Jensen-Shannon divergence of two token distributions, from counts, in bits: 0 (equal) to 1 (no token in common).

    Lin 1991, equation 4.1 with equal weights. Raises ValueError where one has no token.
    """
    size = max(len(ours), len(theirs))
    shares = np.zeros((2, size))
    for row, counts in zip(shares, (ours, theirs), strict=True):
        if not counts.sum():
            raise ValueError("no token was counted")
        row[: len(counts)] = counts / counts.sum()
    between = _entropy(shares.mean(0)) - np.mean([_entropy(row) for row in shares])
    return float(min(max(between, 0.0), 1.0))  # the rest is rounding


def _entropy(shares: np.ndarray) -> float:
    present = shares[shares > 0]
    return float(-(present * np.log2(present)).sum())


def _mixed(values: UInt64[np.ndarray, " _"]) -> UInt64[np.ndarray, " _"]:
    """A bijection of 64 bits in which every bit depends on all (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))
