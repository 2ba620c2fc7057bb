"""The report's page: from the values of report.json to one self-contained HTML file.

Collecting the values and writing the files is the report stage's work. Any section may be missing.
"""

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from calibprune.reporting import comparisons, histograms, plots, units

STAGES = ("generate", "curate", "prune", "evaluate", "report")
SECTIONS = ("calibprune", "created_at", "config", "versions", "model", "generate", "curate",
            "samples", "prune", "perplexity")  # fmt: skip
SET_ASIDE_SHOWN = 3
KINDS = ("sources", "references")
SAME_SPARSITY = 5e-4
"""Sparsities that lie within this are one number on the page, not a map."""


def render_page(report: Mapping[str, Any]) -> str:
    """The whole page as HTML; equal reports give equal pages, and any text in them is shown as text."""
    report = _printable(report)
    seconds = _in_order(report.get("stages") or {})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("calibprune.reporting", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=units.count, compact=units.compact, percent=units.percent, ppl=units.perplexity,
        ratio=units.ratio, duration=units.duration, size=units.size, moment=_moment,
        last_part=_last_part, yaml=_yaml,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        {section: report.get(section) or None for section in SECTIONS},
        sparsity=report.get("sparsity"),
        total_seconds=sum(stage["seconds"] for stage in seconds.values()),
        change=units.change,
        set_aside=_set_aside,
        vocabulary=_vocabulary(report),
        draw=_draw(report, seconds),
        layers=_layers(report),
        quantities=_quantities(_layers(report)),
        refined=_refined(_layers(report)),
    )


def _draw(report: Mapping[str, Any], seconds: Mapping[str, Any]) -> dict[str, Markup]:
    """The figures that there are values for. Markup: our own drawings, with the names in them escaped."""
    curate, layers = report.get("curate") or {}, _layers(report)
    steps, analysis = curate.get("steps") or [], curate.get("analysis") or {}
    scored = all((step.get("perplexity") or {}).get("counts") for step in steps)
    likeness = {name: of for name, of in (analysis.get("similarity") or {}).items() if of}
    min_k = analysis.get("min_k") or {}
    wanted = {
        "perplexity": (plots.perplexity_bars, report.get("perplexity")),
        "pool": (
            histograms.pool_histogram,
            None if steps else _counted(curate.get("perplexity"), "counts"),
        ),
        "steps": (histograms.filter_steps, steps if scored else None),
        "kept": (comparisons.kept_bars, steps if any(step["filter"] for step in steps) else None),
        "lengths": (histograms.lengths, _counted(curate.get("lengths"), "before")),
        "repetition": (histograms.repetition, _counted(curate.get("repetition"), "before")),
        "repeats": (histograms.repeats, _counted(curate.get("repeats"), "before")),
        **{
            f"similarity_{measure}": (
                partial(comparisons.similarity_map, measure=measure),
                likeness,
            )
            for measure in comparisons.MEASURES
        },
        "min_k": (comparisons.min_k_rows, min_k if any(min_k.get(k) for k in KINDS) else None),
        "stages": (plots.stage_seconds, seconds),
        "layers": (plots.layer_seconds, layers),
    }
    return {name: Markup(plot(values)) for name, (plot, values) in wanted.items() if values}


def _counted(histogram: Mapping[str, Any] | None, counts: str) -> Mapping[str, Any] | None:
    """A histogram that has something in it."""
    return histogram if histogram and histogram.get(counts) else None


def _vocabulary(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was read of every source and reference, with its name."""
    analysis = (report.get("curate") or {}).get("analysis") or {}
    kinds = [(analysis.get("vocabulary") or {}).get(kind) or {} for kind in KINDS]
    return [{"name": name, **facts} for of in kinds for name, facts in of.items()]


def _layers(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    layers = (report.get("prune") or {}).get("layers") or []
    return sorted(layers, key=lambda layer: layer["layer"])


def _quantities(layers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Relative error and sparsity of the layers: range, map (unless it is one number) and table."""
    quantities = {}
    for quantity in ("relative_error", "sparsity"):
        _, names, table, means = plots.layer_table(layers, quantity)
        finite = table[np.isfinite(table)]
        if not finite.size:
            continue
        low, high = float(finite.min()), float(finite.max())
        same = quantity == "sparsity" and high - low < SAME_SPARSITY
        quantities[quantity] = {
            "low": low,
            "high": high,
            "map": None if same else Markup(plots.layer_map(layers, quantity)),
            "names": names,
            "rows": [
                [None if np.isnan(value) else float(value) for value in (*column, mean)]
                for column, mean in zip(table.T, means, strict=True)
            ],
        }
    return quantities


def _refined(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """By which share the refinement lowered the linears' errors; None without one."""
    linears = [linear for layer in layers for linear in layer["linears"].values()]
    errors = [(x.get("unrefined_error"), x.get("relative_error")) for x in linears]
    pairs = [(start, end) for start, end in errors if start is not None and end is not None]
    lowered = [1 - end / start for start, end in pairs if end < start < np.inf]
    if not lowered:
        return {"linears": 0, "of": len(pairs)} if pairs else None
    shares = {"least": min(lowered), "median": statistics.median(lowered), "most": max(lowered)}
    return {"linears": len(lowered), "of": len(pairs), **shares}


def _set_aside(shards: Sequence[Mapping[str, Any]]) -> str:
    """What is missing of the samples, in one line."""
    count, rows = len(shards), sum(shard["rows"][1] - shard["rows"][0] for shard in shards)
    listed = "; ".join(
        f"{first:,} to {stop - 1:,} ({shard['reason']})"
        for shard in shards[:SET_ASIDE_SHOWN]
        for first, stop in [shard["rows"]]
    )
    more = f"; and {count - SET_ASIDE_SHOWN} more" if count > SET_ASIDE_SHOWN else ""
    those = "1 shard, {} rows, was" if count == 1 else f"{count} shards, {{}} rows, were"
    return f"{those.format(units.count(rows))} set aside: rows {listed}{more}"


def _in_order(stages: Mapping[str, Any]) -> dict[str, Any]:
    order = [*STAGES, *stages]
    return {stage: stages[stage] for stage in sorted(stages, key=order.index)}


def _printable(value: Any) -> Any:
    """The same values; characters that HTML or UTF-8 cannot hold become U+FFFD."""
    if isinstance(value, str):
        return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "�", value)
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
    return "\n".join(_yaml_lines(tree))


def _yaml_lines(value: Any) -> Iterator[str]:
    items = value.items() if isinstance(value, Mapping) else (("-", item) for item in value)
    for key, item in items:
        head = "-" if key == "-" else f"{key}:"
        if isinstance(item, Mapping | list) and item:
            inner = list(_yaml_lines(item))
            if head == "-":
                yield f"- {inner.pop(0)}"
            else:
                yield head
            yield from (f"  {line}" for line in inner)
        else:
            yield f"{head} {_yaml_scalar(item)}"


def _yaml_scalar(value: Any) -> str:
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_./][\w./:+@-]*(?<!:)", value)
    if plain and value.lower() not in ("true", "false", "null", "yes", "no", "on", "off"):
        return value
    return json.dumps(value, ensure_ascii=False)
