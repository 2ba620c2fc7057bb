"""curate: tasks all over the cluster score, filter and pack the samples; the driver sees records only.

Every unit commits on its own, so a rerun takes up what is there. calibprune/calibration/curate_units.py says which
units there are.
"""

import importlib.metadata
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray

from calibprune.calibration.curate_units import (
    SELECTION,
    Curation,
    make_files,
    make_scores,
    make_selection,
    needs_scoring,
    plan_curation,
)
from calibprune.calibration.engine import vllm_version
from calibprune.calibration.mixing import mixture
from calibprune.calibration.prefixes import start_token
from calibprune.calibration.scores import VERSION as SCORES
from calibprune.calibration.sources import scored_tokens, text_unit, write_documents
from calibprune.config.curate import DuplicateFilter, GeneratedSource, NaturalSource
from calibprune.errors import UserError
from calibprune.model import load_tokenizer
from calibprune.stage import Record, Stage
from cluster.places import Bundle, capacity
from cluster.session import worker_bundle
from cluster.tasks import run_tasks
from jobs import analysis, progress
from jobs.generate import dispatched, engines, most_failures
from jobs.progress import Steps, say
from jobs.run import Run
from jobs.watching import Watch

NOT_IN_THE_RESULT = {"references", "analysis"}
BATCHES_PER_CPU = 4
"""Of units given to one task: few enough that a task's start costs little, many enough that none ends late."""
MOST_IN_BATCH = 16


def run(run: Run) -> None:
    if run.config.prune.pool is not None:
        say("curate: not needed, prune.pool is given")
        return
    settings, stage = run.config.curate, run.stage("curate")
    mixture(settings)
    generated = generated_stages(run)
    curation = plan_curation(stage.url, settings, generated)
    units = curation.units()
    missing = stage.plan(_identity(run, generated), units)
    if not missing and stage.finished:
        say("curate: done already")
        analysis.run(run, curation)
        return
    started = time.monotonic()
    watch = Watch(stage, len(units), len(units) - len(missing))
    with Steps("curate", "units", len(units), len(units) - len(missing)) as steps:
        for record in _make(run, curation, missing, watch):
            steps.add(record.unit)
    stage.finish({"seconds": time.monotonic() - started})
    facts = stage.record(SELECTION).facts
    say(
        f"curate: kept {facts['kept']} of {facts['samples']} samples, packed "
        f"{facts['sequences']} sequences of {facts['sequence_tokens']} tokens"
    )
    for name, source in facts["sources"].items() if len(facts["sources"]) > 1 else ():
        say(
            f"curate: {source['sequences']} sequences of {name}, from {source['used']} of {source['kept']} kept samples"
        )
    analysis.run(run, curation)


def generated_stages(run: Run) -> dict[str, Stage]:
    """The generate stage of every generated source by its name. Raises UserError for another model's samples."""
    stages = {}
    for source in run.config.curate.sources:
        if isinstance(source, GeneratedSource):
            stage = run.stage("generate") if source.path is None else Stage(source.path)
            stages[source.name] = stage
            facts = stage.manifest()["facts"]  # says so where it is not finished
            if source.path is not None and _writer(stage, facts) != run.model_identity:
                raise UserError(
                    f"the samples of curate source {source.name} in {source.path} were written by another model"
                )
    return stages


def _writer(stage: Stage, facts: Mapping[str, Any]) -> Any:
    """The identity of the model that wrote a finished stage's samples; a published stage has no plan any more."""
    return facts["model"] if "model" in facts else stage.read_plan()["identity"].get("model")


def _identity(run: Run, generated: dict[str, Stage]) -> dict[str, Any]:
    settings = run.config.curate
    identity: dict[str, Any] = {
        "curate": settings.model_dump(mode="json", exclude=NOT_IN_THE_RESULT),
        "generated": {name: stage.content_id() for name, stage in generated.items()},
        "versions": {"scores": SCORES},
    }
    if any(isinstance(one, NaturalSource) for one in settings.sources):
        if needs_scoring(settings):
            identity["versions"]["vllm"] = vllm_version()
        identity |= {"model": run.model_identity, "model.dtype": run.dtype}
        identity["versions"]["transformers"] = importlib.metadata.version("transformers")
    if any(isinstance(one, DuplicateFilter) for one in settings.filters):
        identity["versions"]["rensa"] = importlib.metadata.version("rensa")
    return identity


