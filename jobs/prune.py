"""prune: a worker sweeps the pool through the model, solves layer by layer and streams the checkpoint out."""

import time

import ray
from ray.exceptions import RayActorError

from calibprune.calibration.pool import pool_identity
from calibprune.errors import UserError
from calibprune.pruning.export import REST, finish_checkpoint
from calibprune.pruning.layerwise import layer_unit
from calibprune.run import Record, Stage
from cluster.layer_worker import LayerWorker
from cluster.session import Actors, Bundle, death, worker_bundle
from jobs.progress import Steps, say
from jobs.run_folder import Run, versions

ATTEMPTS = 3
"""Deaths of the worker in a row, without a layer committed in between, before the stage gives up."""


def run(run: Run) -> None:
    settings, stage = run.config.prune, run.stage("prune")
    layers = [layer_unit(index) for index in range(len(run.skeleton.layers))]
    bundle = worker_bundle(run.config.cluster)
    identity = {
        "model": run.model_identity,
        "model.dtype": run.dtype,
        "pool": pool_identity(run.pool_url),
        "prune": settings.model_dump(mode="json", exclude={"pool"}),
        "device": "cuda" if bundle.gpus else "cpu",
        "threads": None if bundle.gpus else bundle.cpus,
        "versions": {name: versions()[name] for name in ("torch", "transformers")},
    }
    missing = stage.plan(identity, [REST, *layers])
    if not missing and stage.finished:
        say("prune: done already")
        return
    started = time.monotonic()
    if missing:
        _prune(run, stage, bundle, len(layers) + 1, missing)
    facts = {"seconds": time.monotonic() - started, "resumed": len(missing) < len(layers) + 1}
    finish_checkpoint(stage, run.skeleton.checkpoint.url, settings)
    stage.finish(facts)


def _prune(run: Run, stage: Stage, bundle: Bundle, units: int, missing: list[str]) -> None:
    settings = run.config.prune
    arguments = (run.config.model, settings, run.pool_url, stage.url)
    timeout = run.config.cluster.start_timeout_seconds
    deaths = 0
    with (
        Actors(LayerWorker, 1, bundle, [bundle.cpus], timeout_seconds=timeout) as actors,
        Steps("prune", "layers and rest", units, units - len(missing)) as steps,
    ):
        while True:
            worker = actors.handles[0]
            try:
                for reference in worker.prune.options(num_returns="streaming").remote(*arguments):
                    record: Record = ray.get(reference)  # type: ignore[assignment]
                    deaths = 0
                    steps.add(f"{settings.method.type} {record.unit}")
                return
            except RayActorError as error:
                cause = death(error)
                if isinstance(cause, UserError):
                    raise cause from None
                deaths += 1
                done = len(stage.done_units())
                if deaths >= ATTEMPTS:
                    raise RuntimeError(
                        f"prune: the worker died {deaths} times after {done} units: {cause}"
                    ) from None
                say(f"prune: the worker died after {done} units, starting another")
                steps.to(done)
                actors.replace(0)
