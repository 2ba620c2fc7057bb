"""Shares of the pool are exact, and samples are drawn by the seed alone."""

import numpy as np
import pytest

from calibprune.calibration import mixing
from calibprune.calibration.mixing import (
    mixture,
    place_samples,
    pool_files,
    shortage,
    source_of_sequence,
)
from calibprune.errors import UserError
from tests.calibprune.calibration.samples import settings

RNG = np.random.default_rng(0)


def mixed(sequences, *sources, **changes):
    named = [
        {"type": "text", "name": f"s{number}", "path": "/no/where"} | source
        for number, source in enumerate(sources)
    ]
    return settings(sources=named, sequences=sequences, **changes)


def test_weights_share_the_pool_by_largest_remainder():
    assert mixture(mixed(10, {"weight": 1}, {"weight": 1}, {"weight": 1})) == [4, 3, 3]
    assert mixture(mixed(7, {"weight": 0.5}, {"weight": 0.25}, {"weight": 0.25})) == [3, 2, 2]
    for _ in range(50):
        weights = RNG.uniform(0.1, 5, 4)
        counts = mixture(mixed(97, *({"weight": float(weight)} for weight in weights)))
        exact = 97 * weights / weights.sum()
        assert sum(counts) == 97 and np.all(np.abs(counts - exact) < 1)


def test_budgets_are_fixed_and_the_rest_is_shared():
    two = {"weight": 2}, {"weight": 1}
    assert mixture(mixed(9, {"budget_tokens": 17}, *two)) == [3, 4, 2]
    assert mixture(mixed(3, {"budget_tokens": 24})) == [3]
    assert mixture(mixed(1, {"budget_tokens": 40}, {"weight": 1}, tokens=50)) == [5, 2]


@pytest.mark.parametrize("sequences", [2, 4])
def test_budgets_that_do_not_fit_the_pool_are_refused(sequences):
    with pytest.raises(
        UserError, match=f"add up to 3 sequences of 8 tokens, the pool has {sequences}"
    ):
        mixture(mixed(sequences, {"budget_tokens": 24}))


def test_sources_are_mixed_all_over_the_pool():
    order = source_of_sequence(mixed(400, {"weight": 3}, {"weight": 1}))
    assert np.bincount(order).tolist() == [300, 100]
    assert 10 < (order[:100] == 1).sum() < 40
    assert not np.array_equal(order, source_of_sequence(mixed(400, {"weight": 3}, {}, seed=1)))


def placed(tokens, sequences, source=0, shards=None, **changes):
    changes |= {"sequences": sequences}
    tokens = np.asarray(tokens, np.int32)
    shard_of = None if shards is None else shards.__getitem__
    return place_samples(tokens, shard_of, sequences, source, settings(**changes))


def test_as_few_samples_as_fill_the_sequences_end_to_end():
    tokens = RNG.integers(0, 30, 60)
    used, starts = placed(tokens, 10)
    lengths = tokens[used]
    assert starts.tolist() == [0, *np.cumsum(lengths)[:-1]] and lengths.min() > 0
    assert starts[-1] < 80 <= starts[-1] + lengths[-1]
    again, _ = placed(tokens, 10)
    other, _ = placed(tokens, 10, seed=1)
    second, _ = placed(tokens, 10, source=1)
    assert used.tolist() == again.tolist()
    assert len({tuple(used), tuple(other), tuple(second)}) == 3


def test_every_sample_is_as_likely_as_any_other():
    chosen = np.zeros(20)
    for seed in range(400):
        used, _ = placed([8] * 20, 5, seed=seed)
        chosen[used] += 1
    assert chosen.sum() == 2000 and chosen.min() > 60 and chosen.max() < 140


def test_documents_are_those_long_enough():
    tokens = np.array([7, 8, 9, 3, 100])
    used, starts = placed(tokens, 2, pack="document")
    assert set(used) < {1, 2, 4} and starts.tolist() == [0, 8]


def test_a_pool_of_many_files_is_shuffled_by_shards_first(monkeypatch):
    monkeypatch.setattr(mixing, "POOL_FILE_TOKENS", 80)
    wanted = settings(sequences=100)
    assert [len(part) for part in pool_files(wanted)] == [10] * 10
    shards = np.arange(400, dtype=np.int32) // 4
    used, starts = placed([4] * 400, 100, shards=shards)
    assert starts.tolist() == list(range(0, 800, 4)) and len(set(used)) == 200
    files = [set(shards[used[first : first + 20]]) for first in range(0, 200, 20)]
    assert np.mean([len(part) for part in files]) < 16  # of about 20 if they were drawn one by one


def test_a_shortage_names_every_source_that_is_short():
    wanted = mixed(6, {}, {"name": "wiki"}, {})
    assert shortage(wanted, [2, 2, 2], [9, 9, 9], [16, 16, 16]) is None
    said = shortage(wanted, [2, 2, 2], [9, 1, 0], [16, 15, 0])
    assert said is not None and "s0" not in said
    assert (
        "wiki must fill 2 sequences of 8 tokens = 16 tokens, but its 1 kept samples have 15" in said
    )
    assert "s2 must fill" in said


@pytest.mark.parametrize(
    ("source", "there", "remedy", "no_remedy"),
    [
        ({"type": "generated"}, 0, "raise generate.max_tokens, or", "generate.samples"),
        ({"type": "generated"}, 1, "raise generate.samples, or", "max_tokens"),
        ({"type": "text", "path": "x"}, 0, "document_tokens, or", "documents, or"),
        ({"type": "text", "path": "x"}, 1, "raise the source's documents, or", "document_tokens"),
    ],
)
def test_samples_that_are_all_too_short_are_not_asked_for_in_larger_numbers(
    source, there, remedy, no_remedy
):
    wanted = settings(sources=[{"name": "s", **source}], pack="document", sequences=2)
    said = shortage(wanted, [2], [9], [there])
    assert said is not None and remedy in said and no_remedy not in said
    assert "sequence_tokens" in said


def test_a_source_that_budgets_leave_nothing_for_is_refused():
    with pytest.raises(UserError, match=r"fill all 4 sequences .* nothing is left for s1:"):
        mixture(mixed(4, {"budget_tokens": 32}, {"weight": 1}))
    assert mixture(mixed(4, {"budget_tokens": 17}, {"budget_tokens": 1})) == [3, 1]
