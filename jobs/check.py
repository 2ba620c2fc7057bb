"""Checks before work starts: clear errors for bad input, and what a run will need."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from calibprune.checkpoint import check_reachable
from calibprune.text import size
from jobs.run import Run
from jobs.stages import modules

if TYPE_CHECKING:
    from calibprune.pruning.memory import WorkerMemory

CONTACT_SECONDS = 10.0
"""Patience with the model's store at the first contact; later, when it is known to exist, there is more patience."""
ADVICE = {
    "layers": "most of it holds layers in flight: use fewer workers",
    "outside": "most of it holds embeddings and head while they are copied: use fewer workers",
    "paused": "most of it holds paused forwards: lower curate.sequences or curate.sequence_tokens",
    "forward": "one micro-batch takes most of it while it runs: lower prune.batch_sequences",
    "solving": "solving takes most of it: use fewer workers, or a method that needs no Gram matrix, such as wanda",
}
"""Advice on what to change, by the largest part of a worker's memory."""
TO_LOWER = ("paused", "forward")
"""Parts whose advice helps a single worker too."""
ALONE = "one worker alone needs a larger machine, or a GPU"


def check_before_work(run: Run) -> None:
    """Checks everything that the run's commands will use. Raises UserError for the first problem."""
    from jobs.tracking import check_tracking

    check_tracking(run.config.report.tracking)
    run.check_folder()
    if set(run.commands) != {"report"}:
        check_reachable(run.config.model.path, CONTACT_SECONDS)
        _ = run.skeleton
    # generated samples must be able to fill the sequences that curate will pack
    wanted = {*run.commands, *({"curate"} if "generate" in run.commands else ())}
    for module in modules(wanted):
        if module.skip(run) is None:
            module.check(run)


def requirements(run: Run) -> dict[str, str]:
    """Describes what a run will need: parameters, tokens, bytes to move."""
    from calibprune.pruning.allocation import predicted_summary, shapes_of
    from calibprune.pruning.linears import chosen_linears
    from jobs import generate

    skeleton, config = run.skeleton, run.config
    linears = [
        linear for i in range(len(skeleton.layers)) for linear in skeleton.linears(i).values()
    ]
    sequences, tokens = run.pool_shape
    picked = chosen_linears(skeleton, config.prune)
    pruned = sum(
        skeleton.linears(index)[name].weight.numel()
        for index, names in enumerate(picked)
        for name in names
    )
    prunable = sum(linear.weight.numel() for linear in linears)
    asked = predicted_summary(config.prune, shapes_of(skeleton, picked))
    parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    generated = config.generate.samples * config.generate.max_tokens
    return {
        "model": type(skeleton.model).__name__,
        "layers": f"{len(skeleton.layers)}",
        "parameters": f"{parameters:,}",
        "prunable parameters": f"{prunable:,}",
        "pruned parameters": f"{pruned:,}",
        "sparsity of prunable": f"{asked['sparsity'] * pruned / prunable:.4g}",
        "dtype": run.dtype,
        "generated tokens at most": f"{0 if generate.skip(run) else generated:,}",
        "calibration tokens": f"{sequences * tokens:,}",
        "checkpoint": size(skeleton.checkpoint.bytes),
        "pruned checkpoint": size(skeleton.checkpoint.bytes),
    }


def memory_of_worker(run: Run) -> "WorkerMemory":
    """Returns the memory of one pruning worker: on its GPU where it has one, else on the host."""
    from jobs.engines import on_gpus
    from jobs.prune import pruning_memory

    cluster = run.config.cluster
    return pruning_memory(run, cluster.worker_count, on_gpu=on_gpus(cluster))


def memory_in_lines(run: Run) -> Iterator[str]:
    """Describes the memory of one pruning worker, in total and by part."""
    from jobs.engines import on_gpus

    memory = memory_of_worker(run)
    where = "worker GPU memory" if on_gpus(run.config.cluster) else "worker memory"
    yield f"{where:<26} {size(memory.bytes)}, made up of these parts, not all held at the same time:"
    for name, value in memory.parts().items():
        if value:
            yield f"  {name:<24} {size(value)}"


def unmeasured(run: Run) -> list[str]:
    """Describes what the run will not measure."""
    if run.config.evaluate.perplexity:
        return []
    return [
        "evaluate.perplexity names no text: no perplexity will be measured (python-docs is always available, "
        "as in evaluate.perplexity='[{name: python-docs, path: python-docs}]')"
    ]


def advice(run: Run) -> list[str]:
    """Advises what to change where the workers do not fit this machine; nothing for workers on GPUs or a cluster."""
    from jobs.engines import on_gpus
    from jobs.preflight import cluster_to_check

    cluster = run.config.cluster
    if on_gpus(cluster) or cluster_to_check(cluster, None) is not None:
        return []
    memory = memory_of_worker(run)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory.bytes * cluster.worker_count <= available:
        return []
    return [
        f"{cluster.worker_count} x {size(memory.bytes)} for workers do not fit the {size(available)} of this machine",
        ADVICE[memory.largest] if cluster.worker_count > 1 or memory.largest in TO_LOWER else ALONE,
    ]
