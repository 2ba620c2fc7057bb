"""Decides which samples are good enough to calibrate on: each filter drops samples that the earlier ones kept.

A dropped sample is marked with a number that encodes the filter and the reason; the text of the reason is made later,
when the sample is stored.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from calibprune.calibration.duplicates import bands, first_equal, first_near
from calibprune.config.curate import (
    DuplicateFilter,
    Filter,
    LengthFilter,
    PerplexityFilter,
    RepetitionFilter,
)

CLAUSES = 4
"""Maximum number of reasons for which one filter may drop a sample."""
KEPT = 0
WORST, BEST, UNDER, OVER = range(CLAUSES)
"""Clauses of the perplexity filter; the length filter has UNDER and OVER."""
SHARE, LONGEST = 0, 1
"""Clauses of the repetition filter."""
EQUAL, NEAR = 0, 1
"""Clauses of the duplicates filter."""


def perplexity(cumulative_logprob: np.ndarray, continuation_tokens: np.ndarray) -> np.ndarray:
    """Returns exp(-cumulative_logprob / tokens) of every sample; infinite for an empty continuation."""
    tokens = np.maximum(continuation_tokens, 1)
    with np.errstate(over="ignore"):
        values = np.exp(-np.asarray(cumulative_logprob, np.float64) / tokens)
    return np.where(continuation_tokens > 0, values, np.inf)


def mark(index: int, clause: int) -> int:
    """Returns the mark of a sample that filter `index` drops for this clause."""
    return 1 + CLAUSES * index + clause


def dropped_by(marks: np.ndarray, index: int) -> np.ndarray:
    """Returns for every sample whether filter `index` dropped it."""
    return (marks >= mark(index, 0)) & (marks < mark(index + 1, 0))


@dataclass
class Outcome:
    """The fate of every sample, in order of sources and rows."""

    marks: UInt8[np.ndarray, " samples"]
    """KEPT, or the `mark` of the filter that dropped the sample."""
    same_as: dict[int, Int32[np.ndarray, " dropped"]] = field(default_factory=dict)
    """Samples that the dropped ones are equal to, in the order of the dropped ones, by filter."""
    cut: float | None = None
    """Perplexity from which on samples were dropped as the worst; the lowest of all sources."""


class Load(Protocol):
    def __call__(self, name: str, samples: Int32[np.ndarray, " some"] | None = None) -> np.ndarray:
        """Loads a column of scores of some samples or all, such as `perplexity`, or `1.band.000` of filter 1."""
        ...


def apply_filters(
    filters: Sequence[Filter], load: Load, sources: Sequence[range]
) -> Iterator[Outcome]:
    """Yields the outcome before the first filter and after each of them, always the same object.

    `sources` are the samples of each source. Of equal samples the later ones are dropped.
    """
    outcome = Outcome(np.zeros(sources[-1].stop if sources else 0, np.uint8))
    yield outcome
    for index, one in enumerate(filters):
        match one:
            case PerplexityFilter():
                values = load("perplexity")
                for source in sources:
                    _by_perplexity(outcome, index, one, values, source)
            case LengthFilter():
                tokens = load("tokens")
                _drop(outcome, mark(index, UNDER), tokens < one.min_tokens)
                if one.max_tokens is not None:
                    _drop(outcome, mark(index, OVER), tokens > one.max_tokens)
            case RepetitionFilter():
                _drop(outcome, mark(index, SHARE), load(share_column(one)) > one.max_share)
                if one.max_repeat_tokens is not None:
                    repeats = load("longest") > one.max_repeat_tokens
                    _drop(outcome, mark(index, LONGEST), repeats)
            case DuplicateFilter():
                _duplicates(outcome, index, one, load)
        yield outcome


def _drop(outcome: Outcome, number: int, condition: np.ndarray) -> None:
    outcome.marks[(outcome.marks == KEPT) & condition] = number


def _by_perplexity(
    outcome: Outcome,
    index: int,
    one: PerplexityFilter,
    values: Float32[np.ndarray, " samples"],
    source: range,
) -> None:
    """Applies the bounds first, then the shares to what is within them; of equal values, later rows are worse."""
    here = slice(source.start, source.stop)
    marks, values = outcome.marks[here], values[here]  # views
    if one.least is not None:
        marks[(marks == KEPT) & (values < one.least)] = mark(index, UNDER)
    if one.most is not None:
        marks[(marks == KEPT) & (values > one.most)] = mark(index, OVER)
    kept = np.flatnonzero(marks == KEPT).astype(np.int32)
    order = kept[np.argsort(values[kept], kind="stable")]
    best, worst = share_of(len(kept), one.drop_best), share_of(len(kept), one.drop_worst)
    marks[order[:best]] = mark(index, BEST)
    marks[order[len(kept) - worst :]] = mark(index, WORST)
    if worst:
        cut = float(values[order[len(kept) - worst]])
        outcome.cut = cut if outcome.cut is None else min(cut, outcome.cut)


def share_of(samples: int, share: float) -> int:
    """Returns the whole samples in a share as written: 29 of 100 for 0.29, though 100 * 0.29 is less in floats."""
    return math.floor(samples * Fraction(str(share)))


def _duplicates(outcome: Outcome, index: int, one: DuplicateFilter, load: Load) -> None:
    kept = np.flatnonzero(outcome.marks == KEPT).astype(np.int32)
    first = kept[first_equal(load("hash", kept))]
    equal = first != kept
    outcome.marks[kept[equal]] = mark(index, EQUAL)
    if one.near:
        distinct, layout = kept[~equal], bands(one.similarity, one.permutations)

        def band(number: int, samples: Int32[np.ndarray, " some"] | None = None) -> np.ndarray:
            wanted = distinct if samples is None else distinct[samples]
            return load(band_column(index, number), wanted)

        near = distinct[first_near(band, len(distinct), layout, one.similarity)]
        outcome.marks[distinct[near != distinct]] = mark(index, NEAR)
        first[~equal] = near
    outcome.same_as[index] = first[first != kept]


def share_column(one: RepetitionFilter) -> str:
    return f"share.{one.ngram}"


def band_column(index: int, number: int) -> str:
    return f"{index}.band.{number:03d}"


def reason(one: Filter, index: int, clause: int, scores: dict[str, Any]) -> str:
    """Describes why a sample was dropped: the filter's name, then the value. `scores` are the sample's, by column."""
    match one:
        case PerplexityFilter():
            why = {
                WORST: f"is among the worst {one.drop_worst:.0%}",
                BEST: f"is among the best {one.drop_best:.0%}",
                UNDER: f"is under {one.least}",
                OVER: f"is above {one.most}",
            }[clause]
            return f"perplexity: {scores['perplexity']:.4g} {why}"
        case LengthFilter():
            limit = f"under {one.min_tokens}" if clause == UNDER else f"over {one.max_tokens}"
            return f"length: {scores['tokens']} tokens, {limit}"
        case RepetitionFilter() if clause == SHARE:
            share = scores[share_column(one)]
            return f"repetition: {share:.0%} of its {one.ngram}-grams occurred before, over {one.max_share:.0%}"
        case RepetitionFilter():
            longest = scores["longest"]
            return f"repetition: {longest} tokens occur twice, over {one.max_repeat_tokens}"
        case DuplicateFilter():
            how = "equal" if clause == EQUAL else "nearly equal"
            return f"duplicates: {how} to row {scores['same_row']} of {scores['same_source']}"
