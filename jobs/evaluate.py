"""evaluate: held-out perplexity of the dense and the pruned model, each in one streamed sweep by all workers."""

from collections.abc import Iterator, Sequence
from typing import Any

from calibprune import storage
from calibprune.events import Event, UnitDone, emit, note
from calibprune.pruning.export import FOLDER
from calibprune.reporting.facts import EvaluateFacts
from calibprune.stage import Stage
from cluster.gang_driver import run_gang
from cluster.places import Need
from cluster.session import worker_bundle
from jobs.run import Run
from jobs.stages import Plan

NAME = "evaluate"
PUBLISHED: dict[str, Any] = {}
UNITS = ("dense", "pruned")


def skip(run: Run) -> str | None:
    return None


def check(run: Run) -> None:
    settings = run.config.evaluate
    if settings.perplexity:
        run.check_context("evaluate.sequence_tokens", settings.sequence_tokens)
        _ = run.windows


def needs(run: Run) -> Iterator[Need]:
    if not run.windows or run.stage(NAME).finished:
        return
    count = _workers(run)
    tokens = sum(ids.numel() for ids in run.windows.values())
    work = f"{tokens:,} tokens, dense and pruned"
    yield Need(NAME, "worker", count, count, worker_bundle(run.config.cluster), work)


def plan(run: Run) -> Plan:
    settings, windows = run.config.evaluate, run.windows
    identity = {
        "model": run.model_identity,
        "model.dtype": run.dtype,
        "pruned": run.stage("prune").content_id(),
        "evaluate": settings.model_dump(mode="json", exclude={"batch_sequences"}),
        "tokens": {name: storage.sha256(ids.numpy().tobytes()) for name, ids in windows.items()},
    }
    done = run.stage(NAME).done_units()
    sweeps = len([unit for unit in UNITS if unit not in done]) if windows else 0
    return Plan(identity, UNITS, "layers", sweeps * len(run.skeleton.layers))


def work(run: Run, stage: Stage, missing: Sequence[str]) -> Iterator[Event]:
    for unit in missing:
        if run.windows:
            yield from _measure(run, stage, unit)
        else:
            yield emit(UnitDone(stage.commit(unit, None, {"perplexity": {}})))
    if not run.windows:
        note("evaluate.perplexity names no text, nothing is measured")
    done = stage.done()
    for unit in UNITS:
        storage.write_json(storage.join(stage.url, f"perplexity-{unit}.json"), done[unit].facts)


def _measure(run: Run, stage: Stage, unit: str) -> Iterator[Event]:
    """Has a gang measure the perplexity of the dense or the pruned model on every text."""
    prune, hashes = run.stage("prune"), None
    model = run.config.model.model_copy(update={"dtype": run.dtype})
    if unit == "pruned":
        model = model.model_copy(update={"path": storage.join(prune.url, FOLDER)})
        hashes = _hashes(prune)
    settings = run.config.evaluate
    yield from run_gang(
        NAME, (model, run.windows, settings.batch_sequences, hashes, stage.url, unit),
        workers=_workers(run),
        bundle=worker_bundle(run.config.cluster),
        cluster=run.config.cluster,
        stage=stage,
        unit_of=lambda layer: unit,
        label=run.label(NAME),
    )  # fmt: skip


def _workers(run: Run) -> int:
    """Returns the number of configured workers, but no more than there are batches."""
    each = run.config.evaluate.batch_sequences
    batches = sum(-(-len(ids) // each) for ids in run.windows.values())
    return min(run.config.cluster.worker_count, batches)


def _hashes(prune: Stage) -> dict[str, str]:
    """Returns the sha256 of the pruned checkpoint's shards by file name."""
    return {
        record.file.removeprefix(f"{FOLDER}/"): record.sha256
        for record in prune.records()
        if record.file is not None and record.sha256 is not None
    }


def facts(run: Run) -> dict[str, EvaluateFacts]:
    done = run.stage(NAME).done()
    dense, pruned = (done[unit].facts["perplexity"] for unit in UNITS)
    return {
        name: {
            "dense": measured["perplexity"],
            "pruned": pruned[name]["perplexity"],
            "sequence_tokens": measured["sequence_tokens"],
            "sequences": measured["sequences"],
        }
        for name, measured in dense.items()
    }
