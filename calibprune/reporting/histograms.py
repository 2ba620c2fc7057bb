"""Histograms of the calibration samples: their perplexity, length and repetition, before and after the filters.

Pure functions from plain values to an SVG string, as the other figures.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from calibprune.reporting import svg, units
from calibprune.reporting.svg import HALF_WIDTH

PLOT_HEIGHT, LEGEND_LEFT = 168.0, 64.0
BETWEEN = (svg.PARTS[2], svg.PARTS[3], svg.PARTS[4], svg.PARTS[6], svg.PARTS[7])
"""Colours of the steps between the first and the last."""


@svg.styled
def pool_histogram(perplexity: Mapping[str, Any]) -> str:
    """How the perplexity of the generated samples is spread, and where the filter cut it.

    `perplexity` holds n+1 `edges`, n `counts`, `median` and `cut`, which is None without a filter and
    infinite where only samples without a perplexity were dropped. The axis is logarithmic where the
    edges are.
    """
    edges, cut = np.asarray(perplexity["edges"], dtype=float), perplexity.get("cut")
    figure = svg.canvas(HALF_WIDTH, 262)
    axes = svg.place(figure, 48, 44, HALF_WIDTH - 62, 168)
    for low, high, height in zip(edges[:-1], edges[1:], perplexity["counts"], strict=True):
        bounds = [low, cut, high] if cut is not None and low < cut < high else [low, high]
        for left, right in itertools.pairwise(bounds):
            kept = cut is None or left < cut
            bar = Rectangle((left, 0), right - left, height, edgecolor=svg.CARD, linewidth=0.7,
                            facecolor=svg.PRUNED if kept else svg.DROPPED)  # fmt: skip
            svg.tip(bar, f"{units.ratio(low)} to {units.ratio(high)}: {units.count(height)}")
            axes.add_artist(bar)
    _axes(axes, edges, max(perplexity["counts"]))
    axes.set_xlabel("perplexity of a sample by the model itself", labelpad=6)
    svg.write(figure, 0, 14, "samples", color=svg.MUTED)
    median = perplexity["median"]
    _mark(axes, f"median {units.ratio(median)}", median, svg.INK, height=1.05, rightmost=0.2)
    if cut is not None and edges[0] <= cut <= edges[-1]:
        _mark(axes, f"cut at {units.ratio(cut)}", cut, svg.DROPPED, height=1.17, rightmost=0.75)
    return svg.serialise(
        figure, "pool", "Histogram of the samples' perplexity and the filter's cut"
    )


@svg.styled
def filter_steps(steps: Sequence[Mapping[str, Any]]) -> str:
    """The samples' perplexity before any filter and after each, drawn over one another.

    A step holds `filter`, None before any, and `perplexity` with `edges`, the same in all, and `counts`.
    """
    names = [f"after {step['filter']}" if step["filter"] else "before any filter" for step in steps]
    edges = np.asarray(steps[0]["perplexity"]["edges"], dtype=float)
    series = [step["perplexity"]["counts"] for step in steps]
    return _overlaid(
        "filter-steps",
        "Histograms of the samples' perplexity before and after every filter",
        "perplexity of a sample by the model itself",
        edges,
        dict(zip(_distinct(names), series, strict=True)),
    )


@svg.styled
def lengths(histogram: Mapping[str, Any]) -> str:
    """Tokens of the samples, `before` and `after` all filters, over common `edges`."""
    return _before_after(
        "lengths", "Histograms of the samples' lengths", "tokens of a sample", histogram
    )


@svg.styled
def repetition(histogram: Mapping[str, Any]) -> str:
    """Share of the samples' n-grams that are repeated, `before` and `after` all filters, over common `edges`."""
    return _before_after(
        "repetition",
        "Histograms of how much the samples repeat themselves",
        "share of a sample's n-grams that stood in it before",
        histogram,
        shares=True,
    )


