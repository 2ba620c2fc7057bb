"""Measures of likeness against sets, counters and entropies written down plainly."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from calibprune.calibration.similarity import (
    coverage,
    jaccard,
    ngram_hashes,
    signature,
    token_counts,
    unigram_divergence,
)


def some_documents(seed: int, words: int = 40) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, words, length).astype(np.int32) for length in (400, 2, 0, 1, 900)]


def ngrams(documents, ngram: int) -> list[tuple[int, ...]]:
    return [
        tuple(int(token) for token in document[start : start + ngram])
        for document in documents
        for start in range(len(document) - ngram + 1)
    ]


@pytest.mark.parametrize("ngram", [1, 2, 3, 5])
def test_hashes_are_as_distinct_as_ngrams(ngram):
    documents = some_documents(0, words=6)
    hashes, written = ngram_hashes(documents, ngram), ngrams(documents, ngram)
    assert hashes.dtype == np.uint64 and len(hashes) == len(written)
    assert len(set(zip(hashes.tolist(), written, strict=True))) == len(set(written))
    assert len(np.unique(hashes)) == len(set(written))


def test_hashes_of_a_large_vocabulary_do_not_collide():
    """Every pair and its reverse, of ids near one another and far apart: what a weak hash would confuse."""
    ids = [*range(200), *range(128_000, 128_200), 2**31 - 1]
    pairs = [np.array([a, b]) for a in ids[::9] for b in ids]
    distinct = {tuple(pair.tolist()) for pair in pairs}
    assert len(np.unique(ngram_hashes(pairs, 2))) == len(distinct)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(2000, 2000), (500, 4000), (3000, 100), (400_000, 300_000)]
)
def test_similarity_is_estimated_within_its_own_deviation(ours, theirs):
    one, other = np.arange(ours), np.arange(ours // 3, ours // 3 + theirs)
    a, b = set(one.tolist()), set(other.tolist())
    exact = len(a & b) / len(a | b)
    estimated = [
        jaccard(signature(ngram_hashes([one], 1), size), signature(ngram_hashes([other], 1), size))
        for size in (256, 1024)
    ]
    for size, value in zip((256, 1024), estimated, strict=True):
        assert abs(value - exact) <= 4 * math.sqrt(exact * (1 - exact) / size) + 1e-9


def test_similarity_of_equal_and_of_disjoint_sets():
    documents = some_documents(1)
    again = [documents[4], documents[0], documents[4]]  # another order, and some of it twice
    hashes = signature(ngram_hashes(documents, 3))
    assert jaccard(hashes, signature(ngram_hashes(again, 3))) == 1
    assert jaccard(hashes, signature(ngram_hashes([d + 1000 for d in documents], 3))) == 0
    assert hashes.tolist() == signature(ngram_hashes(documents, 3)).tolist()


def test_coverage_counts_occurrences():
    ours, theirs = some_documents(2), some_documents(3)
    known = set(ngrams(theirs, 2))
    counted = Counter(gram in known for gram in ngrams(ours, 2))
    distinct, occurrences = np.unique(ngram_hashes(ours, 2), return_counts=True)
    sought = np.unique(ngram_hashes(theirs, 2))
    share = coverage(distinct, occurrences, sought)
    assert share == pytest.approx(counted[True] / counted.total()) and 0.2 < share < 0.9
    assert coverage(distinct[:0], occurrences[:0], sought) == 0
    assert coverage(distinct, occurrences, sought[:0]) == 0


def test_divergence_is_that_of_the_shares():
    ours, theirs = [7, 0, 3, 0, 90], [1, 5, 0, 0]
    expected = 0.0
    for index in range(5):
        p = Fraction(ours[index], sum(ours))
        q = Fraction(theirs[index] if index < 4 else 0, sum(theirs))
        for share in (p, q):
            if share:
                expected += float(share) * math.log2(share / ((p + q) / 2)) / 2
    assert unigram_divergence(np.array(ours), np.array(theirs)) == pytest.approx(expected)
    assert unigram_divergence(np.array(theirs), np.array(ours)) == pytest.approx(expected)


def test_divergence_goes_from_zero_to_one_bit():
    one, other = np.array([5, 1, 0, 0]), np.array([0, 0, 2])
    assert unigram_divergence(one, 3 * one) == 0
    assert unigram_divergence(one, other) == 1
    with pytest.raises(ValueError, match="no token"):
        unigram_divergence(one, np.zeros(0, np.int64))


def test_tokens_are_counted_over_documents():
    assert token_counts([np.array([3, 3, 1], np.int32), np.array([], np.int32)]).tolist() == [0, 1, 0, 2]  # fmt: skip
    assert not token_counts([]).sum()
