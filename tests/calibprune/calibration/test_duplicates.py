"""Equal and nearly equal samples: found where they are similar, left alone where they are not."""

import numpy as np
import pytest

from calibprune.calibration.duplicates import (
    Bands,
    bands,
    first_equal,
    first_near,
    sample_hashes,
    signatures,
)

RNG = np.random.default_rng(0)
TOKENS, NGRAM, PERMUTATIONS = 400, 5, 128


def end_to_end(samples):
    offsets = np.concatenate([[0], np.cumsum([len(sample) for sample in samples])]).astype(int)
    return np.concatenate(samples).astype(np.int32), offsets


def changed(sample, similarity):
    """Replaces the last tokens so that the Jaccard similarity of n-grams is about `similarity`."""
    grams = len(sample) - NGRAM + 1
    common = round(2 * grams * similarity / (1 + similarity))
    copy = sample.copy()
    copy[common + NGRAM - 1 :] = RNG.integers(50_000, 100_000, len(sample) - common - NGRAM + 1)
    return copy


def jaccard(a, b):
    first, second = ({tuple(x[i : i + NGRAM]) for i in range(len(x) - NGRAM + 1)} for x in (a, b))
    return len(first & second) / len(first | second)


def near(samples, similarity):
    signed = signatures(*end_to_end(samples), NGRAM, PERMUTATIONS)
    layout = bands(similarity, PERMUTATIONS)

    def band(number, samples=None):
        values = signed[:, number * layout.rows : (number + 1) * layout.rows]
        return values if samples is None else values[samples]

    return first_near(band, len(samples), layout, similarity)


def test_bands_are_as_long_as_recall_allows():
    for similarity in (0.3, 0.5, 0.8, 0.9):
        count, rows = bands(similarity, PERMUTATIONS)
        agree = similarity + (1 - similarity) / 256
        assert 1 - (1 - agree**rows) ** count >= 0.99 and count * rows <= PERMUTATIONS
        longer = PERMUTATIONS // (rows + 1)
        assert 1 - (1 - agree ** (rows + 1)) ** longer < 0.99
    assert bands(0.01, 16) == Bands(16, 1)


def test_signature_bytes_agree_as_often_as_samples_are_similar():
    for similarity in (0.0, 0.5, 0.9):
        agree, exact = [], []
        for _ in range(60):
            a = RNG.integers(0, 50_000, TOKENS)
            b = changed(a, similarity)
            signed = signatures(*end_to_end([a, b]), NGRAM, PERMUTATIONS)
            agree.append((signed[0] == signed[1]).mean())
            exact.append(jaccard(a, b))
        estimate = (np.mean(agree) - 1 / 256) * 256 / 255
        assert estimate == pytest.approx(np.mean(exact), abs=0.02)


@pytest.mark.parametrize("similarity", [0.5, 0.8])
def test_near_duplicates_are_found_and_others_are_not(similarity):
    originals = [RNG.integers(0, 50_000, TOKENS) for _ in range(150)]
    alike = [changed(sample, similarity + 0.15) for sample in originals[:50]]
    unlike = [changed(sample, similarity - 0.15) for sample in originals[50:100]]
    first = near([*originals, *alike, *unlike], similarity)
    assert first[:150].tolist() == list(range(150))
    assert (first[150:200] == np.arange(50)).sum() >= 48
    assert (first[200:] == np.arange(200, 250)).sum() >= 48


def test_the_first_of_a_chain_stands_for_all_of_it():
    sample = RNG.integers(0, 50_000, TOKENS)
    family = [sample]
    for place in (0, 100, 200, 300):  # each differs from the one before in a few tokens
        family.append(family[-1].copy())
        family[-1][place : place + 8] += 1
    others = [RNG.integers(0, 50_000, TOKENS) for _ in range(3)]
    assert near([others[0], *family, *others[1:]], 0.8).tolist() == [0, 1, 1, 1, 1, 1, 6, 7]


def test_short_samples_are_near_only_if_they_are_equal():
    samples = [np.array(ids) for ids in ([1, 2], [1, 3], [2, 1], [1], [1, 2])]
    assert near(samples, 0.8).tolist() == [0, 1, 2, 3, 0]


def test_equal_samples_have_equal_hashes_and_no_others():
    samples = [RNG.integers(0, 3, RNG.integers(1, 6)) for _ in range(400)]
    seen, wanted = {}, []
    for number, sample in enumerate(samples):
        wanted.append(seen.setdefault(tuple(sample), number))
    assert first_equal(sample_hashes(*end_to_end(samples))).tolist() == wanted
