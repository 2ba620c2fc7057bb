"""evaluate: held-out perplexity of the dense and the pruned model, each in one streamed sweep over its layers."""

import time
from dataclasses import asdict
from typing import Any

import ray

from calibprune import storage
from calibprune.pruning.export import FOLDER
from calibprune.run import Stage
from cluster.layer_worker import LayerWorker
from cluster.session import Actors, worker_bundle
from jobs.progress import Steps, say
from jobs.run_folder import Run

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
        bundle = worker_bundle(run.config.cluster)
        timeout = run.config.cluster.start_timeout_seconds
        layers = len(run.skeleton.layers)
        with (
            Actors(LayerWorker, 1, bundle, [bundle.cpus], timeout_seconds=timeout) as actors,
            Steps("evaluate", "layers", len(missing) * layers) as steps,
        ):
            for turn, unit in enumerate(missing):
                model, hashes = run.config.model.model_copy(update={"dtype": run.dtype}), None
                if unit == "pruned":
                    model = model.model_copy(update={"path": storage.join(prune.url, FOLDER)})
                    hashes = _hashes(prune)
                arguments = (model, windows, settings.batch_sequences, hashes)
                sweep = actors.handles[0].evaluate.options(num_returns="streaming")
                for reference in sweep.remote(*arguments):
                    result: Any = ray.get(reference)
                    if isinstance(result, int):
                        steps.to(turn * layers + result, unit)
                    else:
                        facts = {name: asdict(value) for name, value in result.items()}
                        stage.commit(unit, None, {"perplexity": facts})
    for unit in missing if not windows else ():
        stage.commit(unit, None, {"perplexity": {}})
    done = stage.done()
    for unit in UNITS:
        storage.write_json(storage.join(stage.url, f"perplexity-{unit}.json"), done[unit].facts)
    stage.finish({"seconds": time.monotonic() - started})


def _hashes(prune: Stage) -> dict[str, str]:
    """sha256 of the pruned checkpoint's shards by file name."""
    return {
        record.file.removeprefix(f"{FOLDER}/"): record.sha256
        for record in prune.records()
        if record.file is not None and record.sha256 is not None
    }
