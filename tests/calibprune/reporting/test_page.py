"""The page is well-formed, loads nothing, shows the report's own numbers and treats text as text."""

import copy
import os
import re
import subprocess
import sys
import time
from typing import Any
from xml.etree import ElementTree

import pytest
from ruamel.yaml import YAML

from calibprune.reporting.page import render_page
from calibprune.text import NO_VALUE
from tests.calibprune.reporting.example import LINEARS, curated_report, example_report

SVG = "{http://www.w3.org/2000/svg}"
CURATE = [
    "Histograms of the samples' perplexity before and after every filter",
    "Samples that every filter kept and dropped",
    "Histograms of the samples' lengths",
    "Histograms of how much the samples repeat themselves",
    "Histograms of the longest passages that occur twice in a sample",
]
LIKENESS = ["N-grams in common", "N-grams found in the reference", "Unigram divergence"]
MIN_K = "Min-K%++ scores of sources and references"
MAPS = [f"{name} of every decoder layer and linear" for name in ("Relative error", "Sparsity")]
PERPLEXITY = "Held-out perplexity of the dense and of the pruned model"
TIMES = ["Time of every stage", "Seconds of every decoder layer, by kind of work"]
HOSTILE = "<script>alert(1)</script></pre></div><img src=x onerror=alert(2)> &amp; ]]> \"'{{ 7*7 }}"


def parse(page: str) -> ElementTree.Element:
    """Parses the page, which is written so that a strict XML parser accepts it."""
    return ElementTree.fromstring(page)


def text_of(element: ElementTree.Element | None) -> str:
    assert element is not None
    return re.sub(r"\s+", " ", "".join(element.itertext())).strip()


def headings(page: str) -> list[str]:
    return [text_of(heading) for heading in parse(page).iter("h2")]


def facts(page: str) -> dict[str, str]:
    return {text_of(fact.find("dt")): text_of(fact.find("dd")) for fact in
            parse(page).findall(".//dl/div")}  # fmt: skip


def tables(page: str) -> list[list[list[str]]]:
    return [[[text_of(cell) for cell in row] for row in table.iter("tr")] for table in
            parse(page).iter("table")]  # fmt: skip


def drawn(page: str) -> list[str]:
    """Lists the text alternatives of the figures, in order."""
    return [drawing.get("aria-label", "") for drawing in parse(page).iter(f"{SVG}svg")]


def body_of(page: str) -> str:
    return text_of(parse(page).find("body"))


def assert_loads_nothing(page: str) -> None:
    for element in parse(page).iter():
        tag = element.tag.removeprefix(SVG)
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "image", "base"}
        for name, value in element.attrib.items():
            attribute = name.rpartition("}")[2]
            assert not attribute.startswith("on"), (tag, attribute)
            assert attribute not in {"src", "srcset", "data", "action", "background"}
            if attribute == "href":
                assert value.startswith("#"), value
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_a_complete_page_is_well_formed_and_loads_nothing():
    page = render_page(example_report())
    assert page.lstrip().startswith("<!DOCTYPE html>")
    assert_loads_nothing(page)
    assert "default-src 'none'; style-src 'unsafe-inline';" in page
    assert drawn(page) == [PERPLEXITY, *CURATE, MAPS[0], *TIMES]


def test_a_page_with_sources_and_filters_is_well_formed_too():
    page = render_page(curated_report())
    assert_loads_nothing(page)
    assert drawn(page) == [PERPLEXITY, *CURATE, *LIKENESS, MIN_K, MAPS[0], *TIMES]
    assert "Sources and reference corpora" in headings(page)
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", body_of(page))


@pytest.mark.parametrize("report", [example_report(40), curated_report()])
def test_ids_are_unique_and_every_reference_has_its_target(report):
    page = render_page(report)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', page)) == set(ids)


def test_every_figure_has_a_text_alternative():
    for drawing in parse(render_page(curated_report())).iter(f"{SVG}svg"):
        assert drawing.get("role") == "img" and drawing.get("aria-label")


def test_every_colour_of_a_figure_has_a_value_in_both_schemes():
    page = render_page(curated_report(40))
    schemes = page.split("prefers-color-scheme: dark")
    assert len(schemes) == 2
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    for scheme in schemes:
        assert used <= set(re.findall(r"(--[\w-]+): #[0-9a-f]{6};", scheme.split("* {")[0]))


