"""The page is well-formed, loads nothing, shows the report's own numbers and treats text as text."""

import copy
import os
import re
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
import yaml

from calibprune.reporting.page import render_page
from tests.calibprune.reporting.example import LINEARS, curated_report, example_report

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert(1)</script></pre></div><img src=x onerror=alert(2)> &amp; ]]> \"'{{ 7*7 }}"


def parse(page: str) -> ElementTree.Element:
    """The page as a tree. It is written so that a strict XML parser takes it."""
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
    assert len(list(parse(page).iter(f"{SVG}svg"))) == 5


def test_a_page_with_sources_and_filters_is_well_formed_too():
    page = render_page(curated_report())
    assert_loads_nothing(page)
    drawings = [svg.get("aria-labelledby") for svg in parse(page).iter(f"{SVG}svg")]
    new = ["filter-steps", "kept", "lengths", "repetition", "repeats",
           "similarity-jaccard", "similarity-coverage", "similarity-unigram-js", "min-k"]  # fmt: skip
    assert drawings[1:10] == [f"{name}-title" for name in new]
    assert "Sources and reference corpora" in headings(page)
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", text_of(parse(page).find("body")))


@pytest.mark.parametrize("report", [example_report(20), curated_report()])
def test_ids_are_unique_and_every_reference_has_its_target(report):
    page = render_page(report)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^")]+)', page)) == set(ids)


def test_every_figure_has_a_text_alternative():
    for drawing in parse(render_page(example_report())).iter(f"{SVG}svg"):
        title = drawing.find(f"{SVG}title")
        assert title is not None
        assert title.text
        assert drawing.get("role") == "img"
        assert drawing.get("aria-labelledby") == title.get("id")


def test_the_headline_has_the_reports_numbers():
    page = render_page(example_report())
    values = [float(data.get("value", "nan")) for data in parse(page).iter("data")]
    assert values == [12.3456, 15.1042, 17.81, 40.07, 0.49987]
    numbers = [text_of(p) for p in parse(page).iter("p") if p.get("class") == "numbers"]
    assert numbers == ["12.35 → 15.10", "17.81 → 40.07"]
    shown = facts(page)
    assert shown["Sparsity, measured"] == "50.0% 53.07 M of 106.2 M weights are zero"
    assert shown["Method"] == "wanda unstructured"
    assert shown["Model"] == "134.5 M parameters LlamaForCausalLM, 3 layers, bfloat16"
    assert shown["Total time"].startswith("9 min 52 s")
    assert text_of(parse(page).find(".//h1")) == "tiny-llama"


def test_the_calibration_text_has_the_reports_numbers():
    page = render_page(example_report())
    shown = facts(page)
    assert shown["Generated"] == "640 samples 123,456 tokens"
    assert shown["Speed"] == "2,346 tokens/s"
    assert shown["Ended by themselves"] == "600 93.8%"
    assert shown["Cut at the token limit"] == "40 6.2%"
    assert shown["Kept"] == "502 samples 78.4% of 640"
    assert shown["Dropped by perplexity"] == "128 20.0%"
    assert shown["Dropped by length"] == "10 1.6%"
    assert shown["Calibration pool"].endswith("262,144 tokens")
    assert "dropped the 128 least likely of 640 samples (20.0%)" in page


def test_the_tables_have_the_reports_numbers():
    report = example_report(4)
    perplexity, errors, sparsities, costs = tables(render_page(report))
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
    assert "Dropped by perplexity" not in shown, "the figure says it"
    assert "From 2 sources, filtered and packed" in page
    assert "Mean score of the 50% least expected tokens" in page


def test_shards_that_were_set_aside_are_told_in_one_line():
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


def drawn(page: str) -> set[str]:
    return set(re.findall(r'aria-labelledby="([\w-]+)-title"', page))


ANALYSIS = {"similarity-jaccard", "similarity-coverage", "similarity-unigram-js", "min-k"}


