"""Which samples are good enough to calibrate on: each filter keeps a sample or says why not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibprune.config import Filter, LengthFilter, PerplexityFilter


@dataclass(frozen=True)
class Scores:
    """What is known of every sample, one array entry each, in row order."""

    row: np.ndarray
    tokens: np.ndarray
    """Prefix and continuation."""
    perplexity: np.ndarray
    """exp(-mean log-probability) of the continuation, given the prefix, under the model itself."""


def perplexity(cumulative_logprob: np.ndarray, continuation_tokens: np.ndarray) -> np.ndarray:
    """exp(-cumulative_logprob / tokens) for every sample; infinite for an empty continuation."""
    tokens = np.maximum(continuation_tokens, 1)
    values = np.exp(-np.asarray(cumulative_logprob, np.float64) / tokens)
    return np.where(continuation_tokens > 0, values, np.inf)


def filter_samples(
    scores: Scores, filters: Sequence[Filter]
) -> tuple[list[str | None], float | None]:
    """(reason for dropping or None, for every sample; the perplexity above which samples were dropped).

    Filters apply in turn, each to what the ones before it kept. A reason starts with the filter's name.
    """
    reasons: list[str | None] = [None] * len(scores.row)
    cut = None
    for one in filters:
        kept = np.array([reason is None for reason in reasons])
        match one:
            case LengthFilter():
                for index in np.flatnonzero(kept & (scores.tokens < one.min_tokens)):
                    reasons[index] = (
                        f"length: {scores.tokens[index]} tokens, under {one.min_tokens}"
                    )
            case PerplexityFilter():
                dropped = _worst(scores, np.flatnonzero(kept), one.drop_worst)
                if len(dropped):
                    cut = float(scores.perplexity[dropped].min())
                for index in dropped:
                    value = scores.perplexity[index]
                    reasons[index] = (
                        f"perplexity: {value:.4g} is among the worst {one.drop_worst:.0%}"
                    )
    return reasons, cut


def _worst(scores: Scores, candidates: np.ndarray, fraction: float) -> np.ndarray:
    """The given fraction of the candidates with the highest perplexity; of equals, later rows first."""
    count = int(len(candidates) * fraction)
    order = np.lexsort((scores.row[candidates], scores.perplexity[candidates]))
    return candidates[order[len(candidates) - count :]]