def test_the_headline_has_the_reports_numbers():
    page = render_page(example_report())
    values = [float(data.get("value", "nan")) for data in parse(page).iter("data")]
    assert values == [12.3456, 15.1042, 17.81, 40.07, 0.49987]
    numbers = [text_of(p) for p in parse(page).iter("p") if p.get("class") == "numbers"]
    assert numbers == ["12.35 → 15.10", "17.81 → 40.07"]
    shown = facts(page)
    assert shown["Sparsity, measured"] == "50.0% 53.1M of 106.2M weights are zero"
    assert shown["Method"] == "wanda unstructured"
    assert shown["Model"] == "134.5M parameters LlamaForCausalLM, 3 layers, bfloat16"
    assert shown["Total time"].startswith("9.9 min")
    assert text_of(parse(page).find(".//h1")) == "tiny-llama"


def test_the_calibration_text_has_the_reports_numbers():
    page = render_page(example_report())
    shown = facts(page)
    assert shown["Generated"] == "640 samples 123,456 tokens"
    assert shown["Speed"] == "2,346 tokens/s"
    assert shown["Ended by themselves"] == "600 93.8%"
    assert shown["Cut at the token limit"] == "40 6.2%"
    assert shown["Kept"] == "502 samples 78.4% of 640"
    assert shown["Duplicates"] == "3 3 equal, nearly equal ones not looked for"
    assert shown["Calibration pool"].endswith("262,144 tokens")
    assert "Median perplexity 12.31 before any filter, 10.07 after the last." in page


def test_the_tables_have_the_reports_numbers():
    report = example_report(4)
    perplexity, _, _, errors, sparsities, costs = tables(render_page(report))
    assert perplexity[1][:4] == ["python-docs", "12.35", "15.10", "+22.3%"]
    assert perplexity[2][4:] == ["141", "2,048"]
    assert errors[0] == ["layer", *LINEARS, "mean"]
    for row, layer in zip(errors[1:], report["prune"]["layers"], strict=True):
        linears = layer["linears"].values()
        mean = sum(linear["relative_error"] * linear["parameters"] for linear in linears) / 1300
        written = [float(cell) for cell in row]
        exact = [layer["layer"], *(linear["relative_error"] for linear in linears), mean]
        assert written == pytest.approx(exact, rel=5e-3)
    assert {cell for row in sparsities[1:] for cell in row[1:]} == {"50.0%"}
    assert costs[1] == ["0", "0.05 s", "1.25 s", "0.50 s", "2.00 s", "0.10 s", "3.90 s", "1.0 MiB",
                        "1.0 MiB", "3.0 GiB"]  # fmt: skip


def test_sources_and_what_was_read_have_the_reports_numbers():
    page = render_page(curated_report())
    _, sources, read, *_ = tables(page)
    assert sources[1] == ["self-generated", "480", "401,200", "350", "300", "210,000", "80.1%", "103"]  # fmt: skip
    assert [row[0] for row in sources[1:]] == ["self-generated", "slimpajama-validation"]
    assert read[2] == ["slimpajama-validation", "81,000", "9,300", "78.7%"]
    assert [row[0] for row in read[1:]][2:] == ["c4", "wikipedia-en", "dclm-baseline"]
    shown = facts(page)
    assert shown["Duplicates"] == "43 12 equal, 31 nearly"
    assert shown["Kept"] == "487 samples 76.5% of 637"
    assert "From 2 sources, filtered and packed" in page
    assert "Mean score of the 50% least expected tokens" in page


def test_shards_that_were_set_aside_are_named_in_one_line():
    report = curated_report()
    assert (
        "2 shards, 1,000 rows, were set aside: rows 1,000 to 1,499 (engine died three times); "
        "2,500 to 2,999 (no answer within 90 s)"
    ) in render_page(report)
    report["generate"]["set_aside"] = [{"reason": HOSTILE, "rows": [0, 5]}]
    page = render_page(report)
    assert_loads_nothing(page)
    line = text_of(parse(page).find(".//p[@class='aside']"))
    assert line.startswith("1 shard, 5 rows, was set aside: rows 0 to 4 (<script>")
    report["generate"]["set_aside"] *= 5
    assert "; and 2 more" in render_page(report)
    report["generate"]["set_aside"] = []
    assert "set aside" not in render_page(report)


