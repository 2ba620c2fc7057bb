"""report: gathers what the stages recorded into report.json and one self-contained page.

Everything comes from the run's own folder, so that the report can be drawn on any machine and without the model.
"""

import datetime
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from calibprune import __version__, storage
from calibprune.calibration.filters import perplexity
from calibprune.calibration.pool import read_samples, sample_records
from calibprune.errors import DriftError, UserError
from calibprune.events import Event, Tick, note
from calibprune.pruning.export import FOLDER as CHECKPOINT
from calibprune.reporting.facts import PruneFacts, Report, SampleText, StageFacts
from calibprune.reporting.page import render_page
from calibprune.stage import Stage, describe_differences, flat
from calibprune.text import change, duration
from calibprune.text import perplexity as perplexity_in_words
from cluster.places import Need
from jobs.run import Run
from jobs.stages import STAGES, module

NAME = "report"
PUBLISHED: dict[str, Any] = {"recorded": False, "closing": ("report.json", "index.html")}
OTHERS = tuple(name for name in STAGES if name != NAME)
SAMPLE_CHARACTERS = 4000
"""Maximum characters that are shown of one sample."""


def skip(run: Run) -> str | None:
    return None


def check(run: Run) -> None:
    """Raises DriftError where a finished stage was made with other settings than the report would show."""
    if set(run.commands) != {NAME}:
        return
    if not run.begun:
        raise UserError(f"there is no run at {run.config.output} to report on")
    configured = run.config.model_dump(mode="json")
    for name in OTHERS:
        stage = run.stage(name)
        if name not in configured or not stage.finished:
            continue
        settings, made = flat({name: configured[name]}), stage.read_plan()["identity"]
        changed = [key for key in settings if key in made and made[key] != settings[key]]
        if changed:
            raise DriftError(
                f"{stage.url} was made with other settings: {describe_differences(made, settings, changed)}. "
                f"Use the same settings to report on it"
            )


def needs(run: Run) -> Iterator[Need]:
    return iter(())


def plan(run: Run) -> None:
    """Returns no plan: the report is made each time."""


def work(run: Run, stage: Stage, missing: Sequence[str]) -> Iterator[Event]:
    started = time.monotonic()
    report = collect(run)
    yield Tick()
    report["stages"][NAME] = {"seconds": time.monotonic() - started, "drivers": 1, "losses": []}
    storage.write_json(run.url(NAME, "report.json"), report)
    storage.write(run.url(NAME, "index.html"), render_page(report).encode())
    note(f"report: {run.url(NAME, 'index.html')}")


def facts(run: Run) -> None:
    """Returns no facts: the report shows those of the other stages."""


def collect(run: Run) -> Report:
    """Collects everything that the report shows. Unfinished stages are left out."""
    finished = [name for name in OTHERS if run.stage(name).finished]
    recorded, found = run.read(), dict[str, Any]()
    for name in finished:
        parent, _, inside = name.partition("/")
        facts = module(name).facts(run)
        if not inside:
            found[name] = facts
        elif facts is not None and found.get(parent):
            found[parent] = found[parent] | {inside: facts}
    return {
        "calibprune": __version__,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": run.config.model_dump(mode="json"),
        "versions": recorded.get("versions"),
        "model": recorded.get("model"),
        "stages": {name: _stage_facts(run, name) for name in finished if "/" not in name},
        "generate": found.get("generate"),
        "curate": found.get("curate"),
        "samples": _sample_texts(run) if {"generate", "curate"} <= found.keys() else [],
        "prune": found.get("prune"),
        "sparsity": _sparsity(found["prune"]) if "prune" in found else None,
        "perplexity": found.get("evaluate", {}),
    }


def _stage_facts(run: Run, name: str) -> StageFacts:
    facts = run.stage(name).manifest()["facts"]
    return {
        "seconds": facts["seconds"],
        "drivers": max(1, len(facts.get("drivers", ()))),
        "losses": facts.get("losses", []),
    }


def _sparsity(prune: PruneFacts) -> float:
    """Returns the share of zeros among the weights of all pruned linears."""
    linears = [linear for layer in prune["layers"] for linear in layer["linears"].values()]
    zeros = sum(round(linear["sparsity"] * linear["parameters"]) for linear in linears)
    return zeros / max(1, prune["parameters"])


def _sample_texts(run: Run) -> list[SampleText]:
    """Returns a few samples of the first shard, evenly spaced from the likeliest to the least likely by perplexity."""
    stage = run.stage("generate")
    shards, tokenizer = sample_records(stage), _tokenizer(run)
    if not shards or tokenizer is None:
        return []
    table = read_samples(stage, shards[0])
    prefix = table["prefix_length"].to_numpy()
    tokens = table["token_ids"].combine_chunks().value_lengths().to_numpy()
    values = perplexity(table["cumulative_logprob"].to_numpy(), tokens - prefix)
    order = np.argsort(values, kind="stable")
    count = min(run.config.report.sample_texts, len(order))
    texts: list[SampleText] = []
    for index in order[np.linspace(0, len(order) - 1, count).astype(int)] if count else ():
        ids = table["token_ids"][int(index)].as_py()
        texts.append(
            {
                "row": int(table["row"][int(index)].as_py()),
                "perplexity": float(values[index]),
                "tokens": len(ids),
                "prefix": tokenizer.decode(ids[: prefix[index]]),
                "text": tokenizer.decode(ids[prefix[index] :])[:SAMPLE_CHARACTERS],
            }
        )
    return texts


def _tokenizer(run: Run) -> Any:
    """Loads the tokenizer copied to the pruned checkpoint, else the model's; None where neither can be read."""
    from calibprune.model import load_tokenizer

    checkpoint = storage.join(run.stage("prune").url, CHECKPOINT)
    try:
        if run.stage("prune").finished:
            return load_tokenizer(checkpoint, run.config.model.trust_remote_code)
        return run.tokenizer
    except UserError as error:
        note(f"no samples are shown, their tokenizer cannot be read: {error}")
        return None


def show_result(run: Run) -> None:
    """Prints the result on the terminal in a few lines."""
    import logging

    from rich.table import Table

    from jobs.output import console, is_json

    report = cast(Report, storage.read_json(run.url(NAME, "report.json")))
    table = Table(title="held-out perplexity", title_justify="left")
    for heading in ("text", "tokens a sequence", "dense", "pruned", "change"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    for name, facts in report["perplexity"].items():
        dense, pruned = facts["dense"], facts["pruned"]
        measured = [perplexity_in_words(dense), perplexity_in_words(pruned)]
        table.add_row(name, str(facts["sequence_tokens"]), *measured, change(dense, pruned))
    if report["perplexity"] and is_json():
        fields = {"event": "perplexity"} | report["perplexity"]
        logging.getLogger("calibprune").info("perplexity", extra={"fields": fields})
    elif report["perplexity"]:
        console.print(table)
    if report["sparsity"] is not None and report["prune"] is not None:
        prune = report["prune"]
        note(
            f"{prune['method']}: {report['sparsity']:.2%} of {prune['parameters']:,} weights are zero"
        )
    seconds = {
        name: report["stages"][name]["seconds"] for name in STAGES if name in report["stages"]
    }
    listed = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    note(f"time: {listed}; {duration(sum(seconds.values()))} in all")
