"""Repetition within samples, against counting by hand; similarities, against sets, counters and entropies."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from calibprune.calibration.ngrams import (
    coverage,
    document_ngram_hashes,
    jaccard,
    longest_repeat,
    ngram_hashes,
    repetition_share,
    signature,
    token_counts,
    unigram_divergence,
)

RNG = np.random.default_rng(0)


def end_to_end(samples):
    tokens = np.array([token for sample in samples for token in sample], np.int32)
    return tokens, np.concatenate([[0], np.cumsum([len(sample) for sample in samples])]).astype(int)


def ngrams(sample, n):
    return [tuple(sample[i : i + n]) for i in range(len(sample) - n + 1)]


def share_by_hand(sample, n):
    every = ngrams(sample, n)
    return 1 - len(set(every)) / len(every) if every else 0


def longest_by_hand(sample):
    lengths = range(1, len(sample))
    return max((n for n in lengths if len(set(ngrams(sample, n))) < len(sample) - n + 1), default=0)


def random_samples(count):
    return [RNG.integers(0, RNG.integers(1, 6), RNG.integers(0, 50)).tolist() for _ in range(count)]


def test_shares_and_longest_repeats_are_those_counted_by_hand():
    for ngram in (1, 2, 4, 7):
        samples = random_samples(150)
        tokens, offsets = end_to_end(samples)
        shares = repetition_share(tokens, offsets, ngram)
        np.testing.assert_allclose(shares, [share_by_hand(s, ngram) for s in samples], rtol=1e-6)
        assert longest_repeat(tokens, offsets).tolist() == [longest_by_hand(s) for s in samples]


def test_a_loop_and_a_quotation():
    loop, plain = [7, 8, 9] * 5, list(range(40))
    quotation = [*range(30), 99, *range(5, 25), 98]
    found = longest_repeat(*end_to_end([loop, plain, quotation, [], [1]]))
    assert found.tolist() == [12, 0, 20, 0, 0]


def test_a_long_sample_beside_short_ones():
    long = [*RNG.integers(0, 50_000, 3000).tolist(), 60_000]
    long += long[100:1500]
    tokens, offsets = end_to_end([[1, 1], long, [1, 2, 1]])
    assert longest_repeat(tokens, offsets).tolist() == [1, 1400, 1]
    assert repetition_share(tokens, offsets, 4)[1] >= 1397 / (len(long) - 3)


def test_ngram_hashes_differ_as_the_ngrams_do():
    samples = [*random_samples(50), [5], [5, 5], []]
    hashes, bounds = ngram_hashes(*end_to_end(samples), 3)
    known = {}
    for number, sample in enumerate(samples):
        mine = hashes[bounds[number] : bounds[number + 1]]
        wanted = ngrams(sample, 3) or [tuple(sample)]
        assert len(mine) == len(wanted)
        for value, ngram in zip(mine.tolist(), wanted, strict=True):
            assert known.setdefault(ngram, value) == value
    assert len(set(known.values())) == len(known)


def some_documents(seed: int, words: int = 40) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, words, length).astype(np.int32) for length in (400, 2, 0, 1, 900)]


def document_ngrams(documents, n):
    return [ngram for document in documents for ngram in ngrams(document.tolist(), n)]


@pytest.mark.parametrize("ngram", [1, 2, 3, 5])
def test_hashes_are_as_distinct_as_ngrams(ngram):
    documents = some_documents(0, words=6)
    hashes, written = document_ngram_hashes(documents, ngram), document_ngrams(documents, ngram)
    assert hashes.dtype == np.uint64 and len(hashes) == len(written)
    assert len(set(zip(hashes.tolist(), written, strict=True))) == len(set(written))
    assert len(np.unique(hashes)) == len(set(written))


def test_hashes_of_a_large_vocabulary_do_not_collide():
    """Every pair and its reverse, of ids near one another and far apart: what a weak hash would confuse."""
    ids = [*range(200), *range(128_000, 128_200), 2**31 - 1]
    pairs = [np.array([a, b]) for a in ids[::9] for b in ids]
    distinct = {tuple(pair.tolist()) for pair in pairs}
    assert len(np.unique(document_ngram_hashes(pairs, 2))) == len(distinct)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(2000, 2000), (500, 4000), (3000, 100), (400_000, 300_000)]
)
def test_similarity_is_estimated_within_its_own_deviation(ours, theirs):
    one, other = np.arange(ours), np.arange(ours // 3, ours // 3 + theirs)
    a, b = set(one.tolist()), set(other.tolist())
    exact = len(a & b) / len(a | b)
    estimated = [
        jaccard(
            signature(document_ngram_hashes([one], 1), size),
            signature(document_ngram_hashes([other], 1), size),
        )
        for size in (256, 1024)
    ]
    for size, value in zip((256, 1024), estimated, strict=True):
        assert abs(value - exact) <= 4 * math.sqrt(exact * (1 - exact) / size) + 1e-9


def test_similarity_of_equal_and_of_disjoint_sets():
    documents = some_documents(1)
    again = [documents[4], documents[0], documents[4]]  # another order, and some of it twice
    hashes = signature(document_ngram_hashes(documents, 3))
    assert jaccard(hashes, signature(document_ngram_hashes(again, 3))) == 1
    assert jaccard(hashes, signature(document_ngram_hashes([d + 1000 for d in documents], 3))) == 0
    assert hashes.tolist() == signature(document_ngram_hashes(documents, 3)).tolist()


def test_coverage_counts_occurrences():
    ours, theirs = some_documents(2), some_documents(3)
    known = set(document_ngrams(theirs, 2))
    counted = Counter(gram in known for gram in document_ngrams(ours, 2))
    distinct, occurrences = np.unique(document_ngram_hashes(ours, 2), return_counts=True)
    sought = np.unique(document_ngram_hashes(theirs, 2))
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