def test_text_that_nobody_scored_has_no_histogram_of_perplexity():
    report = curated_report(1)
    for step in report["curate"]["steps"]:
        step["perplexity"] = {"edges": [], "counts": [], "median": None}
    assert drawn(render_page(report))[1:6] == [*CURATE[1:], LIKENESS[0]]


def test_a_run_without_filters_has_no_bars_of_them():
    report = curated_report(1)
    report["curate"]["steps"] = report["curate"]["steps"][:1]
    page = render_page(report)
    assert drawn(page)[1:3] == [CURATE[0], CURATE[2]]
    assert "Median perplexity 12.30." in page


def test_parts_of_the_analysis_may_be_missing():
    report = curated_report(1)
    analysis = report["curate"]["analysis"]
    analysis["min_k"] = None
    assert drawn(render_page(report))[6:10] == [*LIKENESS, MAPS[0]]
    analysis["min_k"] = {
        "share": 0.5,
        "sources": {},
        "references": {},
    }  # no document was long enough
    assert drawn(render_page(report))[6:10] == [*LIKENESS, MAPS[0]]
    analysis["min_k"] = curated_report()["curate"]["analysis"]["min_k"]
    analysis["similarity"] = {}
    assert drawn(render_page(report))[6:8] == [MIN_K, MAPS[0]]
    del report["curate"]["analysis"]
    assert drawn(render_page(report))[6] == MAPS[0]


def test_maps_of_many_references_take_the_whole_width():
    report = curated_report(1)
    analysis = report["curate"]["analysis"]
    wide = '<figure class="wide">'
    before = render_page(report).count(wide)
    names = [f"reference-{place}" for place in range(5)]
    analysis["vocabulary"]["references"] = dict.fromkeys(names, analysis["vocabulary"]["references"]["c4"])  # fmt: skip
    for source, likeness in analysis["similarity"].items():
        analysis["similarity"][source] = dict.fromkeys(names, likeness["c4"])
    assert render_page(report).count(wide) == before + 3


def test_one_sparsity_everywhere_is_a_sentence_and_several_are_a_map():
    report = example_report()
    even = render_page(report)
    assert "50.0% in every linear of every layer." in even
    report["prune"]["layers"][1]["linears"]["mlp.up_proj"]["sparsity"] = 0.0  # one left dense
    uneven = render_page(report)
    assert "in every linear of every layer." not in uneven
    assert "Share of a linear's weights that are zero: 0.0% to 50.0%." in uneven.replace("&#39;", "'")  # fmt: skip
    assert set(MAPS) <= set(drawn(uneven))


def test_hostile_text_is_shown_and_not_run():
    report = example_report()
    report["samples"] = [
        {"row": 1, "perplexity": 2.0, "tokens": 3, "prefix": HOSTILE, "text": HOSTILE}
    ]
    report["config"] = {"output": HOSTILE, HOSTILE: [HOSTILE]}
    report["versions"] = {HOSTILE: HOSTILE}
    report["model"]["path"] = report["prune"]["method"] = report["model"]["dtype"] = HOSTILE
    report["generate"]["finish_reasons"] = report["curate"]["dropped"] = {HOSTILE: 1}
    report["stages"]["generate"]["losses"] = [HOSTILE]
    report["perplexity"] = {HOSTILE: report["perplexity"]["wikitext"]}
    report["prune"]["layers"][0]["linears"][HOSTILE] = {
        "sparsity": 0.1, "relative_error": 0.2, "parameters": 1
    }  # fmt: skip
    report["prune"]["layers"][0]["seconds"][HOSTILE] = 1.0
    curate = curated_report()["curate"]
    curate["sources"] = {HOSTILE: curate["sources"]["self-generated"]}
    curate["steps"][1]["filter"] = HOSTILE
    likeness = curate["analysis"]["similarity"]["self-generated"]["c4"]
    curate["analysis"]["similarity"] = {HOSTILE: {HOSTILE: likeness}}
    for kind in ("vocabulary", "min_k"):
        of = curate["analysis"][kind]["sources"]
        of[HOSTILE] = of.pop("self-generated")
    report["curate"] |= curate
    page = render_page(report)
    assert_loads_nothing(page)
    box = parse(page).find(".//div[@class='text']")
    assert box is not None
    assert "".join(box.itertext()) == HOSTILE * 2
    assert [mark.text for mark in box] == [HOSTILE]
    assert page.count("<mark>") == 2  # the legend's and the prefix's


