"""The figures hold every value they were given, and nothing that a page could not embed."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from calibprune.reporting import comparisons, histograms, plots, svg
from calibprune.reporting.units import MINUS
from tests.calibprune.reporting.example import LINEARS, curated_report, example_report

SVG = "{http://www.w3.org/2000/svg}"


def tips(drawing: str) -> list[str]:
    """What the reader can point at: the titles inside the figure, without the figure's own."""
    titles = [title.text or "" for title in ElementTree.fromstring(drawing).iter(f"{SVG}title")]
    return titles[1:]


def texts(drawing: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(drawing).iter(f"{SVG}text")]


def every_plot(report: dict) -> list[str]:
    layers, curate = report["prune"]["layers"], curated_report()["curate"]
    similarity = curate["analysis"]["similarity"]
    return [
        histograms.filter_steps(curate["steps"]),
        histograms.lengths(curate["lengths"]),
        histograms.repetition(curate["repetition"]),
        histograms.repeats(curate["repeats"]),
        comparisons.kept_bars(curate["steps"]),
        *(comparisons.similarity_map(similarity, measure) for measure in comparisons.MEASURES),
        comparisons.min_k_rows(curate["analysis"]["min_k"]),
        plots.perplexity_bars(report["perplexity"]),
        histograms.pool_histogram(report["curate"]["perplexity"]),
        plots.layer_map(layers, "relative_error"),
        plots.layer_map(layers, "sparsity"),
        plots.stage_seconds(report["stages"]),
        plots.layer_seconds(layers),
    ]


@pytest.mark.parametrize("layers", [1, 2, 80])
def test_the_map_has_a_cell_for_every_layer_and_linear(layers):
    drawing = plots.layer_map(example_report(layers)["prune"]["layers"], "relative_error")
    cells = [tip.split(":")[0] for tip in tips(drawing)]
    assert cells == [f"layer {layer}, {name}" for name in LINEARS for layer in range(layers)]
    assert set(LINEARS) <= set(texts(drawing))


@pytest.mark.parametrize("layers", [1, 2, 80])
def test_the_stacked_bars_have_a_piece_for_every_layer_and_kind_of_work(layers):
    pieces = tips(plots.layer_seconds(example_report(layers)["prune"]["layers"]))
    assert len(pieces) == 5 * layers
    assert f"layer {layers - 1}, solve: 2.00 s" in pieces


def test_layers_are_placed_by_their_number():
    layers = example_report(12)["prune"]["layers"]
    some = [layers[11], layers[4], layers[9]]  # a partial run, in order of completion
    numbers = [int(tip.split(",")[0].removeprefix("layer ")) for tip in
               tips(plots.layer_map(some, "relative_error"))]  # fmt: skip
    assert numbers == [4, 9, 11] * len(LINEARS)
    assert [t for t in texts(plots.layer_seconds(some)) if t.isdigit()] == [str(n) for n in range(4, 12)]  # fmt: skip


def test_a_larger_error_has_a_darker_cell():
    layers = example_report(40)["prune"]["layers"]
    layers[20]["linears"]["mlp.up_proj"]["relative_error"] = 1e6  # an outlier: same tone as the top
    drawing = plots.layer_map(layers, "relative_error")
    cells = re.findall(r"<title>layer \d+, [^:]*: ([\d,.]+)</title>.*?style=\"([^\"]*)", drawing, re.S)  # fmt: skip
    assert len(cells) == 40 * len(LINEARS)
    opacities = [re.search(r"fill-opacity: ([\d.]+)", style) for _, style in cells]
    pairs = sorted(
        (float(value.replace(",", "")), float(opacity[1]) if opacity else 1.0)
        for (value, _), opacity in zip(cells, opacities, strict=True)
    )
    tones = [tone for _, tone in pairs]
    assert np.all(np.diff(tones) >= -0.01)  # three figures of the value are written
    assert tones[-1] == 1.0
    assert len({round(tone, 1) for tone in tones}) > 5, "the outlier bleached the rest"


