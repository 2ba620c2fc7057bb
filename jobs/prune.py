"""prune: a gang of workers sweeps the pool through the model, solves layer by layer and streams the checkpoint out."""

import time
from typing import Any

from calibprune import storage
from calibprune.calibration.pool import describe_pool
from calibprune.pruning.allocation import foreseen, in_words, is_measured, missed, shapes_of
from calibprune.pruning.export import ALLOCATION, finish_checkpoint
from calibprune.pruning.linears import chosen_linears
from calibprune.pruning.loop import units_of
from calibprune.pruning.snapshots import FOLDER as SNAPSHOTS
from calibprune.stage import Record, Stage
from cluster.gang_driver import run_gang
from cluster.places import Bundle
from cluster.session import worker_bundle
from jobs.progress import Steps, say, tick
from jobs.run import Run, versions
from jobs.watching import Watch

SETTINGS_WITHOUT_EFFECT = {"pool", "offload", "snapshot_layers", "layer_timeout_seconds"}
"""On the result, that is: they may differ when a run is taken up again."""


def run(run: Run) -> None:
    settings, stage = run.config.prune, run.stage("prune")
    bundle = worker_bundle(run.config.cluster)
    identity = {
        "model": run.model_identity,
        "model.dtype": run.dtype,
        "pool": describe_pool(run.pool_url).identity,
        "prune": settings.model_dump(mode="json", exclude=SETTINGS_WITHOUT_EFFECT),
        "device": "cuda" if bundle.gpus else "cpu",
        "threads": None if bundle.gpus else bundle.cpus,
        "versions": {name: versions()[name] for name in ("torch", "transformers")},
    }
    missing = stage.plan(identity, units_of(run.skeleton, settings))
    if not missing and stage.finished:
        say("prune: done already")
        return
    started = time.monotonic()
    facts: dict[str, Any] = {"resumed": bool(stage.done_units())}
    if missing:
        facts |= _prune(run, stage, bundle, missing)
    finish_checkpoint(stage, run.skeleton.checkpoint.url, settings)
    storage.remove_folder(storage.join(stage.url, SNAPSHOTS))
    facts["bytes_written"] = sum(record.bytes for record in stage.done().values())
    stage.finish(facts | {"seconds": time.monotonic() - started})


def _prune(run: Run, stage: Stage, bundle: Bundle, missing: list[str]) -> dict[str, Any]:
    """Has the missing units committed; returns what the workers used, all of them together."""
    settings = run.config.prune
    workers = usable_workers(run)
    chosen = chosen_linears(run.skeleton, settings)
    removed = foreseen(settings, shapes_of(run.skeleton, chosen))
    say(_plan(run, workers, chosen, removed))
    _say_if_missed(run, removed)
    losses: list[str] = []
    used: list[dict[str, Any]] = []
    units = len(stage.read_plan()["units"])
    watch = Watch(stage, units, units - len(missing))
    with Steps("prune", "layers and rest", units, units - len(missing)) as steps:

        def notice(text: str) -> None:
            losses.append(text)
            say(f"prune: {text}")

        events = run_gang(
            "prune",
            (run.config.model, settings, run.pool_url, stage.url),
            workers=workers,
            bundle=bundle,
            cluster=run.config.cluster,
            layer_timeout_seconds=settings.layer_timeout_seconds,
            progress=lambda: len(stage.done_units()),
            notice=notice,
            failed=watch.failed,
            label=watch.label,
        )
        for event in events:
            tick()
            match event:
                case Record():
                    watch.committed(event)
                    steps.add(f"{settings.method.type} {event.unit}")
                    if event.unit == ALLOCATION:
                        say(f"prune: {settings.allocation.type} takes {in_words(event.facts)}")
                        _say_if_missed(run, event.facts)
                case str():
                    say(f"prune: {event}")
                case dict():
                    used.append(event)
    return {
        "workers": workers,
        "losses": losses,
        "bytes_read": sum(worker["bytes_read"] for worker in used),
        "peak_host_memory_bytes": max(worker["peak_host_memory_bytes"] for worker in used),
    }


def _say_if_missed(run: Run, allocation: dict[str, Any]) -> None:
    if line := missed(run.config.prune, allocation):
        say(f"prune: {line}")


def usable_workers(run: Run) -> int:
    """The workers asked for, but no more than there are micro-batches to sweep."""
    wanted = run.config.cluster.worker_count
    sequences = describe_pool(run.pool_url).sequences
    batches = -(-sequences // run.config.prune.batch_sequences)
    if batches < wanted:
        say(
            f"prune: {sequences} sequences in micro-batches of {run.config.prune.batch_sequences} keep "
            f"{batches} of {wanted} workers busy; lower prune.batch_sequences to use more"
        )
    return min(wanted, batches)


def _plan(run: Run, workers: int, chosen: list[tuple[str, ...]], removal: dict[str, Any]) -> str:
    """What is about to be done, in one line."""
    settings = run.config.prune
    total = sum(len(run.skeleton.linears(index)) for index in range(len(chosen)))
    picked = sum(map(len, chosen))
    dense = f", {total - picked} linears left dense" if picked < total else ""
    workers_named = f"{workers} worker{'s' if workers > 1 else ''}"
    removed = in_words(removal)
    if is_measured(settings):
        removed += f", shared out by {settings.allocation.type}"
    method = settings.method.type + (f" and {settings.refine.type}" if settings.refine else "")
    return f"prune: {method} takes {removed}: {picked} linears in {len(chosen)} layers on {workers_named}{dense}"
