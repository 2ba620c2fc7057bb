"""Bad input gets a clear error before work starts; and what a run will need, told in advance."""

import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from calibprune import storage
from calibprune.calibration.curate_units import needs_scoring
from calibprune.calibration.engine import STREAMED, model_and_revision, vllm_version
from calibprune.calibration.filters import share_of
from calibprune.calibration.mixing import mixture, shortage
from calibprune.calibration.pool import describe_pool
from calibprune.calibration.prefixes import check_prefixes, longest_prefix
from calibprune.calibration.sources import document_tokens, samples_of, scored_tokens
from calibprune.calibration.texts import documents
from calibprune.checkpoint import check_reachable
from calibprune.config import Config
from calibprune.config.curate import (
    CurateSettings,
    GeneratedSource,
    LengthFilter,
    NaturalSource,
    PerplexityFilter,
    Source,
)
from calibprune.config.model import ClusterSettings
from calibprune.errors import DriftError, UserError
from calibprune.stage import flat
from jobs.run import Run

if TYPE_CHECKING:
    from calibprune.pruning.memory import WorkerMemory

CONTACT_SECONDS = 10.0
"""Of a first contact with the model. Later failures are sat out for longer: it was there once."""


def check_before_work(run: Run, stages: Sequence[str]) -> None:
    """Checks everything that the given stages will use. Raises UserError for the first problem."""
    from calibprune.model import check_tokenizer, context_tokens
    from jobs.tracking import check_tracking

    check_tracking(run.config.report.tracking)
    run.check_folder()
    if set(stages) == {"report"}:
        if not run.begun:
            raise UserError(f"there is no run at {run.config.output} to report on")
        _check_as_made(run)
        return
    check_reachable(run.config.model.path, CONTACT_SECONDS)
    context = context_tokens(run.skeleton.model.config)
    _check_lengths(run, stages, context)
    makes_pool = run.config.prune.pool is None and {"generate", "curate"} & set(stages)
    if makes_pool or ("evaluate" in stages and run.config.evaluate.perplexity):
        check_tokenizer(run.tokenizer, run.skeleton, run.config.model.path)
    if (
        "generate" in stages
        and run.no_samples_because is None
        and not run.stage("generate").finished
    ):
        check_vllm("generate", run.skeleton.checkpoint.url)
        check_prefixes(run.config.generate, run.tokenizer)
    if "curate" in stages and run.config.prune.pool is None and not run.stage("curate").finished:
        _check_texts(run)
    if "prune" in stages:
        from calibprune.pruning.allocation import check_allocation, shapes_of
        from calibprune.pruning.linears import chosen_linears

        chosen = chosen_linears(run.skeleton, run.config.prune)
        _check_pattern(run, chosen)
        check_allocation(run.config.prune, shapes_of(run.skeleton, chosen))
    if "prune" in stages and "curate" not in stages and run.config.prune.pool is None:
        run.stage("curate").manifest()
    if "prune" in stages and run.config.prune.pool is not None:
        tokens = describe_pool(run.config.prune.pool).tokens
        if context and tokens > context:
            raise UserError(
                f"prune.pool holds sequences of {tokens} tokens, the model's context is {context}"
            )
    if "evaluate" in stages:
        _ = run.windows


def _check_as_made(run: Run) -> None:
    """Raises DriftError where a finished stage was made with other settings than the report would show."""
    for name in ("generate", "curate", "prune", "evaluate"):
        stage = run.stage(name)
        if not stage.finished:
            continue
        settings = flat({name: getattr(run.config, name).model_dump(mode="json")})
        made = stage.read_plan()["identity"]
        changed = [key for key in settings if key in made and made[key] != settings[key]]
        if changed:
            listed = "; ".join(f"{key} was {made[key]}, now {settings[key]}" for key in changed)
            raise DriftError(
                f"{stage.url} was made with other settings: {listed}. Give the same to report on it"
            )