def test_means_are_weighted_by_parameters_and_experts_share_a_row():
    linears = {
        "mlp.experts.0.up_proj": {"relative_error": 0.1, "sparsity": 0.5, "parameters": 1},
        "mlp.experts.1.up_proj": {"relative_error": 0.4, "sparsity": 0.5, "parameters": 2},
        "self_attn.q_proj": {"relative_error": None, "sparsity": 0.5, "parameters": 5},
        "self_attn.k_proj": {"relative_error": 0.7, "sparsity": 0.5, "parameters": 7},
    }
    positions, names, table, means = plots.layer_table(
        [{"layer": 3, "linears": linears}, {"layer": 1, "linears": {}}], "relative_error"
    )
    assert positions == [1, 3]
    assert names == ["mlp.experts.*.up_proj", "self_attn.q_proj", "self_attn.k_proj"]
    np.testing.assert_allclose(table, [[math.nan, 0.3], [math.nan, math.nan], [math.nan, 0.7]])
    np.testing.assert_allclose(means, [math.nan, (0.1 + 0.4 * 2 + 0.7 * 7) / 10])


def test_the_bin_that_holds_the_cut_is_split():
    histogram = {"edges": [0.0, 1.0, 2.0, 3.0], "counts": [5, 4, 3], "median": 0.9}
    uncut = histograms.pool_histogram({**histogram, "cut": None})
    cut = histograms.pool_histogram({**histogram, "cut": 1.5})
    assert [tip.split(": ")[1] for tip in tips(uncut)] == ["5", "4", "3"]
    assert [tip.split(": ")[1] for tip in tips(cut)] == ["5", "4", "4", "3"]
    assert "cut at 1.50" in texts(cut)
    dropped = f"fill: var(--dropped, {svg.DROPPED})"
    assert uncut.count(dropped) == 0
    assert cut.count(dropped) == 2


@pytest.mark.parametrize(
    ("edges", "expected"),
    [([1.0, 10.0, 100.0, 1000.0], ["1", "10", "100", "1,000"]), ([0.0, 1.0, 2.0, 3.0], ["0", "1", "2", "3"])],
)  # fmt: skip
def test_the_histogram_is_logarithmic_where_its_edges_are(edges, expected):
    histogram = {"edges": edges, "counts": [1, 1, 1], "median": edges[1], "cut": None}
    drawing = histograms.pool_histogram(histogram)
    root = ElementTree.fromstring(drawing)
    places = {text.text: float(text.get("x", "nan")) for text in root.iter(f"{SVG}text")
              if text.text in expected and "middle" in text.get("style", "")}  # fmt: skip
    assert set(expected) <= set(places), "a tick at every edge"
    np.testing.assert_allclose(np.diff([places[tick] for tick in expected], n=2), 0, atol=0.01)


def test_a_perplexity_that_is_missing_or_not_finite_is_no_bar():
    drawing = plots.perplexity_bars(
        {"a": {"dense": 10.0, "pruned": math.inf}, "b": {"dense": 20.0, "pruned": None}}
    )
    assert tips(drawing) == ["a, dense: 10.00", "a, pruned: not finite", "b, dense: 20.00"]


def test_names_are_text_and_not_markup_or_mathematics():
    hostile = '$x^2$ <script>"&'
    drawing = plots.perplexity_bars({hostile: {"dense": 1.0, "pruned": 2.0}})
    assert hostile in texts(drawing)
    assert f"{hostile}, dense: 1.00" in tips(drawing)


def test_figures_are_equal_for_equal_input_and_have_no_dates():
    once, again = every_plot(example_report()), every_plot(example_report())
    assert once == again
    assert not any(re.search(r"20\d\d-\d\d|metadata|<style", drawing) for drawing in once)


def test_every_colour_follows_the_page():
    for drawing in every_plot(example_report(20)):
        plain = re.sub(r"var\(--[a-z0-9-]+, #[0-9a-f]{6}\)", "", drawing)
        assert not re.findall(r"#[0-9a-f]{6}\b", plain)


def test_every_figure_is_drawn_inside_its_frame():
    for drawing in every_plot(example_report(80)):
        root = ElementTree.fromstring(drawing)
        _, _, width, height = map(float, root.get("viewBox", "").split())
        assert width <= plots.FULL_WIDTH
        for text in root.iter(f"{SVG}text"):
            assert 0 <= float(text.get("x", "nan")) <= width
            assert 0 <= float(text.get("y", "nan")) <= height


def test_every_filters_histogram_is_in_the_figure():
    steps = curated_report()["curate"]["steps"]
    drawing = histograms.filter_steps(steps)
    found = tips(drawing)
    assert len(found) == len(steps[0]["perplexity"]["counts"])
    counts = [step["perplexity"]["counts"][4] for step in steps]
    assert found[4].endswith(
        f": {counts[0]} before any filter, {counts[1]} after length, {counts[2]} after duplicates, "
        f"{counts[3]} after perplexity"
    )
    assert {"before any filter", "after length", "after duplicates"} <= set(texts(drawing))


