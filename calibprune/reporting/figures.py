"""Draws the report's figures: one pure function per figure, from facts of the report to a matplotlib Figure.

Call the functions and save the figures with `style.RC` in effect.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from calibprune import text
from calibprune.reporting import style
from calibprune.reporting.facts import (
    BeforeAfter,
    EvaluateFacts,
    FilterStep,
    Likeness,
    MinKFacts,
    StageFacts,
)
from calibprune.reporting.style import FULL_WIDTH, HALF_WIDTH, canvas

Measure = Literal["jaccard", "coverage", "unigram_js"]
MEASURES: dict[Measure, tuple[str, Callable[[float], str]]] = {
    "jaccard": ("N-grams in common", text.percent),
    "coverage": ("N-grams found in the reference", text.percent),
    "unigram_js": ("Unigram divergence", lambda bits: f"{bits:.3f}"),
}
"""For every measure of similarity, the title of its figure and the function that formats its values."""

ROW_HEIGHT = 34
"""Height of a row of bars, in pixels."""
MAX_NARROW_REFERENCES = 4
"""Maximum number of references in a figure of half the page's width."""


def perplexity_bars(perplexity: Mapping[str, EvaluateFacts]) -> Figure:
    """Draws held-out perplexity as a pair of bars (dense, pruned) for every text; infinity and NaN have no bar."""
    title = "Held-out perplexity of the dense and of the pruned model"
    figure = canvas(title, HALF_WIDTH, 10 + 54 * len(perplexity))
    axes = figure.subplots()
    for key, offset, hue in (("dense", -0.19, style.DENSE), ("pruned", 0.19, style.PRUNED)):
        values = [facts[key] for facts in perplexity.values()]
        lengths = [value if math.isfinite(value) else 0 for value in values]
        bars = axes.barh(np.arange(len(values)) + offset, lengths, 0.32, color=hue)
        axes.bar_label(bars, [text.perplexity(value) for value in values], padding=6)
    _bar_rows(axes, perplexity)
    style.legend(figure, [("dense", style.DENSE), ("pruned", style.PRUNED)])
    return figure


def stage_seconds(stages: Mapping[str, StageFacts]) -> Figure:
    """Draws the working time of every stage."""
    figure = canvas("Time of every stage", HALF_WIDTH, 10 + ROW_HEIGHT * len(stages))
    axes = figure.subplots()
    seconds = [facts["seconds"] for facts in stages.values()]
    bars = axes.barh(range(len(seconds)), seconds, 0.6, color=style.PRUNED)
    axes.bar_label(bars, [text.duration(value) for value in seconds], padding=6)
    _bar_rows(axes, stages)
    return figure


def filter_bars(steps: Sequence[FilterStep]) -> Figure:
    """Draws the samples that each filter kept and dropped, of those that reached it; every step must have a filter."""
    figure = canvas(
        "Samples that every filter kept and dropped", HALF_WIDTH, 10 + ROW_HEIGHT * len(steps)
    )
    axes, rows = figure.subplots(), range(len(steps))
    kept = np.array([step["kept"] for step in steps])
    dropped = np.array([step["dropped"] for step in steps])
    shares = dropped / np.maximum(kept + dropped, 1)
    labels = [
        f"{text.count(number)} ({text.percent(share)})"
        for number, share in zip(dropped, shares, strict=True)
    ]
    axes.barh(rows, kept, 0.6, color=style.PRUNED)
    bars = axes.barh(rows, dropped, 0.6, left=kept, color=style.DROPPED)
    axes.bar_label(bars, labels, padding=6)
    _bar_rows(axes, [step["filter"] or "" for step in steps])
    style.legend(figure, [("kept", style.PRUNED), ("dropped", style.DROPPED)])
    return figure


def filter_steps(steps: Sequence[FilterStep]) -> Figure:
    """Draws histograms of the samples' perplexity before any filter and after each, over the same edges."""
    names = ["before any filter"]
    for number, step in enumerate(steps[1:], 1):
        again = sum(step["filter"] == other["filter"] for other in steps) > 1
        names.append(f"after {step['filter']}" + (f" (filter {number})" if again else ""))
    edges = steps[0]["perplexity"]["edges"]
    figure, axes = _histograms(
        "Histograms of the samples' perplexity before and after every filter",
        edges,
        [(name, step["perplexity"]["counts"]) for name, step in zip(names, steps, strict=True)],
    )
    axes.set_xscale("log")
    decades = math.log10(edges[-1] / edges[0])
    digits = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=digits))
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("perplexity of a sample by the model itself")
    return figure


def lengths(histogram: BeforeAfter) -> Figure:
    """Draws histograms of the samples' lengths in tokens, before and after all filters."""
    figure, axes = _before_and_after("Histograms of the samples' lengths", histogram)
    axes.set_xlabel("tokens of a sample")
    return figure


def repetition(histogram: BeforeAfter) -> Figure:
    """Draws histograms of the share of a sample's n-grams that are repeated, before and after all filters."""
    title = "Histograms of how much the samples repeat themselves"
    figure, axes = _before_and_after(title, histogram)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("share of a sample's n-grams that occurred in it before")
    return figure