def _check_lengths(run: Run, stages: Sequence[str], context: int | None) -> None:
    config = run.config
    generate, curate = config.generate, config.curate
    prefix = longest_prefix(generate.prefixes)
    wanted = (
        {"evaluate.sequence_tokens": config.evaluate.sequence_tokens}
        if config.evaluate.perplexity
        else {}
    )
    if config.prune.pool is None:
        wanted["curate.sequence_tokens"] = curate.sequence_tokens
        if "generate" in stages and run.no_samples_because is None:
            wanted["generate.max_tokens with its prefix"] = generate.max_tokens + prefix
        if needs_scoring(curate):  # for which the engine has to be asked for one token more
            wanted |= {
                f"the documents of source {one.name} with one token more "
                f"(curate.sources' document_tokens)": scored_tokens(one, curate.sequence_tokens)
                for one in curate.sources
                if isinstance(one, NaturalSource)
            }
    for name, tokens in wanted.items():
        if context and tokens > context:
            raise UserError(f"{name} is {tokens}, the model's context is {context} tokens")
    if generate.min_tokens > generate.max_tokens:
        raise UserError(
            f"generate.min_tokens {generate.min_tokens} is more than generate.max_tokens {generate.max_tokens}"
        )
    if config.prune.pool is None and {"generate", "curate"} & set(stages):
        _check_sources(config, generate.max_tokens + prefix)


def _check_sources(config: Config, most_tokens: int) -> None:
    """Whether every source can fill its sequences, were all its samples as long as they may get."""
    settings = config.curate
    counts, kept, available = mixture(settings), [], []
    for source in settings.sources:
        if isinstance(source, NaturalSource):
            most = document_tokens(source, settings.sequence_tokens) + source.bos
            samples = kept_at_most(config, source.documents)
        elif source.path is None:
            most, samples = most_tokens, kept_at_most(config, config.generate.samples)
        else:  # of another run: there is no telling without reading it
            most = samples = sys.maxsize
        _check_length_filters(settings, source, most)
        kept.append(samples)
        if settings.pack == "document":
            available.append(samples if most >= settings.sequence_tokens else 0)
        else:
            available.append(samples * most)
    short = shortage(settings, counts, kept, available)
    if short:
        raise UserError(f"as long as samples may get, {short}")


def _check_length_filters(settings: CurateSettings, source: Source, most_tokens: int) -> None:
    longer = "curate.sources' document_tokens or curate.sequence_tokens"
    if isinstance(source, GeneratedSource):
        longer = "generate.max_tokens"
    for index, one in enumerate(settings.filters):
        if isinstance(one, LengthFilter) and one.min_tokens > most_tokens:
            raise UserError(
                f"curate.filters.{index} drops every sample of {source.name}: its min_tokens is {one.min_tokens}, and "
                f"none has more than {most_tokens} tokens: lower it, or raise {longer}"
            )


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


def check_vllm(stage: str, model_url: str) -> None:
    """Raises UserError where vLLM is missing, or what it needs to read the model."""
    if vllm_version() is None:
        raise UserError(
            f'vLLM is not installed, {stage} needs it: pip install "calibprune[cuda]" on a machine with '
            f'NVIDIA GPUs, "calibprune[cpu]" on one without'
        )
    if model_url.startswith("hf://"):
        model_and_revision(model_url)
        return
    if storage.is_local(model_url):
        return
    if not model_url.startswith(STREAMED):
        raise UserError(
            f"vLLM, which {stage} needs, does not read {model_url}: give a folder that every node mounts, a hub id, or "
            f"a URL that begins with {', '.join(STREAMED)}"
        )
    if importlib.util.find_spec("runai_model_streamer") is None:
        raise UserError(
            f"vLLM, which {stage} needs, reads {model_url} by its streamer, which is not installed: pip install "
            f'"vllm[runai]", or give a folder that every node mounts'
        )


def _check_texts(run: Run) -> None:
    """Whether the texts that curate will read are there, by reading the first document of each."""
    settings = run.config.curate
    natural = [one for one in settings.sources if isinstance(one, NaturalSource)]
    for text in (*natural, *settings.references):
        next(documents(text.path, name=text.dataset_name, split=text.split, column=text.column))
    for source in settings.sources:
        if isinstance(source, GeneratedSource) and source.path is not None:
            samples_of(source.path)
    if natural and needs_scoring(settings):
        check_vllm("a perplexity filter of curate", run.skeleton.checkpoint.url)


def kept_at_most(config: Config, samples: int) -> int:
    """Of a source's samples, those left when every filter drops no more than it must."""
    for one in config.curate.filters:
        if isinstance(one, PerplexityFilter):
            dropped = share_of(samples, one.drop_worst) + share_of(samples, one.drop_best)
            both = one.drop_worst > 0 and one.drop_best > 0
            samples -= max(0, dropped - both)  # of one sample less, two less may be dropped
    return samples


