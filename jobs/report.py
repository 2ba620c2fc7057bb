"""report: gathers what the stages recorded into report.json and one self-contained page."""

import datetime
import time
from typing import Any, cast

import numpy as np

from calibprune import __version__, storage
from calibprune.calibration.decide import UNIT as SELECTION
from calibprune.calibration.filters import perplexity
from calibprune.calibration.pool import read_samples, sample_records
from calibprune.pruning.export import ALLOCATION, REST, overall_sparsity
from calibprune.reporting.facts import Report
from calibprune.reporting.page import render_page
from calibprune.stage import Record, Stage, flat
from jobs.analysis import FOLDER as ANALYSIS
from jobs.analysis import compared
from jobs.progress import say
from jobs.run import Run, versions

SAMPLE_CHARACTERS = 4000
SHOWN_OF_LINEARS = ("relative_error", "unrefined_error", "parameters")
ORDER = ("generate", "curate", "prune", "evaluate", "report")


def run(run: Run) -> None:
    started = time.monotonic()
    report = collect(run)
    seconds = time.monotonic() - started
    report["stages"]["report"] = {"seconds": seconds, "drivers": 1, "losses": []}
    storage.write_json(run.url("report", "report.json"), report)
    storage.write(run.url("report", "index.html"), render_page(cast(Report, report)).encode())


def collect(run: Run) -> dict[str, Any]:
    """Everything the report shows. Stages that are not finished are left out."""
    stages = {name: run.stage(name) for name in ("generate", "curate", "prune", "evaluate")}
    finished = {name: stage for name, stage in stages.items() if stage.finished}
    report: dict[str, Any] = {
        "calibprune": __version__,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": run.config.model_dump(mode="json"),
        "versions": versions(),
        "model": model_facts(run),
        "stages": {
            name: {"seconds": facts["seconds"], "drivers": 1, "losses": facts.get("losses", [])}
            for name, stage in finished.items()
            for facts in [stage.manifest()["facts"]]
        },
        "generate": generate_facts(run) if "generate" in finished else None,
        "curate": curate_facts(run) if "curate" in finished else None,
        "samples": sample_texts(run) if {"generate", "curate"} <= finished.keys() else [],
        "prune": None,
        "sparsity": None,
        "perplexity": {},
    }
    if "prune" in finished:
        report["prune"] = prune_facts(run)
        report["sparsity"] = overall_sparsity(
            [record.facts["linears"] for record in _layers(stages["prune"])]
        )
    if "evaluate" in finished:
        report["perplexity"] = perplexity_facts(run)
    return report


def model_facts(run: Run) -> dict[str, Any]:
    skeleton = run.skeleton
    linears = [
        linear for i in range(len(skeleton.layers)) for linear in skeleton.linears(i).values()
    ]
    return {
        "path": run.config.model.path,
        "architecture": type(skeleton.model).__name__,
        "parameters": sum(parameter.numel() for parameter in skeleton.model.parameters()),
        "prunable_parameters": sum(linear.weight.numel() for linear in linears),
        "layers": len(skeleton.layers),
        "dtype": run.dtype,
    }


def generate_facts(run: Run) -> dict[str, Any]:
    stage = run.stage("generate")
    records, facts = sample_records(stage), stage.manifest()["facts"]
    reasons: dict[str, int] = {}
    for record in records:
        for reason, count in record.facts["finish_reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    return {
        "samples": sum(record.facts["rows"] for record in records),
        "tokens": sum(record.facts["tokens"] for record in records),
        "tokens_per_second": _rate(facts["tokens"], facts.get("working_seconds")),
        "finish_reasons": reasons,
        "set_aside": [
            {"reason": record.facts["set_aside"], "rows": record.facts["rows_missing"]}
            for record in stage.records()
            if "set_aside" in record.facts
        ],
    }


def _rate(tokens: int, seconds: float | None) -> float | None:
    """Tokens a second while engines were ready; None where nothing was generated."""
    return tokens / seconds if tokens and seconds else None


def curate_facts(run: Run) -> dict[str, Any]:
    """What was selected, and how the sources compare with the references that are configured, if that is done."""
    stage = run.stage("curate")
    done = Stage(storage.join(stage.url, ANALYSIS))
    analysis = {}
    if done.finished and done.read_plan()["identity"].items() >= flat(compared(run)).items():
        analysis = {"analysis": done.record(ANALYSIS).facts}
    return stage.record(SELECTION).facts | analysis