def _make(run: Run, curation: Curation, missing: Sequence[str], watch: Watch) -> Iterator[Record]:
    """Has the missing units made, in the order in which they need each other; yields their records."""
    handle, left = ray.put(curation), set(missing)
    texts = [curation.text_units(source) for source in curation.natural_sources()]
    texts = [units for source in texts if (units := [unit for unit in source if unit in left])]
    model = run.skeleton.checkpoint.url, run.config.model.trust_remote_code
    yield from _tasks(run, _read_documents, (handle, *model), texts, watch)
    yield from _score_documents(run, curation, _of_kind(missing, "scored"), watch)
    for function, kinds in (
        (_score, ["scores"]),
        (_select, [SELECTION]),
        (_write_files, ["dropped", "pool"]),
    ):
        batches = _batches(run, _of_kind(missing, *kinds))
        yield from _tasks(run, function, (handle,), batches, watch)


def _score_documents(
    run: Run, curation: Curation, units: list[str], watch: Watch
) -> Iterator[Record]:
    """Has engines take the log-probabilities of documents, where a filter asks for them."""
    if not units:
        return

    attempts = run.config.generate.attempts

    def give_up(unit: str, reason: str) -> None:
        raise RuntimeError(f"{unit} failed {attempts} times: {reason}")

    def in_a_row(failures: int, reason: str) -> None:
        if failures >= most_failures(run, crew, 2):
            raise RuntimeError(f"{failures} attempts in a row failed, the last time: {reason}")

    tokens = curation.settings.sequence_tokens
    most = max(scored_tokens(one, tokens) for one in curation.natural_sources())
    with engines(run, curation.stage, len(units), watch, most) as crew:
        for record in dispatched(run, crew, "score", _tokens(curation, units), give_up, in_a_row):
            progress.tick()
            if record is not None:
                watch.committed(record)
                yield record


def _tokens(curation: Curation, units: Sequence[str]) -> dict[str, int]:
    """What each of these units has to score: nothing, where the source has fewer documents than were asked for."""
    done = curation.stage.done(map(text_unit, units))
    return {unit: done[text_unit(unit)].facts["tokens"] for unit in units}


def _of_kind(units: Iterable[str], *kinds: str) -> list[str]:
    return [unit for unit in units if unit.partition("-")[0] in kinds]


def _batches(run: Run, units: Sequence[str]) -> list[Sequence[str]]:
    """Consecutive units together: they are of neighbouring shards."""
    room = max(1, capacity(Bundle(1, 0)))
    cpus = min(room, tasks_at_once(run) or room)
    size = min(MOST_IN_BATCH, max(1, len(units) // (BATCHES_PER_CPU * cpus)))
    return [units[first : first + size] for first in range(0, len(units), size)]


def _tasks(
    run: Run, function: Any, arguments: tuple, batches: Sequence[Sequence[str]], watch: Watch
) -> Iterator[Record]:
    """Tasks of one core each, one for every batch of units."""
    for done in run_tasks(
        function, arguments, batches, Bundle(1, 0),
        start_seconds=run.config.cluster.start_timeout_seconds, label=watch.label, failed=watch.lost,
        at_once=tasks_at_once(run),
    ):  # fmt: skip
        progress.tick()
        if done is not None:
            watch.committed(*done)
            yield done.record


def tasks_at_once(run: Run) -> int | None:
    """As many as the workers asked for have cores; None, any number, where nobody says how many workers."""
    cluster = run.config.cluster
    return cluster.workers and cluster.workers * worker_bundle(cluster).cpus


def _read_documents(
    curation: Curation, model: str, trust: bool, units: Sequence[str]
) -> Iterator[Record]:
    """All of one source: a text is read from its start."""
    (source,) = (s for s in curation.natural_sources() if units[0] in curation.text_units(s))
    tokenizer = load_tokenizer(model, trust)
    start = start_token(tokenizer) if source.bos else None
    tokens = curation.settings.sequence_tokens
    yield from write_documents(curation.stage, source, tokens, tokenizer, start, set(units))


def _score(curation: Curation, units: Sequence[str]) -> Iterator[Record]:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # MinHash would take all cores of the node
    yield from make_scores(curation, units)


def _select(curation: Curation, units: Sequence[str]) -> Iterator[Record]:
    yield make_selection(curation)


def _write_files(curation: Curation, units: Sequence[str]) -> Iterator[Record]:
    yield from make_files(curation, units)
