"""What every stage of a run asks of the cluster: actors, their CPUs, GPUs and memory, and bytes of storage.

All of it is worked out from settings and from the headers of the checkpoint; nothing is started.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import torch

from calibprune.calibration.curate_units import needs_scoring
from calibprune.calibration.pool import describe_pool
from calibprune.calibration.prefixes import longest_prefix
from calibprune.config.curate import NaturalSource
from calibprune.model import Skeleton
from calibprune.process import host_memory
from calibprune.pruning.memory import GPU_SHARE, WorkerMemory, worker_memory
from calibprune.stage import Stage
from cluster.places import Bundle
from cluster.session import worker_bundle
from jobs.analysis import FOLDER as ANALYSIS
from jobs.analysis import task_bundle
from jobs.generate import wanted_engines
from jobs.run import Run

TOKEN_BYTES = 4


@dataclass(frozen=True)
class Need:
    """Actors of a stage that are at work at the same time."""

    stage: str
    actor: str
    count: int
    least: int
    """So many have to find a place, else there is no work at all."""
    bundle: Bundle
    host_bytes: int | None
    """Of one actor at most; None where it is not known beforehand."""
    gpu_bytes: int
    """Of each GPU of an actor; 0 without GPUs."""
    movable_bytes: int
    """Of these, what moves to host memory where it does not fit."""
    gpu_share: float
    """Of a GPU's memory that may be used."""
    work: str


def needs(run: Run, stages: Collection[str] | None = None) -> list[Need]:
    """Those of the given stages, or of all, that still have work to do, in order.

    Needs a connection to Ray: some settings follow the cluster.
    """
    return [
        need
        for stage, of_stage in NEEDS.items()
        if stages is None or stage in stages
        for need in of_stage(run)
    ]


def pool_to_prune_with(run: Run) -> tuple[int, int]:
    """(sequences, tokens of each) of the calibration pool."""
    if run.config.prune.pool is not None:
        pool = describe_pool(run.config.prune.pool)
        return pool.sequences, pool.tokens
    return run.config.curate.pool_sequences, run.config.curate.sequence_tokens


def bytes_read(run: Run, engines: int) -> int:
    """Of the model in all: every engine loads it whole, prune reads it once, evaluate it and the pruned one."""
    evaluated = 2 if run.config.evaluate.perplexity else 0
    return run.skeleton.checkpoint.bytes * (engines + 1 + evaluated)


def bytes_stored(run: Run) -> int:
    """At most, in the run's folder: samples, pool, snapshots and the pruned checkpoint, if they are not there yet."""
    sequences, tokens = pool_to_prune_with(run)
    generate = run.config.generate
    samples = 0
    if run.no_samples_because is None and not run.stage("generate").finished:
        samples = generate.samples * (generate.max_tokens + longest_prefix(generate.prefixes))
    hidden = run.skeleton.model.config.get_text_config().hidden_size
    snapshots = 2 if run.config.prune.snapshot_layers else 0
    return (
        run.skeleton.checkpoint.bytes * (not run.stage("prune").finished)
        + TOKEN_BYTES
        * (2 * samples + sequences * tokens)  # what is dropped is kept with its reason
        + snapshots * sequences * tokens * hidden * run.skeleton.dtype.itemsize
    )


def model_bytes(skeleton: Skeleton) -> int:
    """Of all weights in the dtype of the forwards, as an engine holds them."""
    return sum(parameter.numel() for parameter in skeleton.model.parameters()) * (
        skeleton.dtype.itemsize
    )


def cache_bytes(skeleton: Skeleton, tokens: int) -> int:
    """Of the keys and values of one sequence."""
    config = skeleton.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * skeleton.dtype.itemsize * tokens


def engine_bytes(run: Run, gpus: int, most_tokens: int) -> tuple[int | None, int]:
    """(host memory of one engine, memory of each of its GPUs): weights and room for one sequence at the least."""
    weights, cache = model_bytes(run.skeleton), cache_bytes(run.skeleton, most_tokens)
    if gpus:
        return None, (weights + cache) // gpus
    return host_memory() + weights + (run.config.generate.cpu_kvcache_gib << 30), 0


