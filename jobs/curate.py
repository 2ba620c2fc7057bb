"""curate: a crew of CPU workers scores, filters and packs the samples; the driver sees records only.

Every unit commits on its own, so that a rerun resumes from what is there. calibprune/calibration/curate_units.py lists
the units.
"""

import importlib.metadata
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

from calibprune.calibration.curate_units import (
    SELECTION,
    Curation,
    kind_of,
    make_units,
    needs_scoring,
    plan_curation,
)
from calibprune.calibration.engine import EngineDied, vllm_version
from calibprune.calibration.filters import share_of
from calibprune.calibration.mixing import mixture, shortage
from calibprune.calibration.scores import VERSION as SCORES
from calibprune.calibration.sources import document_tokens, samples_of, scored_tokens, text_unit
from calibprune.calibration.texts import documents
from calibprune.config import Config
from calibprune.config.curate import (
    CurateSettings,
    DuplicateFilter,
    GeneratedSource,
    LengthFilter,
    NaturalSource,
    PerplexityFilter,
    Source,
)
from calibprune.errors import UserError
from calibprune.events import SET_ASIDE, Event, Lost, UnitDone, note
from calibprune.reporting.facts import CurateFacts
from calibprune.stage import Stage
from cluster.crew import Crew
from cluster.places import Bundle, Need, capacity
from cluster.queue import Patience, patience_with_source, work_through
from cluster.session import worker_bundle
from cluster.unit_worker import UnitWorker
from jobs import generate
from jobs.engines import check_engines, engine_need, engines
from jobs.run import Run
from jobs.stages import Plan

NAME = "curate"
PUBLISHED: dict[str, Any] = {"card": True}
NOT_IN_THE_RESULT = {"references", "analysis"}
"""Settings that do not determine the result: a resumed run may have others."""
BATCHES_PER_CPU = 4
"""Number of batches per core: few, so that a call costs little, but enough that no core ends long after the others."""
MAX_BATCH_UNITS = 16


def skip(run: Run) -> str | None:
    return None if run.config.prune.pool is None else "prune.pool is given"


def check(run: Run) -> None:
    settings = run.config.curate
    run.check_context("curate.sequence_tokens", settings.sequence_tokens)
    if needs_scoring(settings):  # for which an engine has to generate one token more
        for one in _natural(settings):
            run.check_context(
                f"the documents of source {one.name} with one token more (curate.sources' document_tokens)",
                scored_tokens(one, settings.sequence_tokens),
            )
    if {"generate", "curate"} & set(run.commands):
        _check_sources(run.config)
    if "curate" in run.commands and not run.stage(NAME).finished:
        _ = run.tokenizer
        _check_texts(run)


def _check_sources(config: Config) -> None:
    """Raises UserError where a source could not fill its sequences even with samples of the maximum length."""
    settings = config.curate
    counts, kept, available = mixture(settings), [], []
    for source in settings.sources:
        if isinstance(source, NaturalSource):
            most = document_tokens(source, settings.sequence_tokens) + source.bos
            samples = kept_at_most(config, source.documents)
        elif source.path is None:
            most = generate.most_tokens(config.generate)
            samples = kept_at_most(config, config.generate.samples)
        else:  # of another run: unknown without reading it
            most = samples = sys.maxsize
        _check_length_filters(settings, source, most)
        kept.append(samples)
        if settings.pack == "document":
            available.append(samples if most >= settings.sequence_tokens else 0)
        else:
            available.append(samples * most)
    short = shortage(settings, counts, kept, available)
    if short:
        raise UserError(f"even with samples of the maximum length, {short}")


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


def kept_at_most(config: Config, samples: int) -> int:
    """Returns the number of samples left of a source when every filter drops no more than it must."""
    for one in config.curate.filters:
        if isinstance(one, PerplexityFilter):
            dropped = share_of(samples, one.drop_worst) + share_of(samples, one.drop_best)
            both = one.drop_worst > 0 and one.drop_best > 0
            samples -= max(
                0, dropped - both
            )  # from one sample fewer, up to two fewer may be dropped
    return samples


def _check_texts(run: Run) -> None:
    """Reads the first document of every text that curate will read. Raises UserError where one cannot be read."""
    settings = run.config.curate
    natural = _natural(settings)
    for text in (*natural, *settings.references):
        next(documents(text.path, name=text.dataset_name, split=text.split, column=text.column))
    for source in settings.sources:
        if isinstance(source, GeneratedSource) and source.path is not None:
            samples_of(source.path)
    if natural and needs_scoring(settings):
        check_engines(run, "a perplexity filter of curate")


def _natural(settings: CurateSettings) -> list[NaturalSource]:
    return [one for one in settings.sources if isinstance(one, NaturalSource)]


def needs(run: Run) -> Iterator[Need]:
    settings = run.config.curate
    if skip(run) is not None or run.stage(NAME).finished:
        return
    natural = _natural(settings)
    if natural and needs_scoring(settings):
        count = sum(one.documents for one in natural)
        tokens = f"{count * settings.sequence_tokens:,} tokens at most"
        yield engine_need(run, NAME, count, settings.sequence_tokens + 1, tokens)
    work = f"{settings.pool_sequences} sequences of {settings.sequence_tokens} tokens"
    yield Need(NAME, "task", 1, 1, Bundle(1, 0), work)


def plan(run: Run) -> Plan:
    settings, generated = run.config.curate, generated_stages(run)
    mixture(settings)
    identity: dict[str, Any] = {
        "curate": settings.model_dump(mode="json", exclude=NOT_IN_THE_RESULT),
        "generated": {name: stage.content_id() for name, stage in generated.items()},
        "versions": {"scores": SCORES},
    }
    if _natural(settings):
        if needs_scoring(settings):
            identity["versions"]["vllm"] = vllm_version()
        identity |= {"model": run.model_identity, "model.dtype": run.dtype}
        identity["versions"]["transformers"] = importlib.metadata.version("transformers")
    if any(isinstance(one, DuplicateFilter) for one in settings.filters):
        identity["versions"]["rensa"] = importlib.metadata.version("rensa")
    return Plan(identity, curation_of(run).units())


