"""Renders the report's page, one self-contained HTML file, from the facts of report.json.

The report stage collects the facts and writes the files. A section without facts is left out.
"""

import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from ruamel.yaml import YAML

from calibprune import text
from calibprune.reporting import figures, style
from calibprune.reporting.facts import CurateFacts, LayerFacts, Report, SetAside, StageFacts
from calibprune.reporting.layer_figures import (
    LayerTable,
    Quantity,
    layer_map,
    layer_seconds,
    layer_table,
)

MAX_SET_ASIDE_SHOWN = 3
"""Maximum number of abandoned shards that are listed."""
MIN_SPARSITY_SPREAD = 5e-4
"""Minimum difference between linears' sparsities for a map of them; below it, one number is shown instead."""


def render_page(report: Report) -> str:
    """Renders the whole page as HTML. Equal reports give equal pages; text in a report is never taken for HTML."""
    report = cast(Report, _printable(report))
    stages = report["stages"]
    pruned = report["prune"]["layers"] if report["prune"] else []
    layers = sorted(pruned, key=lambda layer: layer["layer"])
    tables = _tables(layers)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("calibprune.reporting", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=text.count, compact=text.compact, percent=text.percent, ppl=text.perplexity,
        ratio=text.ratio, duration=text.duration, size=text.size,
        moment=_moment, last_part=_last_part, yaml=_yaml,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        report,
        stages=stages,
        layers=layers,
        tables=tables,
        refined=_refined(layers),
        damped=_damped(layers),
        drawn=_draw(report, stages, layers, tables),
        colours=style.COLOURS,
        change=text.change,
        set_aside=_set_aside,
        max_narrow_references=figures.MAX_NARROW_REFERENCES,
    )


def _draw(
    report: Report,
    stages: Mapping[str, StageFacts],
    layers: Sequence[LayerFacts],
    tables: Mapping[Quantity, LayerTable],
) -> dict[str, Markup]:
    """Draws the figures that there are facts for; returns them by name."""
    with matplotlib.rc_context(style.RC):
        drawn = _curate_figures(report["curate"]) if report["curate"] else {}
        if report["perplexity"]:
            drawn["perplexity"] = figures.perplexity_bars(report["perplexity"])
        if stages:
            drawn["stages"] = figures.stage_seconds(stages)
        for quantity, table in tables.items():
            if quantity != "sparsity" or np.ptp(table.finite) >= MIN_SPARSITY_SPREAD:
                drawn[quantity] = layer_map(table, quantity)
        if layers:
            drawn["layers"] = layer_seconds(layers)
        return {name: style.to_svg(figure, name) for name, figure in drawn.items()}


def _curate_figures(curate: CurateFacts) -> dict[str, Figure]:
    drawn = {
        "lengths": figures.lengths(curate["lengths"]),
        "repetition": figures.repetition(curate["repetition"]),
        "repeats": figures.repeats(curate["repeats"]),
    }
    steps = curate["steps"]
    if steps[0]["perplexity"]["counts"]:  # none where no sample was scored
        drawn["steps"] = figures.filter_steps(steps)
    if len(steps) > 1:
        drawn["filters"] = figures.filter_bars(steps[1:])
    if analysis := curate.get("analysis"):
        if analysis["similarity"]:
            for measure in figures.MEASURES:
                drawn[measure] = figures.similarity_map(analysis["similarity"], measure)
        if (min_k := analysis["min_k"]) and (min_k["sources"] or min_k["references"]):
            drawn["min_k"] = figures.min_k_rows(min_k)
    return drawn


def _tables(layers: Sequence[LayerFacts]) -> dict[Quantity, LayerTable]:
    """Builds the tables of the layers; one without a finite value is left out."""
    quantities: tuple[Quantity, ...] = ("relative_error", "sparsity")
    tables = {quantity: layer_table(layers, quantity) for quantity in quantities}
    return {quantity: tables[quantity] for quantity in quantities if tables[quantity].finite.size}


def _refined(layers: Sequence[LayerFacts]) -> dict[str, Any] | None:
    """Summarises how much refinement lowered the linears' errors; None without a refinement."""
    linears = [linear for layer in layers for linear in layer["linears"].values()]
    pairs = [(x["unrefined_error"], x["relative_error"]) for x in linears if "unrefined_error" in x]
    lowered = [1 - after / before for before, after in pairs if after < before < math.inf]
    if not lowered:
        return {"linears": 0, "of": len(pairs)} if pairs else None
    shares = {"least": min(lowered), "median": statistics.median(lowered), "most": max(lowered)}
    return {"linears": len(lowered), "of": len(pairs), **shares}


def _damped(layers: Sequence[LayerFacts]) -> list[str]:
    """Describes the linears whose damping had to be raised, each in a few words."""
    return [
        f"layer {layer['layer']} {path} ({linear['damping']:g})"
        for layer in layers
        for path, linear in layer["linears"].items()
        if "damping" in linear
    ]


def _set_aside(shards: Sequence[SetAside]) -> str:
    """Returns one line that says which rows are missing, and why."""
    rows = sum(shard["rows"][1] - shard["rows"][0] for shard in shards)
    listed = "; ".join(
        f"{first:,} to {stop - 1:,} ({shard['reason']})"
        for shard in shards[:MAX_SET_ASIDE_SHOWN]
        for first, stop in [shard["rows"]]
    )
    more = len(shards) - MAX_SET_ASIDE_SHOWN
    ending = f"; and {more} more" if more > 0 else ""
    noun, verb = ("shard", "was") if len(shards) == 1 else ("shards", "were")
    return f"{len(shards)} {noun}, {rows:,} rows, {verb} set aside: rows {listed}{ending}"


def _printable(value: Any) -> Any:
    """Replaces characters that HTML or UTF-8 cannot hold by U+FFFD, in every text of a tree of values."""
    if isinstance(value, str):
        return re.sub(
            "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", value
        )
    if isinstance(value, Mapping):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    return value


def _last_part(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _moment(timestamp: str) -> str:
    return datetime.fromisoformat(timestamp).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _yaml(tree: Mapping[str, Any]) -> str:
    """Writes the tree as YAML 1.2, in its own order."""
    yaml, written = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.representer.sort_base_mapping_type_on_output = False
    yaml.allow_unicode, yaml.width = True, 1000
    yaml.dump(dict(tree), written)
    return written.getvalue()