@pytest.mark.parametrize(
    ("keys", "gone"),
    [
        ({"steps"}, {"filter-steps", "kept"}),
        ({"lengths", "sources"}, {"lengths"}),
        ({"repetition", "repeats", "duplicates"}, {"repetition", "repeats"}),
        ({"analysis"}, ANALYSIS),
        (
            {"steps", "lengths", "sources", "repetition", "repeats", "duplicates", "analysis"},
            {"filter-steps", "kept", "lengths", "repetition", "repeats", *ANALYSIS},
        ),
    ],
)
def test_a_missing_part_of_curation_is_left_out(keys, gone):
    whole, absent, none = (curated_report(1) for _ in range(3))
    for key in keys:
        del absent["curate"][key]
        none["curate"][key] = None
    everything = drawn(render_page(whole)) | {"pool"}
    page = render_page(absent)
    assert page == render_page(none)
    assert everything - drawn(page) == gone | ({"pool"} if "steps" not in keys else set())
    assert not re.search(r"\bNone\b|Undefined|\bnan\b", text_of(parse(page).find("body")))


def test_parts_of_the_analysis_may_be_missing():
    report = curated_report(1)
    analysis = report["curate"]["analysis"]
    analysis["min_k"] = None
    page = render_page(report)
    assert "min-k-title" not in page and "similarity-jaccard-title" in page
    analysis["similarity"] = {"self-generated": {}}
    analysis["min_k"] = curated_report()["curate"]["analysis"]["min_k"]
    page = render_page(report)
    assert "min-k-title" in page and "similarity-jaccard-title" not in page
    for step in report["curate"]["steps"]:  # a natural source was never scored
        step["perplexity"] = {"edges": [], "counts": [], "median": None}
    page = render_page(report)
    assert "filter-steps-title" not in page and "kept-title" in page
    report["curate"]["steps"] = report["curate"]["steps"][:1]  # no filter at all
    assert "kept-title" not in render_page(report)


def test_one_sparsity_everywhere_is_a_sentence_and_several_are_a_map():
    report = example_report()
    even = render_page(report)
    assert "50.0% in every linear of every layer." in even
    report["prune"]["layers"][1]["linears"]["mlp.up_proj"]["sparsity"] = 0.0  # one left dense
    uneven = render_page(report)
    assert "in every linear of every layer." not in uneven
    assert "Share of a linear's weights that are zero: 0.0% to 50.0%." in uneven.replace("&#39;", "'")  # fmt: skip
    assert len(list(parse(uneven).iter(f"{SVG}svg"))) == 6


def test_hostile_text_is_shown_and_not_run():
    report = example_report()
    report["samples"] = [
        {"row": 1, "perplexity": 2.0, "tokens": 3, "prefix": HOSTILE, "text": HOSTILE}
    ]
    report["config"] = {"output": HOSTILE, HOSTILE: [HOSTILE]}
    report["versions"] = {HOSTILE: HOSTILE}
    report["model"]["path"] = report["prune"]["method"] = report["model"]["dtype"] = HOSTILE
    report["generate"]["finish_reasons"] = report["curate"]["dropped"] = {HOSTILE: 1}
    report["perplexity"] = {HOSTILE: report["perplexity"]["wikitext"]}
    report["prune"]["layers"][0]["linears"][HOSTILE] = {
        "sparsity": 0.1, "relative_error": 0.2, "parameters": 1
    }  # fmt: skip
    report["prune"]["layers"][0]["seconds"][HOSTILE] = 1.0
    curate = curated_report()["curate"]
    curate["sources"] = {HOSTILE: curate["sources"]["self-generated"]}
    curate["steps"][1]["filter"] = HOSTILE
    similarity = curate["analysis"]["similarity"]["self-generated"]
    curate["analysis"]["similarity"] = {HOSTILE: {HOSTILE: similarity["c4"]}}
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


def test_the_configuration_reads_back_as_yaml():
    report = example_report()
    report["config"]["odd"] = {"word": "yes", "text": "a: b\n#c", "quoted": "2:4", "colon": "a:"}
    report["config"]["even"] = {
        "empty": [],
        "none": None,
        "nested": [1, [2.5, True]],
        "url": "s3://b/c",
    }
    blocks = ["".join(block.itertext()) for block in parse(render_page(report)).iter("pre")]
    assert [yaml.safe_load(block) for block in blocks] == [report["config"], report["versions"]]


