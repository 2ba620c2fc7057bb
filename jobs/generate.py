"""generate: vLLM engines continue prefixes in shards; every shard commits on its own."""

import time

from calibprune.calibration.engine import vllm_version
from calibprune.calibration.prefixes import cut_prefixes, longest_prefix, prefix_units
from calibprune.run import Record
from cluster.dispatch import dispatch
from cluster.generator import Generator
from cluster.session import Actors, Bundle, worker_bundle
from jobs.progress import Steps, say
from jobs.run_folder import Run

NOT_IN_THE_RESULT = {
    "engines", "max_concurrent", "shards_in_flight", "attempts", "shard_timeout_seconds",
    "gpu_memory_utilization", "cpu_kvcache_gib", "enforce_eager",
}  # fmt: skip


def run(run: Run) -> None:
    settings, stage = run.config.generate, run.stage("generate")
    if run.config.prune.pool is not None:
        say("generate: not needed, prune.pool is given")
        return
    shards = -(-settings.samples // settings.shard_rows)
    units = [f"{shard:05d}" for shard in range(shards)]
    identity = {
        "model": run.model_identity,
        "model.dtype": run.dtype,
        "generate": settings.model_dump(mode="json", exclude=NOT_IN_THE_RESULT),
        "versions": {"vllm": vllm_version()},
    }
    missing = stage.plan(identity, units)
    if not missing and stage.finished:
        say("generate: done already")
        return
    started = time.monotonic()
    tokens = 0
    if missing:
        uncut = set(prefix_units(settings)) - stage.done_units()
        for record in cut_prefixes(stage, settings, run.tokenizer, uncut):
            say(f"generate: cut {record.facts['prefixes']} prefixes into {record.file}")
        bundle = worker_bundle(run.config.cluster, gpus_needed=settings.tensor_parallel)
        count = min(settings.engines or _engines(run, bundle), len(missing))
        folder = run.skeleton.checkpoint.url.removeprefix("hf://")
        most = settings.max_tokens + longest_prefix(settings.prefixes)
        arguments = [run.config.model, folder, run.dtype, most, settings, stage.url, bundle.cpus]
        say(f"generate: starting {count} vLLM engine{'s' * (count > 1)}")
        concurrency = settings.shards_in_flight + 1
        with (
            Actors(
                Generator, count, bundle, arguments,
                timeout_seconds=run.config.cluster.start_timeout_seconds, concurrency=concurrency,
            ) as actors,
            Steps("generate", "shards", shards, shards - len(missing)) as steps,
        ):  # fmt: skip
            work = dispatch(
                actors, "complete", missing,
                in_flight=settings.shards_in_flight,
                attempts=settings.attempts,
                timeout_seconds=settings.shard_timeout_seconds,
                start_timeout_seconds=run.config.cluster.start_timeout_seconds,
            )  # fmt: skip
            for record in work:
                if isinstance(record, Record):
                    tokens += record.facts["tokens"]
                    rate = tokens / (time.monotonic() - started)
                    steps.add(f"{rate:.0f} tokens/s")
    seconds = time.monotonic() - started
    facts = {"seconds": seconds, "tokens": tokens, "resumed": len(missing) < len(units)}
    stage.finish(facts)


def _engines(run: Run, bundle: Bundle) -> int:
    """As many engines as the pruning workers' GPUs hold; without GPUs, one a worker."""
    cluster = run.config.cluster
    if not bundle.gpus:
        return cluster.workers
    return max(1, cluster.workers * (cluster.gpus_per_worker or 1) // bundle.gpus)