@svg.styled
def repeats(histogram: Mapping[str, Any]) -> str:
    """Tokens of the longest passage that a sample says twice, `before` and `after` all filters, over common `edges`."""
    return _before_after(
        "repeats",
        "Histograms of the longest passages that samples say twice",
        "tokens of the longest passage that stands in a sample twice",
        histogram,
    )


def _before_after(
    name: str, title: str, label: str, histogram: Mapping[str, Any], *, shares: bool = False
) -> str:
    series = {"before the filters": histogram["before"], "after": histogram["after"]}
    edges = np.asarray(histogram["edges"], dtype=float)
    return _overlaid(name, title, label, edges, series, shares=shares)


def _overlaid(
    name: str,
    title: str,
    label: str,
    edges: np.ndarray,
    series: Mapping[str, Sequence[int]],
    *,
    shares: bool = False,
) -> str:
    """Step histograms over common edges: the first and the last filled, those between as lines."""
    middle = itertools.islice(itertools.cycle(BETWEEN), max(0, len(series) - 2))
    hues = [svg.DENSE, *middle, svg.PRUNED][: len(series)]
    top = 26 + svg.legend_height(HALF_WIDTH, LEGEND_LEFT, series)
    figure = svg.canvas(HALF_WIDTH, top + PLOT_HEIGHT + 50)
    axes = svg.place(figure, 48, top, HALF_WIDTH - 70, PLOT_HEIGHT)
    for place, (counts, hue) in enumerate(zip(series.values(), hues, strict=True)):
        if place in (0, len(series) - 1):
            axes.stairs(counts, edges, fill=True, color=hue, alpha=0.28, linewidth=0)
        axes.stairs(counts, edges, color=hue, linewidth=1.6)
    highest = max([1, *(count for counts in series.values() for count in counts)])
    show = units.percent if shares else units.ratio if edges[-1] < 1000 else units.count
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        column = Rectangle((low, 0), high - low, highest, facecolor=(svg.CARD, 0.004), linewidth=0)
        values = ", ".join(f"{units.count(counts[index])} {one}" for one, counts in series.items())
        svg.tip(column, f"{show(low)} to {show(high)}: {values}")
        axes.add_artist(column)
    _axes(axes, edges, highest)
    if shares:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    axes.set_xlabel(label, labelpad=6)
    svg.write(figure, 0, 14, "samples", color=svg.MUTED)
    svg.legend(figure, LEGEND_LEFT, 14, zip(series, hues, strict=True))
    return svg.serialise(figure, name, title)


def _distinct(names: Sequence[str]) -> list[str]:
    """A filter that is there twice is numbered."""
    return [
        f"{name} ({names[:place].count(name) + 1})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def _axes(axes: Axes, edges: np.ndarray, highest: float) -> None:
    """Both axes of a histogram; the values' is logarithmic where the edges are."""
    if _logarithmic(edges):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(FixedLocator(_log_ticks(edges[0], edges[-1])))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.02 * max(highest, 1))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.count(value)))
    axes.grid(axis="y")


def _mark(
    axes: Axes, label: str, value: float, hue: str, *, height: float, rightmost: float
) -> None:
    """A dashed line from the axis up to its label; beyond `rightmost` the label stands left of it."""
    frame = axes.get_xaxis_transform()
    axes.plot([value, value], [0, height], transform=frame, color=hue, linewidth=1.3,
              dashes=(3, 2), clip_on=False)  # fmt: skip
    at = axes.transAxes.inverted().transform(axes.transData.transform((value, 0)))[0]
    offset, side = (-5, "right") if at > rightmost else (5, "left")
    axes.annotate(label, (value, height), (offset, 0), xycoords=frame, textcoords="offset points",
                  ha=side, va="center", fontsize=11.5, annotation_clip=False)  # fmt: skip


def _logarithmic(edges: np.ndarray) -> bool:
    """Whether the edges are nearer to equal ratios than to equal steps."""
    if len(edges) < 3 or edges[0] <= 0:
        return False
    steps, ratios = np.diff(edges), np.diff(np.log(edges))
    return bool(np.std(ratios) / np.mean(ratios) < np.std(steps) / np.mean(steps))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = math.log10(high / low)
    digits = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]
