"""prune: a gang of workers sweeps the pool through the model, solves layer by layer and streams the checkpoint out."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from calibprune import storage
from calibprune.checkpoint import INDEX
from calibprune.errors import UserError
from calibprune.events import Event, UnitDone, note
from calibprune.model import config_of_pruned
from calibprune.process import host_memory
from calibprune.pruning.allocation import (
    check_allocation,
    describe_summary,
    deviation_message,
    is_measured,
    predicted_summary,
    shapes_of,
)
from calibprune.pruning.export import ALLOCATION, REST, finish_checkpoint
from calibprune.pruning.layer import layer_unit
from calibprune.pruning.linears import chosen_linears
from calibprune.pruning.loop import units_of
from calibprune.pruning.memory import GPU_SHARE, WorkerMemory, worker_memory
from calibprune.pruning.snapshots import FOLDER as SNAPSHOTS
from calibprune.reporting.facts import PruneFacts
from calibprune.stage import Stage
from cluster.gang_driver import Relief, run_gang
from cluster.places import Need
from cluster.session import worker_bundle
from jobs.run import Run, versions
from jobs.stages import Plan

NAME = "prune"
OFFLOADING = "once more, with what paused forwards hold in host memory"
MORE_ROOM = "use more workers or larger GPUs, or lower curate.sequences or prune.batch_sequences"
LESS_SOLVING = (
    "use more workers or larger GPUs, or a method that needs no Gram matrix, such as wanda"
)
"""Advice where a worker does not fit its GPU: in general, and where solving takes most of it."""
PUBLISHED: dict[str, Any] = {"folder": "checkpoint", "closing": (INDEX,)}
SETTINGS_WITHOUT_EFFECT = {"pool", "offload", "snapshot_layers", "layer_timeout_seconds"}
"""Settings that do not change the result: a resumed run may have others."""
LINEAR_FACTS = ("relative_error", "unrefined_error", "parameters", "damping")
"""Facts of a linear that the report shows."""


def skip(run: Run) -> str | None:
    return None


def check(run: Run) -> None:
    chosen = chosen_linears(run.skeleton, run.config.prune)
    _check_pattern(run, chosen)
    check_allocation(run.config.prune, shapes_of(run.skeleton, chosen))
    if run.config.prune.pool is not None:
        context, tokens = run.context_tokens, run.pool_shape[1]
        if context and tokens > context:
            raise UserError(
                f"prune.pool holds sequences of {tokens} tokens, the model's context is {context}"
            )
    elif "curate" not in run.commands:
        run.stage("curate").manifest()


def _check_pattern(run: Run, chosen: Sequence[Sequence[str]]) -> None:
    n_of_m = run.config.prune.n_of_m
    if n_of_m is None:
        return
    for index, names in enumerate(chosen):
        linears = run.skeleton.linears(index)
        for name in names:
            if linears[name].in_features % n_of_m[1]:
                raise UserError(
                    f'prune.pattern "{run.config.prune.pattern}" does not fit {name} of layer {index}: its '
                    f"{linears[name].in_features} inputs are not a multiple of {n_of_m[1]}; take another pattern, or "
                    f"leave it dense with prune.keep='[{re.escape(name)}]'"
                )


def needs(run: Run) -> Iterator[Need]:
    if run.stage(NAME).finished:
        return
    bundle, (sequences, tokens) = worker_bundle(run.config.cluster), run.pool_shape
    batches = -(-sequences // run.config.prune.batch_sequences)
    count = min(run.config.cluster.worker_count, batches)
    host = pruning_memory(run, count, on_gpu=False)
    work = f"{sequences} sequences of {tokens} tokens"
    if not bundle.gpus:
        yield Need(
            NAME, "worker", count, count, bundle, work, host_bytes=host.bytes, more_room=MORE_ROOM
        )
        return
    gpu = pruning_memory(run, count, on_gpu=True)
    yield Need(
        NAME, "worker", count, count, bundle, work,
        # the layers that are read ahead and written, in pinned buffers of up to twice their size, and a serialised copy
        host_bytes=host.process + max(host.layers, host.outside),
        gpu_bytes=gpu.bytes,
        movable_bytes=0 if run.config.prune.offload is False else movable(gpu, batches, count),
        gpu_share=GPU_SHARE,
        more_room=LESS_SOLVING if gpu.largest == "solving" else MORE_ROOM,
    )  # fmt: skip


def movable(memory: WorkerMemory, batches: int, workers: int) -> int:
    """Returns the bytes that move to host memory: what paused forwards hold, except for the one that runs and the one
    that is fetched ahead."""
    mine = -(-batches // workers)
    return memory.paused * max(0, mine - 2) // mine


def pruning_memory(run: Run, workers: int, on_gpu: bool) -> WorkerMemory:
    """Returns the memory of one of `workers` pruning workers: on its GPU, or on the host."""
    sequences, tokens = run.pool_shape
    skeleton = replace(run.skeleton, device=torch.device("cuda" if on_gpu else "cpu"))
    return worker_memory(skeleton, run.config.prune, sequences, tokens, workers, host_memory())


def plan(run: Run) -> Plan:
    settings, bundle = run.config.prune, worker_bundle(run.config.cluster)
    identity = {
        "model": run.model_identity,
        "model.dtype": run.dtype,
        "pool": run.pool.identity,
        "prune": settings.model_dump(mode="json", exclude=SETTINGS_WITHOUT_EFFECT),
        "device": run.gpu_kind if bundle.gpus else "cpu",
        "threads": None if bundle.gpus else bundle.cpus,
        "versions": {name: versions()[name] for name in ("torch", "transformers")},
    }
    return Plan(identity, units_of(run.skeleton, settings), "layers and rest")


def work(run: Run, stage: Stage, missing: Sequence[str]) -> Iterator[Event]:
    """Has the missing layers committed, then completes the folder to a checkpoint."""
    settings = run.config.prune
    if missing:
        yield from _prune(run, stage)
    url = run.skeleton.checkpoint.url
    finish_checkpoint(stage, url, settings, config_of_pruned(run.config.model, url))
    storage.remove_folder(storage.join(stage.url, SNAPSHOTS))


def _prune(run: Run, stage: Stage) -> Iterator[Event]:
    settings = run.config.prune
    workers = usable_workers(run)
    chosen = chosen_linears(run.skeleton, settings)
    removed = predicted_summary(settings, shapes_of(run.skeleton, chosen))
    note(_intent(run, workers, chosen, removed))
    _note_deviation(run, removed)
    offloading = settings.model_copy(update={"offload": True})
    memory = pruning_memory(run, workers, on_gpu=True)
    relief = Relief(
        LESS_SOLVING if memory.largest == "solving" else MORE_ROOM,
        (run.config.model, offloading, run.pool_url, stage.url) if settings.offload is None else None,
        OFFLOADING,
    )  # fmt: skip
    for event in run_gang(
        NAME, (run.config.model, settings, run.pool_url, stage.url),
        workers=workers,
        bundle=worker_bundle(run.config.cluster),
        cluster=run.config.cluster,
        stage=stage,
        layer_timeout_seconds=settings.layer_timeout_seconds,
        unit_of=layer_unit,
        label=run.label(NAME),
        relief=relief,
    ):  # fmt: skip
        yield event
        if not isinstance(event, UnitDone):
            continue
        if event.record.unit == ALLOCATION:
            note(f"{settings.allocation.type} removes {describe_summary(event.record.facts)}")
            _note_deviation(run, event.record.facts)
        _note_damping(event.record.unit, event.record.facts.get("linears", {}))


def _note_deviation(run: Run, allocation: Mapping[str, Any]) -> None:
    if line := deviation_message(run.config.prune, allocation):
        note(line)


def _note_damping(unit: str, linears: Mapping[str, Mapping[str, Any]]) -> None:
    raised = [f"{path} ({one['damping']:g})" for path, one in linears.items() if "damping" in one]
    if raised:
        note(
            f"{unit}: the Gram matrix of the inputs is not positive definite with the damping that was set: it was "
            f"raised for {', '.join(raised)}"
        )


def usable_workers(run: Run) -> int:
    """Returns the number of configured workers, but no more than there are micro-batches to sweep."""
    wanted, (sequences, _) = run.config.cluster.worker_count, run.pool_shape
    batches = -(-sequences // run.config.prune.batch_sequences)
    if batches < wanted:
        note(
            f"{sequences} sequences in micro-batches of {run.config.prune.batch_sequences} keep "
            f"{batches} of {wanted} workers busy; lower prune.batch_sequences to use more"
        )
    return min(wanted, batches)


def _intent(
    run: Run, workers: int, chosen: Sequence[tuple[str, ...]], removal: Mapping[str, Any]
) -> str:
    """Describes what is about to be done in one line."""
    settings = run.config.prune
    total = sum(len(run.skeleton.linears(index)) for index in range(len(chosen)))
    picked = sum(map(len, chosen))
    dense = f", {total - picked} linears left dense" if picked < total else ""
    workers_named = f"{workers} worker{'s' if workers > 1 else ''}"
    removed = describe_summary(removal)
    if is_measured(settings):
        removed += f", allocated by {settings.allocation.type}"
    method = settings.method.type + (f" and {settings.refine.type}" if settings.refine else "")
    return f"{method} removes {removed}: {picked} linears in {len(chosen)} layers on {workers_named}{dense}"


def facts(run: Run) -> PruneFacts:
    stage = run.stage(NAME)
    planned = stage.read_plan()["identity"]  # what was done, whatever is configured now
    records = [record for record in stage.records() if record.unit not in (REST, ALLOCATION)]
    layers: list[Any] = []
    for record in records:
        layer = {key: value for key, value in record.facts.items() if key != "tensors"}
        layer["linears"] = {
            name: {
                "sparsity": linear["zeros"] / linear["parameters"],
                **{fact: linear[fact] for fact in LINEAR_FACTS if fact in linear},
            }
            for name, linear in record.facts["linears"].items()
        }
        layers.append(layer)
    return {
        "method": planned["prune.method.type"],
        "pattern": planned["prune.pattern"],
        "allocation": planned["prune.allocation.type"],
        "refine": planned.get("prune.refine.type"),
        "parameters": sum(
            one["parameters"] for layer in layers for one in layer["linears"].values()
        ),
        "workers": max((record.facts["workers"] for record in records), default=None),
        "bytes_read": sum(record.facts.get("bytes_read", 0) for record in stage.records()),
        "bytes_written": sum(record.bytes for record in stage.records()),
        "layers": layers,
    }
