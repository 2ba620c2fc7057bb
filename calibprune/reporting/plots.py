"""The report's figures: one pure function per figure, from plain values to an SVG string.

Equal input gives equal bytes. Layers and linears without a value are left blank.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from calibprune.reporting import svg, units
from calibprune.reporting.svg import FULL_WIDTH, HALF_WIDTH

LINE_HEIGHT, CELL_HEIGHT = 64.0, 21.0
MOST_COLUMN_WIDTH = 48.0
"""Pixels of one layer, so that a model of two layers gets no billboard."""


@svg.styled
def perplexity_bars(perplexity: Mapping[str, Mapping[str, Any]]) -> str:
    """Held-out perplexity, a pair of bars (dense, pruned) per text."""
    gutter, rows = svg.gutter(perplexity), 54 * len(perplexity)
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
    svg.rows(axes, list(perplexity))
    axes.set_xlim(left=0)
    axes.margins(x=0)
    axes.xaxis.set_major_locator(NullLocator())
    axes.spines["bottom"].set_visible(False)
    svg.legend(figure, gutter, 12, [("dense", svg.DENSE), ("pruned", svg.PRUNED)])
    return svg.serialise(figure, "perplexity", "Held-out perplexity of the dense and pruned model")


@svg.styled
def layer_map(
    layers: Sequence[Mapping[str, Any]], quantity: Literal["relative_error", "sparsity"]
) -> str:
    """A cell per decoder layer and linear; above it the layers' means, weighted by parameters.

    Linears whose names differ only in a number (experts) share a row. In a large map the full tone
    stands for the 98th percentile and above, so that one outlier does not bleach the rest.
    """
    error = quantity == "relative_error"
    say = units.ratio if error else units.percent
    positions, names, table, means = layer_table(layers, quantity)
    finite = table[np.isfinite(table)]
    top = float(np.quantile(finite, 0.98 if finite.size > 50 else 1)) if finite.size else 1.0
    bottom = 0.0 if error else float(finite.min(initial=top))
    span, gutter = positions[-1] - positions[0] + 1, svg.gutter(names)
    column = min(MOST_COLUMN_WIDTH, (FULL_WIDTH - gutter - 12) / span)
    width, rows = column * span, CELL_HEIGHT * len(names)
    figure = svg.canvas(max(gutter + width + 12, gutter + 250), 48 + LINE_HEIGHT + 14 + rows + 44)
    upper = svg.place(figure, gutter, 48, width, LINE_HEIGHT)
    _mean_line(upper, positions, means, error, column)
    svg.write(figure, gutter, 34, "mean of the layer", color=svg.MUTED)
    lower = svg.place(figure, gutter, 48 + LINE_HEIGHT + 14, width, rows)
    for row, index in np.ndindex(*table.shape):
        value, position = float(table[row, index]), positions[index]
        if math.isnan(value):
            continue
        tone = 1.0 if top <= bottom else min(1.0, max(0.0, (value - bottom) / (top - bottom)))
        cell = _cell(lower, (position - 0.5, row - 0.5), (1, 1), tone, min(1.5, 0.12 * column))
        svg.tip(cell, f"layer {position}, {names[row]}: {say(value)}")
        if column >= 34:
            lower.text(position, row, say(value), ha="center", va="center", fontsize=10.5,
                       color=svg.ON_HEAT if tone > 0.55 else svg.INK)  # fmt: skip
    svg.rows(lower, names)
    _layer_axis(lower, positions, column)

    above = "≥ " if finite.max(initial=top) > top else ""
    _tone_scale(figure, gutter, say(bottom) if bottom else "0", above + say(top))
    title = f"{quantity.replace('_', ' ').capitalize()} per decoder layer and linear"
    return svg.serialise(figure, quantity.replace("_", "-"), title)


def _mean_line(
    axes: Axes, positions: Sequence[int], means: np.ndarray, error: bool, column: float
) -> None:
    axes.plot(positions, means, color=svg.PRUNED, linewidth=1.7, marker="o", clip_on=False,
              markersize=3.5 if column > 14 else 0)  # fmt: skip
    if error:
        axes.set_ylim(0, 1.1 * max(means[np.isfinite(means)].max(initial=0), 1e-9))
    axes.set_xlim(positions[0] - 0.5, positions[-1] + 0.5)
    axes.xaxis.set_major_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.4g}" if error else f"{100 * value:.4g}%")
    )
    axes.grid(axis="y")
    axes.spines["bottom"].set_visible(False)


def _tone_scale(figure: Figure, left: float, low: str, high: str) -> None:
    axes = svg.place(figure, left + 44, 6, 120, 10)
    axes.set_axis_off()
    for step in range(8):
        _cell(axes, (step / 8, 0), (1 / 8, 1), step / 7, 0)
    svg.write(figure, left + 38, 11, low, ha="right", color=svg.MUTED)
    svg.write(figure, left + 170, 11, high, color=svg.MUTED)


def _cell(
    axes: Axes, corner: tuple[float, float], extent: tuple[float, float], tone: float, gap: float
) -> Rectangle:
    """A rectangle in a tone from 0 (a trace of colour) to 1, with `gap` pixels to its neighbours."""
    cell = Rectangle(corner, *extent, edgecolor=svg.CARD, linewidth=gap,
                     facecolor=(svg.PRUNED, 0.07 + 0.93 * tone))  # fmt: skip
    axes.add_artist(cell)
    return cell


def layer_table(
    layers: Sequence[Mapping[str, Any]], quantity: str
) -> tuple[list[int], list[str], np.ndarray, np.ndarray]:
    """(layers, linears, values [linear, layer], layer means): weighted by parameters, NaN where none."""
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


@svg.styled
def stage_seconds(stages: Mapping[str, Mapping[str, float]]) -> str:
    """Seconds per stage as horizontal bars."""
    gutter, rows = svg.gutter(stages), 34 * len(stages)
    figure = svg.canvas(HALF_WIDTH, rows + 8)
    axes = svg.place(figure, gutter, 4, HALF_WIDTH - gutter - 90, rows)
    for row, (name, stage) in enumerate(stages.items()):
        label = units.duration(stage["seconds"])
        (bar,) = axes.barh(row, stage["seconds"], 0.6, color=svg.PRUNED)
        svg.tip(bar, f"{name}: {label}")
        axes.annotate(label, (stage["seconds"], row), (6, 0), textcoords="offset points",
                      va="center", annotation_clip=False)  # fmt: skip
    svg.rows(axes, list(stages))
    axes.set_xlim(0, max([1e-9, *(stage["seconds"] for stage in stages.values())]))
    axes.xaxis.set_major_locator(NullLocator())
    axes.spines["bottom"].set_visible(False)
    return svg.serialise(figure, "stages", "Seconds per stage")


@svg.styled
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
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    axes.grid(axis="y")
    _layer_axis(axes, positions, column)
    svg.legend(
        figure, gutter, 14, [(part, svg.PARTS[i % len(svg.PARTS)]) for i, part in enumerate(parts)]
    )
    return svg.serialise(figure, "layer-seconds", "Seconds per decoder layer, by kind of work")


def _layer_axis(axes: Axes, positions: Sequence[int], column: float) -> None:
    """Layer numbers at round steps, as close as `column` pixels per layer allow."""
    first, last = min(positions), max(positions)
    step = next(
        s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if s * column >= 24 or s > last
    )
    axes.xaxis.set_major_locator(
        FixedLocator([n for n in range(first, last + 1) if n % step == 0] or [first])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("decoder layer", labelpad=6)