def prune_facts(run: Run) -> dict[str, Any]:
    planned = run.stage("prune").read_plan()[
        "identity"
    ]  # what was done, whatever is configured now
    layers = []
    for record in _layers(run.stage("prune")):
        facts = {key: value for key, value in record.facts.items() if key != "tensors"}
        facts["linears"] = {
            name: {
                "sparsity": linear["zeros"] / linear["parameters"],
                **{name: linear[name] for name in SHOWN_OF_LINEARS if name in linear},
            }
            for name, linear in record.facts["linears"].items()
        }
        layers.append(facts)
    facts = run.stage("prune").manifest()["facts"]
    return {
        "method": planned["prune.method.type"],
        "pattern": planned["prune.pattern"],
        "allocation": planned["prune.allocation.type"],
        "refine": planned.get("prune.refine.type"),
        "parameters": sum(
            one["parameters"] for layer in layers for one in layer["linears"].values()
        ),
        "workers": facts.get("workers"),
        "bytes_read": facts.get("bytes_read"),
        "bytes_written": facts["bytes_written"],
        "layers": layers,
    }


def _layers(stage: Stage) -> list[Record]:
    """The records of the pruned layers."""
    return [record for record in stage.records() if record.unit not in (REST, ALLOCATION)]


def perplexity_facts(run: Run) -> dict[str, Any]:
    done = run.stage("evaluate").done()
    dense, pruned = (done[unit].facts["perplexity"] for unit in ("dense", "pruned"))
    return {
        name: {
            "dense": facts["perplexity"],
            "pruned": pruned[name]["perplexity"],
            "sequence_tokens": facts["sequence_tokens"],
            "sequences": facts["sequences"],
        }
        for name, facts in dense.items()
    }


def sample_texts(run: Run) -> list[dict[str, Any]]:
    """A few samples of the first shard: the likeliest, the median and the least likely, by perplexity."""
    stage = run.stage("generate")
    shards = sample_records(stage)
    if not shards:
        return []
    table = read_samples(stage, shards[0])
    prefix = table["prefix_length"].to_numpy()
    tokens = table["token_ids"].combine_chunks().value_lengths().to_numpy()
    values = perplexity(table["cumulative_logprob"].to_numpy(), tokens - prefix)
    order = np.argsort(values, kind="stable")
    count = min(run.config.report.sample_texts, len(order))
    texts = []
    for index in order[np.linspace(0, len(order) - 1, count).astype(int)] if count else ():
        ids = table["token_ids"][int(index)].as_py()
        decode = run.tokenizer.decode
        texts.append(
            {
                "row": int(table["row"][int(index)].as_py()),
                "perplexity": float(values[index]),
                "tokens": len(ids),
                "prefix": decode(ids[: prefix[index]]),
                "text": decode(ids[prefix[index] :])[:SAMPLE_CHARACTERS],
            }
        )
    return texts


def say_result(report: dict[str, Any]) -> None:
    """The result in a few lines on the terminal."""
    from rich.table import Table

    from jobs import log
    from jobs.progress import console

    table = Table(title="held-out perplexity", title_justify="left")
    for heading in ("text", "tokens a sequence", "dense", "pruned", "change"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    for name, facts in report["perplexity"].items():
        dense, pruned = facts["dense"], facts["pruned"]
        table.add_row(
            name, str(facts["sequence_tokens"]), f"{dense:.2f}", f"{pruned:.2f}", f"{pruned / dense - 1:+.1%}"
        )  # fmt: skip
    if report["perplexity"] and log.is_json():
        log.event("perplexity", **report["perplexity"])
    elif report["perplexity"]:
        console.print(table)
    if report["sparsity"] is not None:
        method = report["prune"]["method"]
        say(
            f"{method}: {report['sparsity']:.2%} of {report['prune']['parameters']:,} weights are zero"
        )
    seconds = {
        name: report["stages"][name]["seconds"] for name in ORDER if name in report["stages"]
    }
    listed = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    say(f"time: {listed}; {sum(seconds.values()):.0f} s in all")
