"""Every filter against its description; and filters apply in turn."""

import math

import numpy as np
import pytest

from calibprune.calibration.filters import (
    BEST,
    CLAUSES,
    KEPT,
    OVER,
    UNDER,
    WORST,
    apply_filters,
    dropped_by,
    mark,
    perplexity,
    reason,
    share_of,
)
from calibprune.calibration.scores import score_samples
from calibprune.config.curate import MAX_FILTERS
from tests.calibprune.calibration.samples import sample_table, settings

RNG = np.random.default_rng(0)


def marks(filters, sources=None, **columns):
    wanted = settings(filters=filters).filters
    columns = {name: np.asarray(values) for name, values in columns.items()}
    samples = len(next(iter(columns.values())))
    columns = {name.replace("_", "."): values for name, values in columns.items()}
    outcomes = list(apply_filters(wanted, loading(columns), sources or [range(samples)]))
    assert len(outcomes) == len(filters) + 1
    return outcomes[-1]


def loading(columns):
    return lambda name, some=None: columns[name] if some is None else columns[name][some]


def test_a_mark_has_room_for_every_filter_that_a_configuration_may_have():
    assert mark(MAX_FILTERS - 1, CLAUSES - 1) < 256 <= mark(MAX_FILTERS, CLAUSES - 1)
    many = [{"type": "length", "max_tokens": 1000 - index} for index in range(MAX_FILTERS)]
    outcome = marks(many, tokens=[100, 999, 939])
    assert dropped(outcome) == [1, 2]
    assert dropped(outcome, 2) == [1] and dropped(outcome, MAX_FILTERS - 1) == [2]
    with pytest.raises(ValueError, match="at most 63"):
        settings(filters=[*many, many[0]])


def dropped(outcome, index=None):
    here = outcome.marks != KEPT if index is None else dropped_by(outcome.marks, index)
    return np.flatnonzero(here).tolist()


def test_perplexity_is_the_exponential_of_the_mean():
    values = perplexity(np.array([-4.0, 0.0, -3.0, -9e9]), np.array([2, 5, 0, 1]))
    assert values[0] == pytest.approx(math.e**2) and values[1] == 1
    assert math.isinf(values[2]) and math.isinf(values[3])


def test_the_worst_share_is_dropped_exactly():
    values = RNG.permutation(np.linspace(2, 50, 25)).astype(np.float32)
    values[3] = np.inf
    outcome = marks([{"type": "perplexity"}], perplexity=values)
    assert dropped(outcome) == sorted(np.argsort(values)[-5:])
    assert outcome.cut == sorted(values)[-5]


def test_both_tails_and_bounds():
    values = np.arange(1, 21, dtype=np.float32)
    one = {"type": "perplexity", "drop_worst": 0.1, "drop_best": 0.2, "least": 3, "most": 12}
    outcome = marks([one], perplexity=values)
    expected = np.full(20, KEPT)
    expected[values < 3], expected[values > 12] = mark(0, UNDER), mark(0, OVER)
    expected[[2, 3]], expected[11] = mark(0, BEST), mark(0, WORST)
    assert outcome.marks.tolist() == expected.tolist()


def test_shares_are_of_every_source_by_itself():
    values = np.concatenate([np.arange(1, 11), np.arange(101, 131)]).astype(np.float32)
    outcome = marks(
        [{"type": "perplexity", "drop_worst": 0.1}],
        sources=[range(10), range(10, 40)],
        perplexity=values,
    )
    assert dropped(outcome) == [9, 37, 38, 39] and outcome.cut == 10


def test_ties_drop_the_later_rows():
    assert dropped(marks([{"type": "perplexity"}], perplexity=np.ones(10, np.float32))) == [8, 9]


def test_filters_apply_in_turn_each_to_what_is_left():
    filters = [
        {"type": "length", "min_tokens": 4, "max_tokens": 10},
        {"type": "perplexity", "drop_worst": 0.2},
    ]
    tokens = [3] * 5 + [9] * 5 + [11]
    outcome = marks(filters, tokens=tokens, perplexity=np.arange(11, dtype=np.float32))
    assert dropped(outcome, 0) == [0, 1, 2, 3, 4, 10] and dropped(outcome, 1) == [9]
    assert outcome.marks[10] == mark(0, OVER) and outcome.marks[0] == mark(0, UNDER)


def test_repetition_drops_loops_and_long_quotations():
    filters = [{"type": "repetition", "max_share": 0.5, "max_repeat_tokens": 6}]
    outcome = marks(filters, **{"share_4": [0.5, 0.6, 0.1], "longest": [6, 2, 7]})
    assert outcome.marks.tolist() == [KEPT, mark(0, 0), mark(0, 1)]


def scored(samples, filters):
    return score_samples(sample_table(samples), settings(filters=filters).filters)


def test_duplicates_keep_the_first_that_the_filters_before_kept():
    text, other = RNG.integers(0, 9999, (2, 300)).tolist()
    nearly = [*text[:-2], 1, 2]
    samples = [[5, 6], text, other, text, nearly, other, text[:5]]
    filters = [{"type": "length", "min_tokens": 3}, {"type": "duplicates"}]
    columns = scored(samples, filters)
    sources = [range(3), range(3, 7)]
    wanted = settings(filters=filters).filters
    outcome = list(apply_filters(wanted, loading(columns), sources))[-1]
    assert dropped(outcome, 0) == [0] and dropped(outcome, 1) == [3, 4, 5]
    assert outcome.marks[[3, 4, 5]].tolist() == [mark(1, 0), mark(1, 1), mark(1, 0)]
    assert outcome.same_as[1].tolist() == [1, 1, 2]
    filters[1]["near"] = False
    outcome = list(apply_filters(settings(filters=filters).filters, loading(columns), sources))
    assert dropped(outcome[-1], 1) == [3, 5]


def test_every_clause_has_its_words_and_starts_with_the_filter():
    known = {
        "perplexity": 12.3456, "tokens": 3, "share.4": 0.75, "longest": 40,
        "same_source": "c4", "same_row": 17,
    }  # fmt: skip
    filters = [
        {"type": "perplexity", "drop_best": 0.05, "least": 2, "most": 9},
        {"type": "length", "min_tokens": 4, "max_tokens": 9},
        {"type": "repetition", "max_repeat_tokens": 32},
        {"type": "duplicates"},
    ]
    found = {
        (one.type, clause): reason(one, 0, clause, known)
        for one in settings(filters=filters).filters
        for clause in range(CLAUSES)
        if one.type == "perplexity" or clause < 2 or (one.type == "length" and clause >= UNDER)
    }
    assert all(text.startswith(f"{kind}: ") for (kind, _), text in found.items())
    assert found["perplexity", WORST] == "perplexity: 12.35 is among the worst 20%"
    assert found["perplexity", BEST] == "perplexity: 12.35 is among the best 5%"
    assert found["perplexity", OVER] == "perplexity: 12.35 is above 9.0"
    assert found["length", UNDER] == "length: 3 tokens, under 4"
    assert found["repetition", 0].endswith("75% of its 4-grams occurred before, over 50%")
    assert found["repetition", 1] == "repetition: 40 tokens occur twice, over 32"
    assert found["duplicates", 0] == "duplicates: equal to row 17 of c4"
    assert found["duplicates", 1] == "duplicates: nearly equal to row 17 of c4"


def test_a_share_is_taken_as_it_is_written():
    for hundredths in range(100):
        for samples in (0, 1, 99, 100, 5000, 10_000_000):
            assert share_of(samples, hundredths / 100) == samples * hundredths // 100
