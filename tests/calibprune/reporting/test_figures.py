"""The figures show the values they were given, inside their frames, and contain nothing that a page cannot embed."""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch

from calibprune.reporting import figures, style
from calibprune.reporting.layer_figures import layer_map, layer_seconds, layer_table
from calibprune.text import MINUS
from tests.calibprune.reporting.example import LINEARS, curated_report, example_report

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def look():
    with matplotlib.rc_context(style.RC):
        yield


def every_figure(layers: int = 3) -> dict[str, Figure]:
    report: Any = curated_report(layers)
    curate, pruned = report["curate"], report["prune"]["layers"]
    similarity, tables = curate["analysis"]["similarity"], {}
    pruned[0]["linears"]["mlp.up_proj"]["sparsity"] = 0.0
    for quantity in ("relative_error", "sparsity"):
        tables[quantity] = layer_map(layer_table(pruned, quantity), quantity)
    return {
        "perplexity": figures.perplexity_bars(report["perplexity"]),
        "stages": figures.stage_seconds(report["stages"]),
        "steps": figures.filter_steps(curate["steps"]),
        "filters": figures.filter_bars(curate["steps"][1:]),
        "lengths": figures.lengths(curate["lengths"]),
        "repetition": figures.repetition(curate["repetition"]),
        "repeats": figures.repeats(curate["repeats"]),
        **{name: figures.similarity_map(similarity, name) for name in figures.MEASURES},
        "min_k": figures.min_k_rows(curate["analysis"]["min_k"]),
        **tables,
        "layers": layer_seconds(pruned),
    }


