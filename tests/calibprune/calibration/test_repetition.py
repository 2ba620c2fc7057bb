"""Repetition within samples, against counting by hand."""

import numpy as np

from calibprune.calibration.repetition import longest_repeat, ngram_hashes, repetition_share

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
