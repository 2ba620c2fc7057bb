"""The report's figures: one pure function per figure, from plain values to an SVG string.

Equal input gives equal bytes. Layers and linears without a value are left blank.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from calibprune.reporting import svg, units

HALF_WIDTH, FULL_WIDTH = 464.0, 960.0
LINE_HEIGHT, CELL_HEIGHT = 64.0, 21.0
MOST_COLUMN_WIDTH = 48.0
"""Pixels of one layer, so that a model of two layers gets no billboard."""


def _styled(plot: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(plot)
    def draw(*args, **kwargs) -> str:
        with matplotlib.rc_context(svg.STYLE):
            return plot(*args, **kwargs)

    return draw


@_styled
def perplexity_bars(perplexity: Mapping[str, Mapping[str, Any]]) -> str:
    """Held-out perplexity, a pair of bars (dense, pruned) per text."""
    gutter, rows = _gutter(perplexity), 54 * len(perplexity)
    figure = svg.canvas(HALF_WIDTH, rows + 34)
    axes = svg.place(figure, gutter, 28, HALF_WIDTH - gutter - 74, rows)
    for row, (name, result) in enumerate(perplexity.items()):
        for key, offset, hue in (("dense", -0.19, svg.DENSE), ("pruned", 0.19, svg.PRUNED)):
            value = result.get(key)
            if value is None:
                continue
            length, label = value if math.isfinite(value) else 0, units.perplexity(value)
            (bar,) = axes.barh(row + offset, length, 0.32, color=hue)
            svg.tip(bar, f"{name}, {key}: {label}")
            axes.annotate(label, (length, row + offset), (6, 0), textcoords="offset points",
                          va="center", annotation_clip=False)  # fmt: skip
    _rows(axes, list(perplexity))
    axes.set_xlim(left=0)
    axes.margins(x=0)
    axes.xaxis.set_major_locator(NullLocator())
    axes.spines["bottom"].set_visible(False)
    svg.legend(figure, gutter, 12, [("dense", svg.DENSE), ("pruned", svg.PRUNED)])
    return svg.serialise(figure, "perplexity", "Held-out perplexity of the dense and pruned model")


@_styled
def pool_histogram(perplexity: Mapping[str, Any]) -> str:
    """How the perplexity of the generated samples is spread, and where the filter cut it.

    `perplexity` holds n+1 `edges`, n `counts`, `cut` (or None) and `median`. The axis is logarithmic
    where the edges are.
    """
    edges, cut = np.asarray(perplexity["edges"], dtype=float), perplexity.get("cut")
    figure = svg.canvas(HALF_WIDTH, 262)
    axes = svg.place(figure, 48, 44, HALF_WIDTH - 62, 168)
    for low, high, height in zip(edges[:-1], edges[1:], perplexity["counts"], strict=True):
        bounds = [low, cut, high] if cut is not None and low < cut < high else [low, high]
        for left, right in zip(bounds, bounds[1:], strict=False):
            kept = cut is None or left < cut
            bar = Rectangle((left, 0), right - left, height, edgecolor=svg.CARD, linewidth=0.7,
                            facecolor=svg.PRUNED if kept else svg.DROPPED)  # fmt: skip
            svg.tip(bar, f"{units.ratio(low)} to {units.ratio(high)}: {units.count(height)}")
            axes.add_patch(bar)
    if _logarithmic(edges):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(FixedLocator(_log_ticks(edges[0], edges[-1])))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.02 * max([*perplexity["counts"], 1]))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.count(value)))
    axes.grid(axis="y")
    axes.set_xlabel("perplexity of a sample by the model itself", labelpad=6)
    svg.write(figure, 41, 32, "samples", ha="right", color=svg.MUTED)
    _mark(axes, f"median {units.ratio(perplexity['median'])}", perplexity["median"], svg.INK, 1.04)
    if cut is not None:
        _mark(axes, f"cut at {units.ratio(cut)}", cut, svg.DROPPED, 1.15)
    return svg.serialise(figure, "pool", "Histogram of the samples' perplexity and the filter's cut")


def _mark(axes: Axes, label: str, value: float, hue: str, height: float) -> None:
    """A dashed line from the axis up to its label, which stands on the side that has more room."""
    axes.plot([value, value], [0, height], transform=axes.get_xaxis_transform(), color=hue,
              linewidth=1.3, dashes=(3, 2), clip_on=False)  # fmt: skip
    at = axes.transAxes.inverted().transform(axes.transData.transform((value, 0)))[0]
    axes.annotate(label, (value, height), (-5 if at > 0.6 else 5, 0), va="center", fontsize=11.5,
                  xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                  ha="right" if at > 0.6 else "left", annotation_clip=False)  # fmt: skip


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


@_styled
def layer_map(
    layers: Sequence[Mapping[str, Any]], quantity: Literal["relative_error", "sparsity"]
) -> str:
    """A cell per decoder layer and linear; above it the layers' means, weighted by parameters.

    Linears whose names differ only in a number (experts) share a row. The full tone stands for the
    98th percentile and above, so that one outlier does not bleach the rest.
    """
    error = quantity == "relative_error"
    say = units.ratio if error else units.percent
    positions, names, table, means = layer_table(layers, quantity)
    finite = table[np.isfinite(table)]
    top = float(np.quantile(finite, 0.98)) if finite.size else 1.0
    bottom = 0.0 if error else float(finite.min(initial=top))
    span, gutter = positions[-1] - positions[0] + 1, _gutter(names)
    column = min(MOST_COLUMN_WIDTH, (FULL_WIDTH - gutter - 12) / span)
    width, rows = column * span, CELL_HEIGHT * len(names)
    figure = svg.canvas(max(gutter + width + 12, gutter + 250), 48 + LINE_HEIGHT + 14 + rows + 44)
    upper = svg.place(figure, gutter, 48, width, LINE_HEIGHT)
    lower = svg.place(figure, gutter, 48 + LINE_HEIGHT + 14, width, rows)

    upper.plot(positions, means, color=svg.PRUNED, linewidth=1.7, marker="o", clip_on=False,
               markersize=3.5 if column > 14 else 0)  # fmt: skip
    if error:
        upper.set_ylim(0, 1.1 * max(means[np.isfinite(means)].max(initial=0), 1e-9))
    upper.set_xlim(positions[0] - 0.5, positions[-1] + 0.5)
    upper.xaxis.set_major_locator(NullLocator())
    upper.yaxis.set_major_locator(MaxNLocator(3))
    upper.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.4g}" if error else f"{100 * value:.4g}%")
    )
    upper.grid(axis="y")
    upper.spines["bottom"].set_visible(False)
    svg.write(figure, gutter, 34, "mean of the layer", color=svg.MUTED)

    for row, index in np.ndindex(*table.shape):
        value, position = float(table[row, index]), positions[index]
        if math.isnan(value):
            continue
        tone = 1.0 if top <= bottom else min(1.0, max(0.0, (value - bottom) / (top - bottom)))
        cell = _cell(lower, position - 0.5, row - 0.5, 1, 1, tone, min(1.5, 0.12 * column))
        svg.tip(cell, f"layer {position}, {names[row]}: {say(value)}")
        if column >= 34:
            lower.text(position, row, say(value), ha="center", va="center", fontsize=10.5,
                       color=svg.ON_HEAT if tone > 0.55 else svg.INK)  # fmt: skip
    _rows(lower, names)
    _layer_axis(lower, positions, column)

    scale = svg.place(figure, gutter + 44, 6, 120, 10)
    scale.set_axis_off()
    for step in range(8):
        _cell(scale, step / 8, 0, 1 / 8, 1, step / 7, 0)
    above = "≥ " if finite.max(initial=top) > top else ""
    svg.write(figure, gutter + 38, 11, say(bottom), ha="right", color=svg.MUTED)
    svg.write(figure, gutter + 170, 11, above + say(top), color=svg.MUTED)
    title = f"{quantity.replace('_', ' ').capitalize()} per decoder layer and linear"
    return svg.serialise(figure, quantity.replace("_", "-"), title)


def _cell(
    axes: Axes, x: float, y: float, width: float, height: float, tone: float, gap: float
) -> Rectangle:
    """A rectangle in a tone from 0 (a trace of colour) to 1, with `gap` pixels to its neighbours."""
    cell = Rectangle((x, y), width, height, edgecolor=svg.CARD, linewidth=gap,
                     facecolor=(svg.PRUNED, 0.07 + 0.93 * tone))  # fmt: skip
    return cast(Rectangle, axes.add_patch(cell))


def layer_table(
    layers: Sequence[Mapping[str, Any]], quantity: str
) -> tuple[list[int], list[str], np.ndarray, np.ndarray]:
    """(layers, linears, values [linear, layer], mean of every layer), weighted by parameters; NaN where none."""
    layers = sorted(layers, key=lambda layer: layer["layer"])
    positions = [layer["layer"] for layer in layers]
    names = list(dict.fromkeys(_kind(name) for layer in layers for name in layer["linears"]))
    sums, weights = np.zeros((2, len(names), len(layers)))
    for column, layer in enumerate(layers):
        for name, linear in layer["linears"].items():
            if linear.get(quantity) is not None:
                row = names.index(_kind(name))
                sums[row, column] += linear[quantity] * linear["parameters"]
                weights[row, column] += linear["parameters"]
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is meant
        return positions, names, sums / weights, sums.sum(axis=0) / weights.sum(axis=0)


def _kind(linear: str) -> str:
    """`mlp.experts.7.up_proj` -> `mlp.experts.*.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", linear)


@_styled
def stage_seconds(stages: Mapping[str, Mapping[str, float]]) -> str:
    """Seconds per stage as horizontal bars."""
    gutter, rows = _gutter(stages), 34 * len(stages)
    figure = svg.canvas(HALF_WIDTH, rows + 8)
    axes = svg.place(figure, gutter, 4, HALF_WIDTH - gutter - 90, rows)
    for row, (name, stage) in enumerate(stages.items()):
        label = units.duration(stage["seconds"])
        (bar,) = axes.barh(row, stage["seconds"], 0.6, color=svg.PRUNED)
        svg.tip(bar, f"{name}: {label}")
        axes.annotate(label, (stage["seconds"], row), (6, 0), textcoords="offset points",
                      va="center", annotation_clip=False)  # fmt: skip
    _rows(axes, list(stages))
    axes.set_xlim(0, max([1e-9, *(stage["seconds"] for stage in stages.values())]))
    axes.xaxis.set_major_locator(NullLocator())
    axes.spines["bottom"].set_visible(False)
    return svg.serialise(figure, "stages", "Seconds per stage")


@_styled
def layer_seconds(layers: Sequence[Mapping[str, Any]]) -> str:
    """Where the seconds of every layer went, stacked."""
    positions = [layer["layer"] for layer in layers]
    parts = list(dict.fromkeys(part for layer in layers for part in layer["seconds"]))
    first, last = min(positions), max(positions)
    gutter, span = 52.0, last - first + 1
    column = min(MOST_COLUMN_WIDTH, (FULL_WIDTH - gutter - 12) / span)
    figure = svg.canvas(max(gutter + column * span + 12, HALF_WIDTH), 250)
    axes = svg.place(figure, gutter, 44, column * span, 160)
    floor = np.zeros(len(layers))
    for index, part in enumerate(parts):
        seconds = np.array([layer["seconds"].get(part, 0.0) for layer in layers])
        bars = axes.bar(positions, seconds, min(0.8, 28 / column), bottom=floor,
                        color=svg.PARTS[index % len(svg.PARTS)])  # fmt: skip
        for bar, position, value in zip(bars, positions, seconds, strict=True):
            svg.tip(bar, f"layer {position}, {part}: {units.duration(value)}")
        floor += seconds
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    axes.grid(axis="y")
    _layer_axis(axes, positions, column)
    svg.legend(
        figure, gutter, 14, [(part, svg.PARTS[i % len(svg.PARTS)]) for i, part in enumerate(parts)]
    )
    return svg.serialise(figure, "layer-seconds", "Seconds per decoder layer, by kind of work")


def _gutter(names: Sequence[str] | Mapping[str, Any]) -> float:
    return min(230.0, max(map(svg.text_width, names), default=0.0) + 14)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """One named row after the other, the first on top."""
    shown = [name if len(name) <= 34 else f"{name[:16]}…{name[-17:]}" for name in names]
    axes.set_yticks(range(len(names)), shown, color=svg.INK)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _layer_axis(axes: Axes, positions: Sequence[int], column: float) -> None:
    """Layer numbers at round steps, as close as `column` pixels per layer allow."""
    first, last = min(positions), max(positions)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if s * column >= 24 or s > last)
    axes.xaxis.set_major_locator(
        FixedLocator([n for n in range(first, last + 1) if n % step == 0] or [first])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("decoder layer", labelpad=6)