def texts(figure: Figure) -> list[str]:
    """Lists the texts of a figure, in order."""
    root = ElementTree.fromstring(style.to_svg(figure, "figure"))
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def bars(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def histograms(figure: Figure) -> list[list[float]]:
    """Lists the counts of every outline, in order."""
    steps = [patch for patch in figure.axes[0].patches if isinstance(patch, StepPatch)]
    return [list(step.get_data().values) for step in steps if not step.get_fill()]


def cells(figure: Figure) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of the figure's map, and the opacities of the cells that are drawn."""
    figure.draw_without_rendering()
    (mesh,) = (mesh for axes in figure.axes[:2] for mesh in axes.collections if isinstance(mesh, QuadMesh))  # fmt: skip
    values = np.ma.filled(mesh.get_array(), np.nan)
    colours = np.asarray(mesh.get_facecolor())[~np.isnan(values.ravel())]
    assert {tuple(colour) for colour in colours[:, :3]} == {to_rgba(style.PRUNED)[:3]}
    return values, colours[:, 3]


def assert_inside(figure: Figure) -> None:
    figure.draw_without_rendering()
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -0.02, drawn


# -- every figure -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 126])
def test_every_figure_is_drawn_inside_its_frame_and_fits_the_page(layers):
    for figure in every_figure(layers).values():
        assert_inside(figure)
        assert figure.bbox.width <= style.FULL_WIDTH


def test_every_colour_follows_the_page_and_nothing_is_a_bitmap():
    for layers in (3, 40):
        for name, figure in every_figure(layers).items():
            drawing = style.to_svg(figure, name)
            assert "var(--" in drawing
            assert not re.findall(r"#[0-9a-f]{6}\b", drawing), name
            assert set(re.findall(r"var\((--[\w-]+)\)", drawing)) <= {
                f"--{variable}" for variable, _ in style.COLOURS.values()
            }
            assert "<image" not in drawing


def test_equal_figures_give_equal_bytes_without_dates():
    once, again = ({n: style.to_svg(f, n) for n, f in every_figure().items()} for _ in range(2))
    assert once == again
    assert not any(re.search(r"20\d\d-\d\d|metadata|<style", drawing) for drawing in once.values())


def test_ids_are_unique_in_a_page_of_equal_figures():
    figure = every_figure()["stages"]
    drawings = [style.to_svg(figure, "one"), style.to_svg(figure, "other")]
    ids = [re.findall(r'\sid="([^"]+)"', drawing) for drawing in drawings]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    for drawing, own in zip(drawings, ids, strict=True):
        assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', drawing)) == set(own)


def test_names_are_text_and_not_markup_or_mathematics():
    hostile = '$x^2$ <script>"&'
    facts: Any = {"dense": 1.0, "pruned": 2.0}
    assert hostile in texts(figures.perplexity_bars({hostile: facts}))


def test_a_long_name_is_shortened_and_one_in_another_script_is_drawn_without_a_warning(recwarn):
    facts: Any = {"dense": 1.0, "pruned": 2.0}
    figure = figures.perplexity_bars({"a" * 40 + "z" * 40: facts, "日本語": facts})
    assert {"a" * 16 + "…" + "z" * 17, "日本語"} <= set(texts(figure))
    assert_inside(figure)
    assert not [warning for warning in recwarn if "DejaVu" not in str(warning.message)]


# -- bars -------------------------------------------------------------------------------------------


def test_a_perplexity_that_is_not_finite_has_no_bar():
    report: Any = {
        "a": {"dense": 10.0, "pruned": math.inf},
        "b": {"dense": 20.0, "pruned": math.nan},
    }
    figure = figures.perplexity_bars(report)
    assert [bar.get_width() for bar in bars(figure)] == [10, 20, 0, 0]
    assert [t for t in texts(figure) if t not in report][:4] == [
        "10.00", "20.00", "not finite", "not finite"
    ]  # fmt: skip


def test_stages_have_their_times():
    figure = every_figure()["stages"]
    assert [bar.get_width() for bar in bars(figure)] == [512.3, 4.1, 75.4]
    assert {"75 s", "8.5 min", "4.1 s"} <= set(texts(figure))


def test_filters_show_what_they_kept_and_dropped():
    report: Any = curated_report()
    steps = report["curate"]["steps"][1:]
    figure = figures.filter_bars(steps)
    kept, dropped = bars(figure)[:3], bars(figure)[3:]
    assert [bar.get_width() for bar in kept] == [step["kept"] for step in steps]
    assert [bar.get_width() for bar in dropped] == [step["dropped"] for step in steps]
    assert [bar.get_x() for bar in dropped] == [step["kept"] for step in steps]
    assert "27 (4.2%)" in texts(figure)


# -- histograms -------------------------------------------------------------------------------------


def test_every_filters_histogram_is_in_the_figure():
    report: Any = curated_report()
    steps = report["curate"]["steps"]
    figure = figures.filter_steps(steps)
    assert histograms(figure) == [step["perplexity"]["counts"] for step in steps]
    named = {"before any filter", "after length", "after duplicates", "after perplexity"}
    assert named <= set(texts(figure))
    assert figure.axes[0].get_xscale() == "log"


def step_of(name: str | None, edges: list[float]) -> Any:
    return {"filter": name, "perplexity": {"edges": edges, "counts": [4] * (len(edges) - 1)}}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1, 1000, ["1", "10", "100", "1,000"]),
        (3, 60, ["5", "10", "20", "50"]),
        (20, 40, ["20", "30", "40"]),
    ],
)
def test_an_axis_of_perplexities_has_a_few_round_labels(low, high, expected):
    edges = np.geomspace(low, high, 41).tolist()
    figure = figures.filter_steps([step_of(None, edges), step_of("length", edges)])
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    ticks = figure.axes[0].get_xticks()
    shown = [label for label, tick in zip(labels, ticks, strict=True) if low <= tick <= high * 1.001]  # fmt: skip
    assert shown == expected


def test_a_filter_that_is_there_twice_is_numbered():
    names = [None, "length", "length", "duplicates"]
    figure = figures.filter_steps([step_of(name, [1, 2, 3]) for name in names])
    assert {"after length (filter 1)", "after length (filter 2)", "after duplicates"} <= set(texts(figure))  # fmt: skip


def test_a_run_without_filters_has_one_histogram():
    figure = figures.filter_steps([step_of(None, [1, 2, 3])])
    assert histograms(figure) == [[4, 4]]