def test_characters_that_html_cannot_hold_are_replaced():
    report = example_report()
    report["samples"][0]["prefix"] = ""
    report["samples"][0]["text"] = "a\x00b\x1b[0m\ud800\uffff\tc\n\u202e日本"
    page = render_page(report)
    page.encode("utf-8")
    box = parse(page).find(".//div[@class='text']")
    assert box is not None
    assert "".join(box.itertext()) == "a\ufffdb\ufffd[0m\ufffd\ufffd\tc\n\u202e日本"


def test_the_prefix_is_marked_before_the_text():
    report = example_report()
    report["samples"].append({"row": 3, "perplexity": 1.0, "tokens": 4, "prefix": "", "text": "x"})
    report["samples"].append(
        {"row": 4, "perplexity": 1.0, "tokens": 4, "prefix": "ha", "text": "ha"}
    )
    boxes = parse(render_page(report)).findall(".//div[@class='text']")
    assert ["".join(box.itertext()) for box in boxes] == ["Once upon", "def main():", "x", "haha"]
    assert [[mark.text for mark in box] for box in boxes] == [["Once"], ["def"], [], ["ha"]]


def test_the_configuration_reads_back_as_yaml_in_its_order():
    report = example_report()
    report["config"]["odd"] = {"word": "yes", "text": "a: b\n#c", "quoted": "2:4", "colon": "a:"}
    report["config"]["even"] = {
        "empty": [],
        "none": None,
        "nested": [1, [2.5, True]],
        "url": "s3://b/c",
        "number": "1e-3",
        "long": "word " * 400,
        "日本": "\u2028語",
    }
    blocks = ["".join(block.itertext()) for block in parse(render_page(report)).iter("pre")]
    read = [YAML(typ="safe", pure=True).load(block) for block in blocks]
    assert read == [report["config"], report["versions"]]
    assert list(read[0]) == ["model", "curate", "prune", "odd", "even"]


@pytest.mark.parametrize("empty", [None, {}])
@pytest.mark.parametrize(
    ("section", "heading"),
    [
        ("perplexity", "Held-out perplexity"),
        ("prune", "Pruned layers"),
        ("samples", "What the model wrote"),
        ("stages", "Time and memory"),
        ("generate", None),
        ("curate", None),
        ("versions", None),
        ("model", None),
    ],
)
def test_a_missing_section_is_left_out(section, heading, empty):
    report: Any = example_report(1)
    whole = headings(render_page(report))
    report[section] = {} if section in ("perplexity", "stages") else empty
    page = render_page(report)
    gone = [name for name in whole if name not in headings(page)]
    also = [name for name in whole if name.startswith("Perplexity on")]
    assert gone == ([*also, heading] if section == "perplexity" else [heading] if heading else [])
    assert not re.search(r"\bNone\b|Undefined|\bnan\b", body_of(page))


def test_a_run_that_has_hardly_begun_has_a_page():
    report: Any = dict.fromkeys(example_report(), None)
    report |= {"calibprune": "0.1.0", "created_at": "2026-11-22T16:00:00Z", "config": {}}
    report |= {"stages": {}, "samples": [], "perplexity": {}}
    page = render_page(report)
    assert_loads_nothing(page)
    assert headings(page) == ["Details"]
    report["stages"] = {"report": {"seconds": 0.5, "drivers": 1, "losses": []}}
    assert drawn(render_page(report)) == TIMES[:1]


def test_generated_text_alone_and_a_given_pool_alone_have_a_page():
    report: Any = example_report(1)
    report["curate"] = None
    assert "Written by the model itself." in render_page(report)
    report: Any = example_report(1)
    report["generate"], report["samples"] = None, []
    assert "Filtered and packed into sequences of equal length." in render_page(report)


def test_a_run_that_pruned_no_layer_has_no_tables_of_layers():
    report = example_report()
    report["prune"]["layers"] = []
    page = render_page(report)
    assert "Pruned layers" not in headings(page)
    assert drawn(page) == [PERPLEXITY, *CURATE, TIMES[0]]


