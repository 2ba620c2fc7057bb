"""curate: one task on the cluster scores, filters and packs the samples; the driver sees records only."""

import time

import ray

from calibprune.calibration.pool import curate
from calibprune.config import CurateSettings
from calibprune.run import Stage
from jobs.progress import say
from jobs.run_folder import Run


def run(run: Run) -> None:
    if run.config.prune.pool is not None:
        say("curate: not needed, prune.pool is given")
        return
    settings, stage, generate = run.config.curate, run.stage("curate"), run.stage("generate")
    identity = {"generate": generate.content_id(), "curate": settings.model_dump(mode="json")}
    missing = stage.plan(identity, ["dropped", "pool"])
    if not missing and stage.finished:
        say("curate: done already")
        return
    started = time.monotonic()
    task = ray.remote(_curate).options(num_cpus=1, max_retries=2)
    ray.get(task.remote(generate.url, stage.url, settings))
    stage.finish({"seconds": time.monotonic() - started})
    facts = stage.record("pool").facts
    say(
        f"curate: kept {facts['kept']} of {facts['samples']} samples, packed "
        f"{facts['sequences']} sequences of {facts['sequence_tokens']} tokens"
    )


def _curate(generate_url: str, stage_url: str, settings: CurateSettings) -> None:
    for _ in curate(Stage(generate_url), Stage(stage_url), settings):
        pass
