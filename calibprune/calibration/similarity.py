"""How alike two collections of documents are, as token ids: pure functions on arrays.

Collections of very different sizes are not alike by any of these measures: cut them to one size first.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt32, UInt64
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue] - a compiled module

from calibprune.calibration.repetition import ngram_hashes as hashes_of_all

PERMUTATIONS = 1024
"""The estimate's standard deviation is sqrt(J (1 - J) / permutations): at most 0.016."""
_SEED = 0


def ngram_hashes(
    documents: Sequence[Int[np.ndarray, " _"]], ngram: int
) -> UInt64[np.ndarray, " occurrences"]:
    """A 64-bit hash of every n-gram of every document, in order; n-grams do not cross documents."""
    long_enough = [document for document in documents if len(document) >= ngram]
    tokens = np.concatenate([np.empty(0, np.int32), *long_enough]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in long_enough])]).astype(np.int64)
    return hashes_of_all(tokens, offsets, ngram)[0]


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
