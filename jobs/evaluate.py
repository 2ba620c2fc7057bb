"""evaluate: held-out perplexity of the dense and the pruned model, each in one streamed sweep by all workers."""

from collections.abc import Iterator, Sequence
from typing import Any

from calibprune import storage
from calibprune.events import Event, UnitDone, emit, note
from calibprune.pruning.export import FOLDER
from calibprune.pruning.memory import GPU_SHARE, WorkerMemory, evaluation_memory
from calibprune.reporting.facts import EvaluateFacts
from calibprune.stage import Stage
from cluster.gang_driver import Relief, run_gang
from cluster.places import Need
from cluster.session import worker_bundle
from jobs.prune import OFFLOADING, movable
from jobs.run import Run
from jobs.stages import Plan

NAME = "evaluate"
PUBLISHED: dict[str, Any] = {}
UNITS = ("dense", "pruned")
SETTINGS_WITHOUT_EFFECT = {"batch_sequences", "offload"}
MORE_ROOM = (
    "use more workers or larger GPUs, or lower evaluate.sequences or evaluate.batch_sequences"
)


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
    work, bundle = f"{tokens:,} tokens, dense and pruned", worker_bundle(run.config.cluster)
    gpu = gpu_memory(run, count) if bundle.gpus else None
    yield Need(
        NAME, "worker", count, count, bundle, work,
        gpu_bytes=gpu.bytes if gpu else 0,
        movable_bytes=movable(gpu, _batches(run), count)
        if gpu and run.config.evaluate.offload is not False
        else 0,
        gpu_share=GPU_SHARE,
        more_room=MORE_ROOM,
    )  # fmt: skip


def gpu_memory(run: Run, workers: int) -> WorkerMemory:
    """Returns the memory of the GPU of one of `workers` workers."""
    each, windows = run.config.evaluate.batch_sequences, run.windows.values()
    shapes = [batch.shape for ids in windows for batch in ids.split(each)]
    return evaluation_memory(run.skeleton, shapes, workers)


def plan(run: Run) -> Plan:
    settings, windows = run.config.evaluate, run.windows
    identity = {
        "model": run.model_identity,
        "model.dtype": run.dtype,
        "pruned": run.stage("prune").content_id(),
        "evaluate": settings.model_dump(mode="json", exclude=SETTINGS_WITHOUT_EFFECT),
        "tokens": {name: storage.sha256(ids.numpy().tobytes()) for name, ids in windows.items()},
    }
    if windows and worker_bundle(run.config.cluster).gpus:
        identity["device"] = run.gpu_kind
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
    arguments = (model, run.windows, settings.batch_sequences, hashes, stage.url, unit)
    offloading = (*arguments, True) if settings.offload is None else None
    yield from run_gang(
        NAME, (*arguments, settings.offload),
        workers=_workers(run),
        bundle=worker_bundle(run.config.cluster),
        cluster=run.config.cluster,
        stage=stage,
        unit_of=lambda layer: unit,
        label=run.label(NAME),
        relief=Relief(MORE_ROOM, offloading, OFFLOADING),
    )  # fmt: skip


def _workers(run: Run) -> int:
    """Returns the number of configured workers, but no more than there are batches."""
    return min(run.config.cluster.worker_count, _batches(run))


def _batches(run: Run) -> int:
    each = run.config.evaluate.batch_sequences
    return sum(-(-len(ids) // each) for ids in run.windows.values())


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