def test_every_stage_shows_its_time_its_drivers_and_its_losses():
    report = example_report()
    page = render_page(report)
    assert "Nothing was lost on the way." in page
    stages = next(table for table in tables(page) if table[0][0] == "stage")
    assert stages[1:] == [["generate", "8.5 min", "0"], ["curate", "4.1 s", "0"], ["prune", "75 s", "0"]]  # fmt: skip
    report["stages"]["generate"] |= {"drivers": 3, "losses": ["engine 1 died", "<b>engine 2</b>"]}
    page = render_page(report)
    assert "Nothing was lost" not in page
    stages = next(table for table in tables(page) if table[0][0] == "stage")
    assert stages[1] == ["generate", "8.5 min, 3 drivers", "2"]
    assert "drivers" not in "".join(stages[2])
    details = {text_of(one.find("summary")): one for one in parse(page).iter("details")}
    lines = [text_of(line) for line in details["2 lost in generate"].iter("li")]
    assert lines == ["engine 1 died", "<b>engine 2</b>"]
    assert sum("lost in" in summary for summary in details) == 1


def test_what_refinement_gained_is_said():
    report = example_report(2)
    assert "Refinement" not in render_page(report)
    linears = [x for layer in report["prune"]["layers"] for x in layer["linears"].values()]
    for linear, gain in zip(linears, (0, 0.1, 0.2, *[0.4] * len(linears)), strict=False):
        linear["unrefined_error"] = linear["relative_error"] / (1 - gain)
    said = f"lowered it in {len(linears) - 1} of {len(linears)} linears, by 40.0% in the median (10.0% to 40.0%)."
    assert f"Refinement {said}" in render_page(report)
    for linear in linears:
        linear["unrefined_error"] = linear["relative_error"]
    assert f"lowered it in 0 of {len(linears)} linears." in render_page(report)
    linears[0]["unrefined_error"] = float("inf")  # an output of nothing but zeros
    del linears[1]["unrefined_error"]
    assert f"lowered it in 0 of {len(linears) - 1} linears." in render_page(report)


def test_a_raised_damping_is_said():
    report = example_report(2)
    assert "damping was raised" not in render_page(report)
    path, linear = next(iter(report["prune"]["layers"][1]["linears"].items()))
    linear["damping"] = 0.1
    assert f"not positive definite: layer 1 {path} (0.1)." in render_page(report)


def test_values_that_are_not_finite_are_named_and_not_drawn():
    report = example_report()
    report["generate"] |= {
        "samples": 0,
        "tokens": 0,
        "tokens_per_second": None,
        "finish_reasons": {},
    }
    report["curate"]["perplexity"]["cut"] = float("inf")  # only empty samples were dropped
    report["samples"][0]["perplexity"] = float("inf")
    report["perplexity"]["wikitext"]["pruned"] = float("nan")
    report["prune"]["layers"][1]["linears"]["mlp.up_proj"]["relative_error"] = float("inf")
    page = render_page(report)
    assert "sample 7 · perplexity not finite" in page
    assert "Speed" not in facts(page)
    errors = next(table for table in tables(page) if table[0][0] == "layer")
    assert errors[2][1 + list(LINEARS).index("mlp.up_proj")] == errors[2][-1] == "not finite"
    assert not re.search(r"\b(nan|inf|None)\b", body_of(page))
    for layer in report["prune"]["layers"]:
        for linear in layer["linears"].values():
            linear["relative_error"] = float("inf")
    page = render_page(report)
    assert not set(MAPS) & set(drawn(page)) and "Pruned layers" in headings(page)


def test_a_linear_that_a_layer_does_not_have_is_a_dash():
    report = example_report()
    del report["prune"]["layers"][1]["linears"]["mlp.up_proj"]
    errors = next(table for table in tables(render_page(report)) if table[0][0] == "layer")
    column = 1 + list(LINEARS).index("mlp.up_proj")
    assert [row[column] for row in errors[1:]] == ["0.170", NO_VALUE, "0.204"]


def test_equal_reports_give_equal_bytes_and_stay_unchanged():
    report = example_report()
    before = copy.deepcopy(report)
    page = render_page(report)
    assert report == before
    script = (
        "import sys; from calibprune.reporting.page import render_page;"
        "from tests.calibprune.reporting.example import example_report;"
        "sys.stdout.buffer.write(render_page(example_report()).encode())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    command = [sys.executable, "-c", script]
    other = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert other.stdout == page.encode()


def test_a_page_of_126_layers_takes_seconds():
    report = example_report(126)
    report["prune"]["layers"][0]["linears"]["mlp.up_proj"]["sparsity"] = 0.0  # both maps are drawn
    start = time.process_time()
    page = render_page(report)
    assert time.process_time() - start < 30
    assert set(MAPS) <= set(drawn(page))