def curation_of(run: Run) -> Curation:
    """Returns what the stage is made from. Raises UserError for another model's samples."""
    return plan_curation(
        run.url(NAME),
        run.config.curate,
        generated_stages(run),
        run.skeleton.checkpoint.url,
        run.config.model.trust_remote_code,
    )


def generated_stages(run: Run) -> dict[str, Stage]:
    """Returns the generate stage of every generated source by name. Raises UserError for another model's samples."""
    stages = {}
    for source in run.config.curate.sources:
        if isinstance(source, GeneratedSource):
            stage = run.stage("generate") if source.path is None else Stage(source.path)
            stages[source.name] = stage
            facts = stage.manifest()["facts"]  # raises where the stage is not finished
            if source.path is not None and _writer(stage, facts) != run.model_identity:
                raise UserError(
                    f"the samples of curate source {source.name} in {source.path} were written by another model"
                )
    return stages


def _writer(stage: Stage, facts: Mapping[str, Any]) -> Any:
    """Returns the identity of the model that wrote a finished stage's samples; a published stage has no plan."""
    return facts["model"] if "model" in facts else stage.read_plan()["identity"].get("model")


def work(run: Run, stage: Stage, missing: Sequence[str]) -> Iterator[Event]:
    """Has the missing units made, each kind after those that it depends on."""
    curation = curation_of(run)
    by_kind: dict[str, list[str]] = {}
    for unit in missing:
        by_kind.setdefault(kind_of(unit), []).append(unit)
    if texts := by_kind.get("text"):
        sources = [curation.text_units(source) for source in curation.natural_sources()]
        batches = [[unit for unit in units if unit in texts] for units in sources]
        yield from _make(run, curation, filter(None, batches), patience_with_source())
    if scored := by_kind.get("scored"):
        yield from _score(run, curation, scored)
    done: set[str] = set()
    phases = [by_kind.get("scores", []), by_kind.get(SELECTION, [])]
    phases.append([*by_kind.get("dropped", []), *by_kind.get("pool", [])])
    # the decision covers all samples, so that other units say nothing about how long it takes
    patience = Patience(work=lambda unit: 2.0 if unit == SELECTION else 1.0)
    for event in _make(run, curation, _in_phases(run, phases, done), patience):
        if isinstance(event, UnitDone):
            done.add(event.record.unit)
        yield event
    chosen = stage.record(SELECTION).facts
    note(
        f"kept {chosen['kept']} of {chosen['samples']} samples, packed "
        f"{chosen['sequences']} sequences of {chosen['sequence_tokens']} tokens"
    )
    for name, source in chosen["sources"].items() if len(chosen["sources"]) > 1 else ():
        note(
            f"{source['sequences']} sequences of {name}, from {source['used']} of {source['kept']} kept samples"
        )


def _in_phases(
    run: Run, phases: Sequence[list[str]], done: set[str]
) -> Iterator[Sequence[str] | None]:
    """Yields batches of consecutive units, which read neighbouring shards; None while the previous phase is running."""
    cores = _cores(run) or max(1, capacity(Bundle(1, 0)))
    for units in phases:
        size = min(MAX_BATCH_UNITS, max(1, len(units) // (BATCHES_PER_CPU * cores)))
        yield from (units[first : first + size] for first in range(0, len(units), size))
        while not done.issuperset(units):
            yield None


def _make(
    run: Run,
    curation: Curation,
    batches: Iterable[Sequence[str] | None],
    patience: Patience,
) -> Iterator[Event]:
    """Has workers with one core each make batches of units."""
    crew = Crew(
        UnitWorker, _cores(run), Bundle(1, 0), [partial(make_units, curation), run.label(NAME)],
        start_seconds=run.config.cluster.start_timeout_seconds,
        label=run.label(NAME), kind="worker",
    )  # fmt: skip
    with crew:
        for event in work_through(crew, "make", batches, patience=patience):
            _raise_if_set_aside(event)
            yield event


def _cores(run: Run) -> int | None:
    """Returns the number of cores of the configured workers; None, for all free cores, where none are configured."""
    cluster = run.config.cluster
    return cluster.workers and cluster.workers * worker_bundle(cluster).cpus


def _score(run: Run, curation: Curation, units: Sequence[str]) -> Iterator[Event]:
    """Has engines compute the log-probabilities of documents, for the filters that use them."""
    settings, tokens = run.config.generate, curation.settings.sequence_tokens
    most = max(scored_tokens(one, tokens) for one in curation.natural_sources())
    documents = curation.stage.done(map(text_unit, units))
    sizes = {unit: documents[text_unit(unit)].facts["tokens"] for unit in units}
    with engines(run, NAME, curation.stage, len(units), most) as crew:
        for event in work_through(
            crew, "score", [[unit] for unit in units],
            in_flight=settings.shards_in_flight,
            attempts=settings.attempts,
            patience=generate.patience(settings, sizes),
            fatal=(EngineDied,),
        ):  # fmt: skip
            _raise_if_set_aside(event)
            yield event


def _raise_if_set_aside(event: Event) -> None:
    if isinstance(event, Lost) and event.kind == SET_ASIDE:
        raise RuntimeError(f"{event.units[0]} failed {event.attempt} times: {event.message}")


def facts(run: Run) -> CurateFacts:
    return cast(CurateFacts, run.stage(NAME).record(SELECTION).facts)