def requirements(run: Run) -> dict[str, str]:
    """What a run will need, in words: parameters, tokens, bytes to move."""
    from calibprune.pruning.allocation import foreseen, shapes_of
    from calibprune.pruning.linears import chosen_linears
    from jobs.needs import pool_to_prune_with
    from jobs.preflight import gib

    skeleton, config = run.skeleton, run.config
    linears = [
        linear for i in range(len(skeleton.layers)) for linear in skeleton.linears(i).values()
    ]
    sequences, tokens = pool_to_prune_with(run)
    picked = chosen_linears(skeleton, config.prune)
    pruned = sum(
        skeleton.linears(index)[name].weight.numel()
        for index, names in enumerate(picked)
        for name in names
    )
    prunable = sum(linear.weight.numel() for linear in linears)
    asked = foreseen(config.prune, shapes_of(skeleton, picked))
    parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    return {
        "model": type(skeleton.model).__name__,
        "layers": f"{len(skeleton.layers)}",
        "parameters": f"{parameters:,}",
        "prunable parameters": f"{prunable:,}",
        "pruned parameters": f"{pruned:,}",
        "sparsity of prunable": f"{asked['sparsity'] * pruned / prunable:.4g}",
        "dtype": run.dtype,
        "generated tokens at most": f"{config.generate.samples * config.generate.max_tokens:,}",
        "calibration tokens": f"{sequences * tokens:,}",
        "checkpoint": gib(skeleton.checkpoint.bytes),
        "pruned checkpoint": gib(skeleton.checkpoint.bytes),
    }


def memory_of_worker(run: Run) -> "WorkerMemory":
    """Of one pruning worker; where it has a GPU, what lies there."""
    from jobs.needs import pruning_memory

    cluster = run.config.cluster
    return pruning_memory(run, cluster.worker_count, on_gpu=_on_gpus(cluster))


def _on_gpus(cluster: ClusterSettings) -> bool:
    """Whether workers are to have GPUs, as far as can be told without a look at the cluster."""
    from cluster.session import needs_gpus

    if cluster.gpus_per_worker is None:
        return needs_gpus(vllm_version())
    return cluster.gpus_per_worker > 0


def memory_in_lines(run: Run) -> Iterator[str]:
    from jobs.preflight import gib

    memory = memory_of_worker(run)
    where = "worker GPU memory" if _on_gpus(run.config.cluster) else "worker memory"
    yield f"{where:<26} {gib(memory.bytes)}, of these, not all at the same time:"
    for name, value in memory.parts().items():
        if value:
            yield f"  {name:<24} {gib(value)}"


ADVICE = {
    "layers": "most of it are layers on their way: use fewer workers",
    "outside": "most of it are embeddings and head, while they are copied: use fewer workers",
    "paused": "most of it is held by paused forwards: lower curate.sequences or curate.sequence_tokens",
    "forward": "one micro-batch takes most of it while it runs: lower prune.batch_sequences",
    "solving": "solving takes most of it: use fewer workers, or a method that needs no Gram matrix, as wanda",
}
"""By the part of a worker's memory that holds most."""
TO_LOWER = ("paused", "forward")
ALONE = "one worker alone needs a larger machine, or a GPU"


def unmeasured(run: Run) -> list[str]:
    """What the run will not say at its end."""
    if run.config.evaluate.perplexity:
        return []
    return [
        "evaluate.perplexity names no text: no perplexity will be measured (python-docs is one that is always there, "
        "as in evaluate.perplexity='[{name: python-docs, path: python-docs}]')"
    ]


def advice(run: Run) -> list[str]:
    """What to change where the workers do not fit this machine; nothing where they are to run on GPUs or elsewhere."""
    from jobs.preflight import cluster_to_look_at, gib

    cluster = run.config.cluster
    if _on_gpus(cluster) or cluster_to_look_at(cluster, None) is not None:
        return []
    memory = memory_of_worker(run)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory.bytes * cluster.worker_count <= available:
        return []
    return [
        f"{cluster.worker_count} x {gib(memory.bytes)} for workers do not fit the {gib(available)} of this machine",
        ADVICE[memory.largest] if cluster.worker_count > 1 or memory.largest in TO_LOWER else ALONE,
    ]
