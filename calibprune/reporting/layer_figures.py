"""Draws the figures of the pruned layers, and builds the tables behind them.

Call the pure functions and save their figures with `style.RC` in effect.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from calibprune import text
from calibprune.reporting import style
from calibprune.reporting.facts import LayerFacts
from calibprune.reporting.style import FULL_WIDTH, HALF_WIDTH, canvas

Quantity = Literal["relative_error", "sparsity"]
MAX_COLUMN = 48
"""Maximum width of a decoder layer's column, in pixels."""
MIN_LABELLED_COLUMN = 36
"""Minimum width, in pixels, of a column with a number in each cell."""


@dataclass(frozen=True)
class LayerTable:
    """One quantity of the pruned linears; NaN where a layer has no such linear."""

    layers: list[int]
    linears: list[str]
    values: Float[np.ndarray, "linears layers"]
    means: Float[np.ndarray, " layers"]
    """Mean of every layer, weighted by parameters."""

    @property
    def finite(self) -> Float[np.ndarray, " some"]:
        return self.values[np.isfinite(self.values)]

    @property
    def rows(self) -> Iterator[tuple[int, list[float | None]]]:
        """Yields (layer, values of its linears followed by their mean), with None in the place of NaN."""
        columns = np.vstack([self.values, self.means]).T.tolist()
        for layer, values in zip(self.layers, columns, strict=True):
            yield layer, [None if math.isnan(value) else value for value in values]


def layer_table(layers: Sequence[LayerFacts], quantity: Quantity) -> LayerTable:
    """Tabulates a quantity. Linears whose names differ only in a number (experts) share a row, which has their mean,
    weighted by parameters.
    """
    layers = sorted(layers, key=lambda layer: layer["layer"])
    linears = list(dict.fromkeys(_kind(name) for layer in layers for name in layer["linears"]))
    sums, weights = np.zeros((2, len(linears), len(layers)))
    for column, layer in enumerate(layers):
        for name, facts in layer["linears"].items():
            row = linears.index(_kind(name))
            sums[row, column] += facts[quantity] * facts["parameters"]
            weights[row, column] += facts["parameters"]
    with np.errstate(invalid="ignore"):  # 0 / 0 gives the NaN of a layer without such a linear
        means = sums.sum(axis=0) / weights.sum(axis=0)
        return LayerTable([layer["layer"] for layer in layers], linears, sums / weights, means)


def _kind(linear: str) -> str:
    """Replaces the numbers in a linear's name: `mlp.experts.7.up_proj` becomes `mlp.experts.*.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", linear)


def layer_map(table: LayerTable, quantity: Quantity) -> Figure:
    """Draws a cell for every decoder layer and linear, and the layers' means above them.

    In a large map of errors the darkest tone stands for the 98th percentile and above, so that one outlier does not
    make the rest pale.
    """
    error = quantity == "relative_error"
    written = text.ratio if error else text.percent
    top = float(np.quantile(table.finite, 0.98 if error and table.finite.size > 50 else 1))
    low = 0.0 if error else float(table.finite.min())
    span = range(table.layers[0], table.layers[-1] + 1)
    cells = np.full((len(table.linears), len(span)), np.nan)
    cells[:, np.subtract(table.layers, span.start)] = table.values
    title = f"{quantity.replace('_', ' ').capitalize()} of every decoder layer and linear"
    width, height = _width(span, table.linears), 21 * len(table.linears)
    has_room = width - style.names_width(table.linears) > MIN_LABELLED_COLUMN * len(span)
    figure = canvas(title, width, (140 if has_room else 180) + height)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[64, height])
    dots = "." if len(span) < 80 else None
    upper.plot(table.layers, table.means, color=style.PRUNED, linewidth=1.7, marker=dots)
    upper.set_title("mean of the layer")
    upper.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    upper.yaxis.set_major_formatter("{x:.4g}" if error else PercentFormatter(1))
    if error:
        upper.set_ylim(0, 1.1 * max(table.means[np.isfinite(table.means)].max(initial=0), 1e-9))
    upper.grid(axis="y")
    upper.xaxis.set_visible(False)
    upper.spines.bottom.set_visible(False)
    labels = np.vectorize(lambda value: "" if math.isnan(value) else written(value))(cells)
    mesh = style.heat_map(lower, cells, span, (low, top), labels if has_room else None)
    style.name_rows(lower, table.linears)
    _layer_axis(lower, span, width)
    if not has_room and low < top:
        bar = figure.colorbar(
            mesh, ax=[upper, lower], location="top", anchor=(0, 0), shrink=0.2, aspect=16,
            boundaries=np.linspace(low, top, 9), drawedges=True,
        )  # fmt: skip
        bar.dividers.set_color(style.CARD)
        above = "≥ " if (table.values > top).any() else ""
        bar.set_ticks([low, top], labels=[written(low), above + written(top)])
        bar.outline.set_visible(False)
    return figure


def layer_seconds(layers: Sequence[LayerFacts]) -> Figure:
    """Draws the seconds of every layer as a bar, stacked by kind of work."""
    positions = [layer["layer"] for layer in layers]
    span = range(min(positions), max(positions) + 1)
    parts = list(dict.fromkeys(part for layer in layers for part in layer["seconds"]))
    hues = [style.SERIES[place % len(style.SERIES)] for place in range(len(parts))]
    width = max(_width(span, []), HALF_WIDTH)
    figure = canvas("Seconds of every decoder layer, by kind of work", width, 230)
    axes, floor = figure.subplots(), np.zeros(len(layers))
    for part, hue in zip(parts, hues, strict=True):
        seconds = np.array([layer["seconds"].get(part, 0.0) for layer in layers])
        axes.bar(positions, seconds, 0.8 * min(1, len(span) / 8), bottom=floor, color=hue)
        floor += seconds
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g} s")
    axes.grid(axis="y")
    _layer_axis(axes, span, width)
    style.legend(figure, zip(parts, hues, strict=True))
    return figure


def _width(span: range, names: Sequence[str]) -> float:
    """Returns the width of a figure with a column for every layer, which is narrow where there are few layers."""
    return min(FULL_WIDTH, style.names_width(names) + 50 + MAX_COLUMN * len(span))


def _layer_axis(axes: Axes, span: range, width: float) -> None:
    axes.set_xlim(span.start - 0.5, span.stop - 0.5)
    axes.xaxis.set_major_locator(
        MaxNLocator(int(width / 30), integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    )
    axes.set_xlabel("decoder layer")