def repeats(histogram: BeforeAfter) -> Figure:
    """Draws histograms of the tokens of the longest passage that a sample repeats, before and after all filters."""
    title = "Histograms of the longest passages that occur twice in a sample"
    figure, axes = _before_and_after(title, histogram)
    axes.set_xlabel("tokens of the longest passage that occurs twice in a sample")
    return figure


def _before_and_after(title: str, histogram: BeforeAfter) -> tuple[Figure, Axes]:
    series = [("before the filters", histogram["before"]), ("after", histogram["after"])]
    figure, axes = _histograms(title, histogram["edges"], series)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter("{x:,.10g}")
    return figure, axes


def _histograms(
    title: str, edges: Sequence[float], series: Sequence[tuple[str, Sequence[int]]]
) -> tuple[Figure, Axes]:
    """Draws histograms over one another: the first and the last filled, those between as lines."""
    between = [hue for hue in style.SERIES if hue not in (style.DENSE, style.PRUNED, style.DROPPED)]
    middle = [between[place % len(between)] for place in range(len(series) - 2)]
    hues = [style.DENSE, *middle, style.PRUNED][: len(series)]
    figure = canvas(title, HALF_WIDTH, 240)
    axes = figure.subplots()
    for place, ((_, counts), hue) in enumerate(zip(series, hues, strict=True)):
        if place in (0, len(series) - 1):
            axes.stairs(counts, edges, fill=True, color=hue, alpha=0.28, linewidth=0)
        axes.stairs(counts, edges, color=hue, linewidth=1.6)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.02 * max(1, *(max(counts) for _, counts in series)))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y")
    axes.set_ylabel("samples")
    style.legend(figure, [(name, hue) for (name, _), hue in zip(series, hues, strict=True)])
    return figure, axes


def similarity_map(similarity: Mapping[str, Mapping[str, Likeness]], measure: Measure) -> Figure:
    """Draws one measure of similarity in a cell for each source (row) and reference (column), darker where higher."""
    title, written = MEASURES[measure]
    references = list(next(iter(similarity.values())))
    values = np.array([[row[name][measure] for name in references] for row in similarity.values()])
    tones = -values if measure == "unigram_js" else values
    labels = np.vectorize(written)(values)
    names = [style.shortened(name, 20) for name in references]
    width = HALF_WIDTH if len(names) <= MAX_NARROW_REFERENCES else FULL_WIDTH
    slanted = style.names_width(similarity) + style.names_width(names) * len(names) > width
    figure = canvas(title, width, 30 * len(values) + (100 if slanted else 24))
    axes = figure.subplots()
    style.heat_map(axes, tones, range(len(names)), (tones.min(), tones.max()), labels)
    style.name_rows(axes, similarity)
    axes.tick_params("x", labeltop=True, labelbottom=False, rotation=30 if slanted else 0)
    axes.set_xticks(range(len(names)), names, ha="left" if slanted else "center")
    return figure


def min_k_rows(min_k: MinKFacts) -> Figure:
    """Draws a small histogram of the documents' Min-K%++ scores, with the mean, for every source and reference."""
    hues = {"source": style.PRUNED, "reference": style.DENSE}
    rows = [(name, facts, hues["source"]) for name, facts in min_k["sources"].items()]
    rows += [(name, facts, hues["reference"]) for name, facts in min_k["references"].items()]
    title = "Min-K%++ scores of sources and references"
    figure = canvas(title, FULL_WIDTH, 50 + 42 * len(rows))
    axes = figure.subplots()
    for row, (_, facts, hue) in enumerate(rows):
        edges, counts = facts["values"]["edges"], np.array(facts["values"]["counts"])
        tops = row + 0.45 - 0.84 * counts / max(counts.max(), 1)
        axes.stairs(tops, edges, baseline=row + 0.45, fill=True, color=hue, alpha=0.45, linewidth=0)
        axes.plot([facts["mean"]] * 2, [row + 0.45, row - 0.4], color=style.INK, linewidth=1.6)
        mean = f"mean {facts['mean']:.2f}".replace("-", text.MINUS)
        axes.annotate(mean, (1, row), (8, 0), axes.get_yaxis_transform(), "offset points", va="center")  # fmt: skip
    style.name_rows(axes, [name for name, *_ in rows])
    edges = rows[0][1]["values"]["edges"]
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.grid(axis="x")
    axes.set_xlabel("Min-K%++ score of a document; higher: more like what the model was trained on")
    style.legend(figure, hues.items())
    return figure


def _bar_rows(axes: Axes, names: Iterable[str]) -> None:
    """Names the rows of bars and hides the axis of values, which the bars' labels make unnecessary."""
    style.name_rows(axes, names)
    axes.set_xlim(left=0)
    axes.margins(x=0)
    axes.xaxis.set_visible(False)
    axes.spines.bottom.set_visible(False)