def test_a_filter_that_is_there_twice_is_numbered():
    step = {"perplexity": {"edges": [1, 2, 3], "counts": [4, 5]}}
    names = [None, "length", "length"]
    drawing = histograms.filter_steps([step | {"filter": name} for name in names])
    assert {"after length (1)", "after length (2)"} <= set(texts(drawing))


def test_a_long_legend_goes_on_in_another_row_inside_the_frame():
    step = {"perplexity": {"edges": [1, 2, 3], "counts": [4, 5]}}
    names = [None, *(f"filter number {place}" for place in range(7))]
    root = ElementTree.fromstring(
        histograms.filter_steps([step | {"filter": name} for name in names])
    )
    entries = [text for text in root.iter(f"{SVG}text") if "filter" in (text.text or "")]
    ends = [float(text.get("x", "nan")) + svg.text_width(text.text or "") for text in entries]
    assert len(entries) == 8 and max(ends) <= svg.HALF_WIDTH
    assert len({text.get("y") for text in entries}) > 2


def test_lengths_and_repetition_before_and_after():
    curate = curated_report()["curate"]
    assert tips(histograms.lengths(curate["lengths"]))[0] == "0 to 128: 31 before the filters, 0 after"  # fmt: skip
    repetition = tips(histograms.repetition(curate["repetition"]))
    assert repetition[1] == "5.0% to 10.0%: 130 before the filters, 121 after"
    assert tips(histograms.repeats(curate["repeats"]))[7] == "350 to 400: 41 before the filters, 0 after"  # fmt: skip


def test_what_filters_kept_and_dropped():
    steps = curated_report()["curate"]["steps"]
    drawing = comparisons.kept_bars(steps)
    kept, dropped = tips(drawing)[:2]
    assert kept == f"length kept {steps[1]['kept']}"
    assert dropped == f"length dropped {steps[1]['dropped']}" == "length dropped 27"
    assert "27 (4.2%)" in texts(drawing)


@pytest.mark.parametrize("measure", comparisons.MEASURES)
def test_what_is_more_alike_is_darker(measure):
    similarity = curated_report()["curate"]["analysis"]["similarity"]
    drawing = comparisons.similarity_map(similarity, measure)
    title = r"<title>(\S+) and (\S+), [^:]*: [\d.%]+</title>"
    cells = re.findall(title + r".*?fill-opacity: ([\d.]+)", drawing, re.S)
    assert [cell[:2] for cell in cells] == [(s, r) for s, of in similarity.items() for r in of]
    tones = {cell[:2]: float(cell[2]) for cell in cells}
    values = {(s, r): facts[measure] for s, of in similarity.items() for r, facts in of.items()}
    order = sorted(values, key=values.__getitem__, reverse=measure == "unigram_js")
    assert np.all(np.diff([tones[pair] for pair in order]) >= -1e-6)
    assert tones[order[-1]] > 0.9 and tones[order[0]] < 0.1


def test_many_references_fit_and_a_missing_pair_is_blank():
    one = {"jaccard": 0.1, "coverage": 0.2, "unigram_js": 0.3}
    names = [f"a-reference-with-a-long-name-{place}" for place in range(12)]
    similarity = {"first": dict.fromkeys(names, one), "second": dict.fromkeys(names[1:], one)}
    drawing = comparisons.similarity_map(similarity, "jaccard")
    assert len(tips(drawing)) == 23
    root = ElementTree.fromstring(drawing)
    places = [float(text.get("x", "nan")) for text in root.iter(f"{SVG}text") if "…" in (text.text or "")]  # fmt: skip
    assert len(places) == 12 and max(places) < float(root.get("width", "0")) <= svg.FULL_WIDTH


def test_min_k_shows_every_text_and_its_mean():
    min_k = curated_report()["curate"]["analysis"]["min_k"]
    drawing = comparisons.min_k_rows(min_k)
    assert len(tips(drawing)) == 5
    assert tips(drawing)[1].startswith(f"slimpajama-validation: mean {MINUS}1.05 of ")
    assert {"self-generated", "c4", "dclm-baseline", f"{MINUS}0.85"} <= set(texts(drawing))