def test_a_long_legend_takes_further_rows_and_no_room_from_the_histogram():
    names = [None, *(f"filter number {place}" for place in range(9))]
    figure = figures.filter_steps([step_of(name, [1, 2, 3]) for name in names])
    short = figures.filter_steps([step_of(None, [1, 2, 3])])
    assert_inside(figure)
    assert_inside(short)
    assert len([text for text in texts(figure) if "filter" in text]) == 10
    heights = [one.axes[0].get_window_extent().height for one in (figure, short)]
    assert heights[0] == pytest.approx(heights[1], rel=0.1)


@pytest.mark.parametrize("plot", [figures.lengths, figures.repetition, figures.repeats])
def test_histograms_before_and_after_the_filters(plot: Callable[[Any], Figure]):
    histogram = {"edges": [0, 0.5, 1], "before": [3, 2], "after": [1, 0]}
    figure = plot(histogram)
    assert histograms(figure) == [[3, 2], [1, 0]]
    assert {"before the filters", "after", "samples"} <= set(texts(figure))
    assert figure.axes[0].get_xscale() == "linear"
    assert ("100%" in texts(figure)) == (plot is figures.repetition)


def test_histograms_of_nothing_are_empty():
    assert histograms(figures.lengths({"edges": [0, 1], "before": [0], "after": [0]})) == [[0], [0]]


# -- sources and references -------------------------------------------------------------------------


@pytest.mark.parametrize("measure", figures.MEASURES)
def test_what_is_more_alike_is_darker(measure):
    report: Any = curated_report()
    similarity = report["curate"]["analysis"]["similarity"]
    figure = figures.similarity_map(similarity, measure)
    given = [likeness[measure] for row in similarity.values() for likeness in row.values()]
    _, opacities = cells(figure)
    order = np.argsort(given)[:: -1 if measure == "unigram_js" else 1]
    tones = opacities[order]
    assert np.all(np.diff(tones) >= 0) and tones[0] < 0.1 and tones[-1] > 0.99
    written = figures.MEASURES[measure][1]
    assert [text for text in texts(figure) if re.match(r"[\d.]+%?$", text)] == [*map(written, given)]  # fmt: skip


def test_few_references_with_short_names_stand_side_by_side():
    axes = every_figure()["jaccard"].axes[0]
    axes.figure.draw_without_rendering()
    extents = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(extents))


def test_many_references_with_long_names_fit():
    likeness: Any = {"jaccard": 0.1, "coverage": 0.2, "unigram_js": 0.3}
    names = [f"a-reference-with-a-long-name-{place}" for place in range(12)]
    figure = figures.similarity_map({"first": dict.fromkeys(names, likeness)}, "jaccard")
    assert_inside(figure)
    assert figure.bbox.width == style.FULL_WIDTH
    assert {label.get_rotation() for label in figure.axes[0].get_xticklabels()} == {30}
    shortened = [text for text in texts(figure) if "…" in text]
    assert len(shortened) == len(set(shortened)) == 12


def test_min_k_shows_every_text_and_its_mean():
    report: Any = curated_report()
    figure = figures.min_k_rows(report["curate"]["analysis"]["min_k"])
    names = {"self-generated", "slimpajama-validation", "c4", "wikipedia-en", "dclm-baseline"}
    assert names | {f"mean {MINUS}0.85", f"mean {MINUS}1.05"} <= set(texts(figure))
    means = [line.get_xdata()[0] for line in figure.axes[0].lines]
    assert means == pytest.approx([-0.85, -1.05, -0.85 - 0.1 / 3, -1.0, -0.85 - 0.2 / 3])


# -- layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 126])
def test_the_map_has_a_cell_for_every_layer_and_linear(layers):
    report: Any = example_report(layers)
    figure = layer_map(layer_table(report["prune"]["layers"], "relative_error"), "relative_error")
    values, _ = cells(figure)
    assert values.shape == (len(LINEARS), layers) and not np.isnan(values).any()
    assert set(LINEARS) <= set(texts(figure))