def pruning_memory(run: Run, workers: int, on_gpu: bool) -> WorkerMemory:
    """Of one of so many workers; on a GPU what lies there."""
    sequences, tokens = pool_to_prune_with(run)
    device = torch.device("cuda" if on_gpu else "cpu")
    skeleton = replace(run.skeleton, device=device)
    return worker_memory(skeleton, run.config.prune, sequences, tokens, workers, host_memory())


def _generate(run: Run) -> Iterator[Need]:
    settings = run.config.generate
    if run.no_samples_because is not None or run.stage("generate").finished:
        return
    most = settings.max_tokens + longest_prefix(settings.prefixes)
    shards = -(-settings.samples // settings.shard_rows)
    yield _engines(run, "generate", shards, most, f"{settings.samples * settings.max_tokens:,}")


def _engines(run: Run, stage: str, shards: int, most_tokens: int, tokens: str) -> Need:
    settings = run.config.generate
    bundle = worker_bundle(run.config.cluster, engine_gpus=settings.tensor_parallel)
    host, gpu = engine_bytes(run, bundle.gpus, most_tokens)
    count = min(settings.engines or wanted_engines(run, bundle), shards)
    share = settings.gpu_memory_utilization
    return Need(stage, "engine", count, 1, bundle, host, gpu, 0, share, f"{tokens} tokens at most")


def _curate(run: Run) -> Iterator[Need]:
    settings = run.config.curate
    if run.config.prune.pool is not None:
        return
    if not run.stage("curate").finished:
        yield from _selection(run)
    if settings.references and not Stage(run.url("curate", ANALYSIS)).finished:
        work = f"sources beside {len(settings.references)} texts"
        yield Need("curate", "task", 1, 1, task_bundle(run), None, 0, 0, 1.0, work)


def _selection(run: Run) -> Iterator[Need]:
    settings = run.config.curate
    natural = [one for one in settings.sources if isinstance(one, NaturalSource)]
    if natural and needs_scoring(settings):
        documents = sum(one.documents for one in natural)
        tokens = f"{documents * settings.sequence_tokens:,}"
        yield _engines(run, "curate", documents, settings.sequence_tokens + 1, tokens)
    work = f"{settings.pool_sequences} sequences of {settings.sequence_tokens} tokens"
    yield Need("curate", "task", 1, 1, Bundle(1, 0), None, 0, 0, 1.0, work)


def _prune(run: Run) -> Iterator[Need]:
    if run.stage("prune").finished:
        return
    bundle, (sequences, tokens) = worker_bundle(run.config.cluster), pool_to_prune_with(run)
    batches = -(-sequences // run.config.prune.batch_sequences)
    count = min(run.config.cluster.worker_count, batches)
    host = pruning_memory(run, count, on_gpu=False)
    host_bytes, gpu_bytes, movable = host.bytes, 0, 0
    if bundle.gpus:
        gpu = pruning_memory(run, count, on_gpu=True)
        gpu_bytes = gpu.bytes
        movable = 0 if run.config.prune.offload is False else gpu.paused
        # the layer that is read ahead, and the one being written with its serialised copy
        host_bytes = host.process + max(host.layers * 3 // 5, host.outside)
    work = f"{sequences} sequences of {tokens} tokens"
    yield Need(
        "prune", "worker", count, count, bundle, host_bytes, gpu_bytes, movable, GPU_SHARE, work
    )


def _evaluate(run: Run) -> Iterator[Need]:
    settings, windows = run.config.evaluate, run.windows
    if not windows or run.stage("evaluate").finished:
        return
    batches = sum(-(-len(ids) // settings.batch_sequences) for ids in windows.values())
    count = min(run.config.cluster.worker_count, batches)
    tokens = sum(ids.numel() for ids in windows.values())
    work = f"{tokens:,} tokens, dense and pruned"
    bundle = worker_bundle(run.config.cluster)
    yield Need("evaluate", "worker", count, count, bundle, None, 0, 0, 1.0, work)


NEEDS: dict[str, Callable[[Run], Iterator[Need]]] = {
    "generate": _generate,
    "curate": _curate,
    "prune": _prune,
    "evaluate": _evaluate,
}
