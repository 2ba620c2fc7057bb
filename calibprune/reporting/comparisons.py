"""Figures of the sources: what the filters left of the samples, and how near sources are to reference corpora.

Pure functions from plain values to an SVG string, as the other figures.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from calibprune.reporting import svg, units
from calibprune.reporting.svg import FULL_WIDTH, HALF_WIDTH

MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "jaccard": ("n-grams in common", units.percent),
    "coverage": ("n-grams found in the reference", units.percent),
    "unigram_js": ("unigram divergence", lambda bits: f"{bits:.3f}"),
}
"""For each measure of likeness the title of its map and how a value is written."""
MEASURE_ROW, MIN_K_ROW = 30.0, 42.0


@svg.styled
def kept_bars(steps: Sequence[Mapping[str, Any]]) -> str:
    """What every filter kept and dropped of the samples that reached it, one bar a filter."""
    applied = [step for step in steps if step["filter"]]
    names = [step["filter"] for step in applied]
    gutter, height = svg.gutter(names), 34 * len(applied)
    figure = svg.canvas(HALF_WIDTH, height + 34)
    axes = svg.place(figure, gutter, 28, HALF_WIDTH - gutter - 108, height)
    for row, step in enumerate(applied):
        kept, dropped = step["kept"], step["dropped"]
        (bar,) = axes.barh(row, kept, 0.6, color=svg.PRUNED)
        svg.tip(bar, f"{step['filter']} kept {units.count(kept)}")
        (bar,) = axes.barh(row, dropped, 0.6, left=kept, color=svg.DROPPED)
        svg.tip(bar, f"{step['filter']} dropped {units.count(dropped)}")
        share = units.percent(dropped / max(1, kept + dropped))
        axes.annotate(f"{units.count(dropped)} ({share})", (kept + dropped, row), (6, 0),
                      textcoords="offset points", va="center", annotation_clip=False)  # fmt: skip
    svg.rows(axes, names)
    axes.set_xlim(0, max(1, *(step["kept"] + step["dropped"] for step in applied)))
    axes.xaxis.set_major_locator(NullLocator())
    axes.spines["bottom"].set_visible(False)
    svg.legend(figure, gutter, 12, [("kept", svg.PRUNED), ("dropped", svg.DROPPED)])
    return svg.serialise(figure, "kept", "Samples that every filter kept and dropped")


@svg.styled
def similarity_map(
    similarity: Mapping[str, Mapping[str, Mapping[str, float]]],
    measure: Literal["jaccard", "coverage", "unigram_js"],
) -> str:
    """One measure of likeness, a cell for every source (row) and reference (column); darker is more alike."""
    sources = list(similarity)
    references = list(dict.fromkeys(name for of in similarity.values() for name in of))
    title, written = MEASURES[measure]
    gutter = svg.gutter([svg.shortened(name, 24) for name in sources])
    width = HALF_WIDTH if len(references) <= 4 else FULL_WIDTH
    cell = min(96.0, (width - gutter) / len(references))
    figure = svg.canvas(
        max(gutter + cell * len(references), HALF_WIDTH), MEASURE_ROW * len(sources) + 26
    )
    axes = svg.place(figure, gutter, 24, cell * len(references), MEASURE_ROW * len(sources))
    values = [of[name][measure] for of in similarity.values() for name in of]
    low, high = min(values), max(values)
    for row, source in enumerate(sources):
        for column, reference in enumerate(references):
            facts = similarity[source].get(reference)
            if facts is None:
                continue
            value = facts[measure]
            tone = (value - low) / (high - low) if high > low else 0.5
            tone = 1 - tone if measure == "unigram_js" else tone
            shape = Rectangle((column - 0.5, row - 0.5), 1, 1, edgecolor=svg.CARD, linewidth=2,
                              facecolor=(svg.PRUNED, 0.07 + 0.86 * tone))  # fmt: skip
            svg.tip(shape, f"{source} and {reference}, {title}: {written(value)}")
            axes.add_artist(shape)
            axes.text(column, row, written(value), ha="center", va="center", fontsize=11.5,
                      color=svg.ON_HEAT if tone > 0.5 else svg.INK)  # fmt: skip
    most = max(3, int(cell / svg.text_width("n")) - 1)
    for column, reference in enumerate(references):
        svg.write(figure, gutter + (column + 0.5) * cell, 12, svg.shortened(reference, most),
                  ha="center", color=svg.MUTED)  # fmt: skip
    svg.rows(axes, [svg.shortened(name, 24) for name in sources])
    axes.set_xlim(-0.5, len(references) - 0.5)
    axes.xaxis.set_major_locator(NullLocator())
    axes.spines["bottom"].set_visible(False)
    return svg.serialise(figure, f"similarity-{measure.replace('_', '-')}", title.capitalize())


@svg.styled
def min_k_rows(min_k: Mapping[str, Any]) -> str:
    """The Min-K%++ scores of every source's and reference's documents: a small histogram each, and its mean."""
    texts = [
        (name, facts, hue)
        for kind, hue in (("sources", svg.PRUNED), ("references", svg.DENSE))
        for name, facts in min_k[kind].items()
    ]
    names = [svg.shortened(name, 30) for name, *_ in texts]
    gutter, height = svg.gutter(names), MIN_K_ROW * len(texts)
    figure = svg.canvas(FULL_WIDTH, height + 76)
    axes = svg.place(figure, gutter, 30, FULL_WIDTH - gutter - 90, height)
    for row, (name, facts, hue) in enumerate(texts):
        edges, counts = np.asarray(facts["values"]["edges"]), np.asarray(facts["values"]["counts"])
        heights = 0.84 * counts / max(counts.max(initial=0), 1)
        axes.stairs(row + 0.45 - heights, edges, baseline=row + 0.45, fill=True, color=hue,
                    alpha=0.45, linewidth=0)  # fmt: skip
        (mean,) = axes.plot(
            [facts["mean"]] * 2, [row + 0.45, row - 0.4], color=svg.INK, linewidth=1.6
        )
        label = f"{facts['mean']:.2f}".replace("-", units.MINUS)
        documents = units.count(facts["documents"])
        svg.tip(mean, f"{name}: mean {label} of {documents} documents")
        axes.annotate(label, (1, row), (10, 0), xycoords=axes.get_yaxis_transform(),
                      textcoords="offset points", va="center", annotation_clip=False)  # fmt: skip
    svg.rows(axes, names)
    edges = texts[0][1]["values"]["edges"]
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.4g}".replace("-", units.MINUS)))
    axes.grid(axis="x")
    axes.set_xlabel(
        "Min-K%++ score of a document; higher: more like what the model was trained on", labelpad=6
    )
    svg.legend(figure, gutter, 12, [("source", svg.PRUNED), ("reference", svg.DENSE)])
    svg.write(figure, FULL_WIDTH - 80, 12, "mean", color=svg.MUTED)
    return svg.serialise(figure, "min-k", "Min-K%++ scores of sources and references")