def test_a_map_of_few_layers_has_its_numbers_and_of_many_a_scale():
    small, large = (every_figure(layers)["relative_error"] for layers in (3, 40))
    assert {"0.0800", "0.240"} <= set(texts(small)) and len(small.axes) == 2
    assert "0.0800" not in texts(large) and len(large.axes) == 3
    assert any(text.startswith("≥ ") for text in texts(large))


@pytest.mark.parametrize("layers", [1, 2, 126])
def test_the_stacked_bars_have_a_piece_for_every_layer_and_kind_of_work(layers):
    report: Any = example_report(layers)
    given = report["prune"]["layers"]
    pieces = bars(layer_seconds(given))
    assert len(pieces) == 5 * layers
    assert pieces[-1].get_y() + pieces[-1].get_height() == pytest.approx(3.9)
    heights = [piece.get_height() for piece in pieces]
    expected = [seconds for seconds in given[0]["seconds"].values() for _ in range(layers)]
    assert heights == pytest.approx(expected)


@pytest.mark.parametrize("numbers", [[7], [4, 9, 11], range(126)])
def test_layers_are_placed_by_their_number(numbers):
    report: Any = example_report(126)
    some = [report["prune"]["layers"][number] for number in reversed(numbers)]
    figure = layer_map(layer_table(some, "relative_error"), "relative_error")
    values, _ = cells(figure)
    drawn = np.flatnonzero(~np.isnan(values[0])) + numbers[0]
    assert drawn.tolist() == list(numbers)
    for one in (figure, layer_seconds(some)):
        one.draw_without_rendering()
        axes = one.axes[-1] if len(numbers) < 40 else one.axes[min(1, len(one.axes) - 1)]
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert all(tick == round(tick) for tick in ticks) and 1 <= len(ticks) <= 35
        assert (low, high) == (numbers[0] - 0.5, numbers[-1] + 0.5)


def test_a_larger_error_is_darker_and_an_outlier_does_not_bleach_the_rest():
    report: Any = example_report(40)
    layers = report["prune"]["layers"]
    layers[20]["linears"]["mlp.up_proj"]["relative_error"] = 1e6
    layers[21]["linears"]["mlp.up_proj"]["relative_error"] = math.inf
    table = layer_table(layers, "relative_error")
    _, opacities = cells(layer_map(table, "relative_error"))
    tones = opacities[np.argsort(table.values, axis=None)]
    assert all(before <= after for before, after in pairwise(tones))
    assert tones[-1] == 1.0
    assert len({round(float(tone), 1) for tone in tones}) > 5, "the outlier bleached the rest"


def test_a_map_of_equal_errors_is_drawn():
    report: Any = example_report(30)
    for layer in report["prune"]["layers"]:
        for linear in layer["linears"].values():
            linear["relative_error"] = 0.0
    figure = layer_map(layer_table(report["prune"]["layers"], "relative_error"), "relative_error")
    assert_inside(figure)


def test_means_are_weighted_by_parameters_and_experts_share_a_row():
    linears = {
        "mlp.experts.0.up_proj": {"relative_error": 0.1, "sparsity": 0.5, "parameters": 1},
        "mlp.experts.1.up_proj": {"relative_error": 0.4, "sparsity": 0.5, "parameters": 2},
        "self_attn.k_proj": {"relative_error": 0.7, "sparsity": 0.5, "parameters": 7},
    }
    layers: Any = [{"layer": 3, "linears": linears}, {"layer": 1, "linears": {}}]
    table = layer_table(layers, "relative_error")
    assert table.layers == [1, 3]
    assert table.linears == ["mlp.experts.*.up_proj", "self_attn.k_proj"]
    np.testing.assert_allclose(table.values, [[math.nan, 0.3], [math.nan, 0.7]])
    np.testing.assert_allclose(table.means, [math.nan, (0.1 + 0.4 * 2 + 0.7 * 7) / 10])
    assert table.finite.tolist() == pytest.approx([0.3, 0.7])
    assert [layer for layer, _ in table.rows] == [1, 3]
    assert [values for _, values in table.rows] == [
        [None] * 3,
        pytest.approx([0.3, 0.7, 0.58]),
    ]