@pytest.mark.parametrize("empty", ["absent", "none", "empty"])
@pytest.mark.parametrize(
    ("section", "heading"),
    [
        ("perplexity", "Held-out perplexity"),
        ("prune", "Pruned layers"),
        ("samples", "What the model wrote"),
        ("stages", None),
        ("generate", None),
        ("curate", None),
        ("config", None),
        ("versions", None),
        ("model", None),
        ("sparsity", None),
        ("created_at", None),
        ("calibprune", None),
    ],
)
def test_a_missing_section_is_left_out(section, heading, empty):
    report = example_report(1)
    whole = headings(render_page(report))
    if empty == "absent":
        del report[section]
    else:
        report[section] = None if empty == "none" or section == "sparsity" else type(report[section])()  # fmt: skip
    page = render_page(report)
    gone = [name for name in whole if name not in headings(page)]
    also = [name for name in whole if name.startswith("Perplexity on")]
    assert gone == ([*also, heading] if section == "perplexity" else [heading] if heading else [])
    assert not re.search(r"\bNone\b|Undefined|\bnan\b", text_of(parse(page).find("body")))


@pytest.mark.parametrize(
    "report", [{}, {"sparsity": 0.0}, {"stages": {"report": {"seconds": 0.5}}}]
)
def test_a_run_that_has_hardly_begun_has_a_page(report):
    page = render_page(report)
    assert_loads_nothing(page)
    assert ("0.0%" in page.split("<body>")[1]) == ("sparsity" in report)


def test_parts_of_sections_may_be_missing():
    report = example_report()
    report["curate"]["perplexity"] = None
    report["prune"]["layers"] = []
    report["curate"]["dropped"] = {}
    page = render_page(report)
    assert "Pruned layers" not in headings(page)
    assert len(list(parse(page).iter(f"{SVG}svg"))) == 2

    report = example_report()
    report["curate"]["perplexity"]["cut"] = None
    report["perplexity"]["wikitext"]["pruned"] = None
    for layer in report["prune"]["layers"]:
        for linear in layer["linears"].values():
            linear["relative_error"] = None  # magnitude pruning looks at no inputs
    page = render_page(report)
    assert "No sample was dropped for its perplexity." in page
    assert "Relative output error" not in page
    assert "Sparsity per layer and linear" in page


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
    linears[0]["unrefined_error"] = linears[1]["relative_error"] = None
    assert f"lowered it in 0 of {len(linears) - 2} linears." in render_page(report)


def test_values_that_are_not_finite_are_said_and_not_drawn():
    report = example_report()
    report["generate"] |= {
        "samples": 0,
        "tokens": 0,
        "tokens_per_second": None,
        "finish_reasons": {},
    }
    report["curate"]["perplexity"]["cut"] = float("inf")  # only empty samples were dropped
    report["samples"][0]["perplexity"] = float("inf")
    report["prune"]["layers"][1]["linears"]["mlp.up_proj"]["relative_error"] = float("inf")
    page = render_page(report)
    assert "sample 7 · perplexity not finite" in page
    assert "layer 1, mlp.up_proj: not finite" in page
    assert not re.search(r"\b(nan|inf|None)\b", page)

    report["curate"]["perplexity"] = {"edges": [], "counts": [], "median": None, "cut": None}
    assert "pool-title" in page
    assert "pool-title" not in render_page(report)


def test_stages_are_shown_in_the_order_they_run():
    page = render_page(example_report())
    drawing = next(
        s for s in parse(page).iter(f"{SVG}svg") if s.get("aria-labelledby") == "stages-title"
    )
    names = [t.text for t in drawing.iter(f"{SVG}text") if "end" in t.get("style", "")]
    assert names == ["generate", "curate", "prune"]


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


def test_a_page_of_80_layers_takes_seconds():
    report = example_report(80)
    report["prune"]["layers"][0]["linears"]["mlp.up_proj"]["sparsity"] = 0.0  # both maps are drawn
    start = time.process_time()
    page = render_page(report)
    assert time.process_time() - start < 30
    assert page.count("<title>layer 79, ") == 2 * len(LINEARS) + 5
