"""curate: tasks all over the cluster score, filter and pack the samples; the driver sees records only.

Every unit commits on its own, so a rerun takes up what is there. calibprune/calibration/curation.py says which
units there are.
"""

import importlib.metadata
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from calibprune.calibration.curation import (
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
from calibprune.calibration.sources import scored_tokens, write_documents
from calibprune.config import DuplicateFilter, GeneratedSource, NaturalSource
from calibprune.errors import UserError
from calibprune.journal import Failure
from calibprune.model import load_tokenizer
from calibprune.run import Record, Stage
from cluster.session import death
from jobs import analysis, progress
from jobs.generate import dispatched, engines
from jobs.progress import Steps, say
from jobs.run_folder import Run
from jobs.watching import Watch

NOT_IN_THE_RESULT = {"references", "analysis"}
BATCHES_PER_CPU = 4
"""Of units given to one task: few enough that a task's start costs little, many enough that none ends late."""
MOST_IN_BATCH = 16
IN_FLIGHT_PER_CPU = 2
ATTEMPTS = 3


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
            stage.manifest()  # says so where it is not finished
            writer = stage.read_plan()["identity"].get("model")
            if source.path is not None and writer != run.model_identity:
                raise UserError(
                    f"the samples of curate source {source.name} in {source.path} were written by another model"
                )
    return stages


def _identity(run: Run, generated: dict[str, Stage]) -> dict[str, Any]:
    settings = run.config.curate
    identity: dict[str, Any] = {
        "curate": settings.model_dump(mode="json", exclude=NOT_IN_THE_RESULT),
        "generated": {name: stage.content_id() for name, stage in generated.items()},
        "versions": {},
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
    texts = [
        (handle, source, run.skeleton.checkpoint.url, run.config.model.trust_remote_code, units)
        for source in curation.natural_sources()
        if (units := [unit for unit in curation.text_units(source) if unit in left])
    ]
    yield from _tasks(_read_documents, texts, watch)
    yield from _score_documents(run, curation, _of_kind(missing, "scored"), watch)
    yield from _in_batches(_score, handle, _of_kind(missing, "scores"), watch)
    if SELECTION in left:
        yield from _tasks(_select, [(handle, [SELECTION])], watch)
    yield from _in_batches(_write_files, handle, _of_kind(missing, "dropped", "pool"), watch)


def _score_documents(
    run: Run, curation: Curation, units: list[str], watch: Watch
) -> Iterator[Record]:
    """Has engines take the log-probabilities of documents, where a filter asks for them."""
    if not units:
        return

    def give_up(unit: str, reason: str) -> None:
        raise RuntimeError(f"{unit} failed {run.config.generate.attempts} times: {reason}")

    tokens = curation.settings.sequence_tokens
    most = max(scored_tokens(one, tokens) for one in curation.natural_sources())
    with engines(run, curation.stage, len(units), watch, most) as crew:
        for record in dispatched(run, crew, "score", units, give_up):
            progress.tick()
            if record is not None:
                watch.committed(record)
                yield record


def _of_kind(units: Iterable[str], *kinds: str) -> list[str]:
    return [unit for unit in units if unit.partition("-")[0] in kinds]


def _in_batches(function: Any, handle: Any, units: Sequence[str], watch: Watch) -> Iterator[Record]:
    """Consecutive units together: they are of neighbouring shards."""
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    size = min(MOST_IN_BATCH, max(1, len(units) // (BATCHES_PER_CPU * cpus)))
    batches = [units[first : first + size] for first in range(0, len(units), size)]
    yield from _tasks(function, [(handle, batch) for batch in batches], watch)


def _tasks(function: Any, arguments: Sequence[tuple], watch: Watch) -> Iterator[Record]:
    """Runs the function as a task of one core for each of the arguments, the last of which are its units.

    A bounded number at a time. Tasks that went down with their process or node are run again; what a task raises ends
    the stage, others' commits stay.
    """
    named = watch.label.task(function.__name__.strip("_"))
    task = ray.remote(function).options(num_cpus=1, max_retries=0, name=named)
    limit = max(2, IN_FLIGHT_PER_CPU * int(ray.cluster_resources().get("CPU", 1)))
    waiting = deque((each, 1) for each in arguments)
    running: dict[Any, tuple[tuple, int, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                each, attempt = waiting.popleft()
                running[task.remote(*each)] = each, attempt, time.monotonic()
            ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
            progress.tick()
            for reference in ready:
                each, attempt, since = running.pop(reference)
                try:
                    records: Any = ray.get(reference)
                except RayTaskError:
                    raise
                except RayError as error:  # its process or its node is gone
                    failure = Failure("task", str(death(error)), tuple(each[-1]), attempt)
                    say(f"curate: lost {failure.in_words}")
                    watch.failed(failure)
                    if attempt == ATTEMPTS:
                        raise
                    waiting.append((each, attempt + 1))
                    continue
                seconds = (time.monotonic() - since) / max(1, len(records))
                for record in records:
                    watch.committed(record, seconds)
                    yield record
    finally:
        for reference in running:
            ray.cancel(reference)


def _read_documents(
    curation: Curation, source: NaturalSource, model: str, trust: bool, units: list[str]
) -> list[Record]:
    tokenizer = load_tokenizer(model, trust)
    start = start_token(tokenizer) if source.bos else None
    tokens = curation.settings.sequence_tokens
    return list(write_documents(curation.stage, source, tokens, tokenizer, start, set(units)))


def _score(curation: Curation, units: list[str]) -> list[Record]:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # MinHash would take all cores of the node
    return list(make_scores(curation, units))


def _select(curation: Curation, units: list[str]) -> list[Record]:
    return [make_selection(curation)]


def _write_files(curation: Curation, units: list[str]) -> list[Record]:
    return list(make_files(curation, units))
