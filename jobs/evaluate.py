"""evaluate: held-out perplexity of the dense and the pruned model, each in one streamed sweep by all workers."""

import time
from dataclasses import asdict

from calibprune import storage
from calibprune.pruning.export import FOLDER
from calibprune.stage import Stage
from cluster.gang_driver import run_gang
from cluster.session import worker_bundle
from jobs.progress import Steps, say, tick
from jobs.run import Run
from jobs.watching import Watch

UNITS = ("dense", "pruned")


def run(run: Run) -> None:
    settings, stage, prune = run.config.evaluate, run.stage("evaluate"), run.stage("prune")
    windows = run.windows
    identity = {
        "model": run.model_identity,
        "model.dtype": run.dtype,
        "pruned": prune.content_id(),
        "evaluate": settings.model_dump(mode="json", exclude={"batch_sequences"}),
        "tokens": {name: storage.sha256(ids.numpy().tobytes()) for name, ids in windows.items()},
    }
    missing = stage.plan(identity, UNITS)
    if not missing and stage.finished:
        say("evaluate: done already")
        return
    started = time.monotonic()
    if missing and windows:
        _measure(run, stage, prune, missing)
    if missing and not windows:
        say("evaluate: evaluate.perplexity names no text, nothing is measured")
    for unit in missing if not windows else ():
        stage.commit(unit, None, {"perplexity": {}})
    done = stage.done()
    for unit in UNITS:
        storage.write_json(storage.join(stage.url, f"perplexity-{unit}.json"), done[unit].facts)
    stage.finish({"seconds": time.monotonic() - started})


def _measure(run: Run, stage: Stage, prune: Stage, missing: list[str]) -> None:
    settings, cluster = run.config.evaluate, run.config.cluster
    batches = sum(-(-len(ids) // settings.batch_sequences) for ids in run.windows.values())
    layers = len(run.skeleton.layers)
    watch = Watch(stage, len(UNITS), len(UNITS) - len(missing))
    with Steps("evaluate", "layers", len(missing) * layers) as steps:
        for turn, unit in enumerate(missing):
            begun = time.monotonic()
            model, hashes = run.config.model.model_copy(update={"dtype": run.dtype}), None
            if unit == "pruned":
                model = model.model_copy(update={"path": storage.join(prune.url, FOLDER)})
                hashes = _hashes(prune)
            events = run_gang(
                "evaluate",
                (model, run.windows, settings.batch_sequences, hashes),
                workers=min(cluster.worker_count, batches),
                bundle=worker_bundle(cluster),
                cluster=cluster,
                progress=lambda: 0,
                notice=lambda text: say(f"evaluate: {text}"),
                failed=watch.failed_at(unit),
                label=watch.label,
            )
            for event in events:
                tick()
                if isinstance(event, int):
                    steps.to(turn * layers + event, unit)
                elif event is not None:
                    facts = {name: asdict(value) for name, value in event.items()}
                    stage.commit(unit, None, {"perplexity": facts})
            watch.committed(stage.record(unit), time.monotonic() - begun)


def _hashes(prune: Stage) -> dict[str, str]:
    """sha256 of the pruned checkpoint's shards by file name."""
    return {
        record.file.removeprefix(f"{FOLDER}/"): record.sha256
        for record in prune.records()
        if record.file is not None and record.sha256 is not None
    }
