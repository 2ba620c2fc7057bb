"""curate/analysis: compares the sources with the reference corpora: how alike they are, and how familiar to the model.

It is a small stage of its own inside curate's folder, so that references can be changed at any time.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from calibprune import storage
from calibprune.calibration.compare import analyse, min_k_scores, read_reference
from calibprune.calibration.curate_units import Curation
from calibprune.calibration.sources import flat_tokens, read_shard
from calibprune.config.model import ModelSettings
from calibprune.events import SET_ASIDE, Event, Lost, UnitDone, emit
from calibprune.model import build_skeleton, load_tokenizer
from calibprune.stage import Stage, flat
from cluster.crew import Crew
from cluster.places import Bundle, Need
from cluster.queue import work_through
from cluster.session import worker_bundle
from cluster.unit_worker import UnitWorker
from jobs import curate
from jobs.run import Run
from jobs.stages import Plan

NAME = "curate/analysis"
PUBLISHED: dict[str, Any] = {}
UNIT = "analysis"


def skip(run: Run) -> str | None:
    if not run.config.curate.references:
        return "curate.references names no text to compare with"
    return curate.skip(run)


def check(run: Run) -> None:
    """Does nothing: curate checks the references with its other texts."""


def needs(run: Run) -> Iterator[Need]:
    if skip(run) is None and not run.stage(NAME).finished:
        work = f"sources compared with {len(run.config.curate.references)} texts"
        yield Need("curate", "task", 1, 1, _bundle(run), work)


def plan(run: Run) -> Plan:
    """Plans the comparison; removes one that was made with other references."""
    stage = run.stage(NAME)
    identity = _compared(run) | {"samples": run.stage("curate").content_id()}
    if stage.planned and stage.read_plan()["identity"] != flat(identity):
        storage.remove_folder(stage.url)
    return Plan(identity, [UNIT])


def work(run: Run, stage: Stage, missing: Sequence[str]) -> Iterator[Event]:
    bundle = _bundle(run)
    function = partial(
        _analyse, curate.curation_of(run), run.config.model, "cuda" if bundle.gpus else "cpu", stage.url
    )  # fmt: skip
    crew = Crew(
        UnitWorker, 1, bundle, [function, run.label(NAME)],
        start_seconds=run.config.cluster.start_timeout_seconds,
        label=run.label(NAME), kind="worker",
    )  # fmt: skip
    with crew:
        for event in work_through(crew, "make", [missing] if missing else []):
            if isinstance(event, Lost) and event.kind == SET_ASIDE:
                raise RuntimeError(f"the comparison failed {event.attempt} times: {event.message}")
            yield event


def facts(run: Run) -> dict[str, Any] | None:
    """Returns the comparison with the configured references, if it is done."""
    stage = run.stage(NAME)
    if (
        not stage.finished
        or not stage.read_plan()["identity"].items() >= flat(_compared(run)).items()
    ):
        return None
    return stage.record(UNIT).facts


def _bundle(run: Run) -> Bundle:
    """Returns the resources of a worker where the model is needed, else one core."""
    needs_model = run.config.curate.analysis.min_k is not None
    return worker_bundle(run.config.cluster) if needs_model else Bundle(1, 0)


def _compared(run: Run) -> dict[str, Any]:
    """Returns the settings of the comparison."""
    return run.config.curate.model_dump(mode="json", include={"references", "analysis"})


def _analyse(
    curation: Curation, model: ModelSettings, device: str, stage_url: str, units: Sequence[str]
) -> Iterator[Event]:
    settings = curation.settings
    tokenizer = load_tokenizer(curation.model, model.trust_remote_code)
    most = settings.analysis.documents, settings.sequence_tokens
    references = {one.name: read_reference(one, tokenizer, *most) for one in settings.references}
    sources = {one.name: _documents(curation, n) for n, one in enumerate(settings.sources)}
    scores = None
    if settings.analysis.min_k is not None:
        skeleton = build_skeleton(model, device)
        scores = min_k_scores(skeleton, settings.analysis, sources, references)
    facts = analyse(settings, sources, references, scores)
    for unit in units:
        yield emit(UnitDone(Stage(stage_url).commit(unit, None, facts)))


def _documents(curation: Curation, source: int) -> list[np.ndarray]:
    """Returns the first documents of a source, kept and dropped ones alike."""
    found: list[np.ndarray] = []
    for shard in (s for one in curation.portions if one.source == source for s in one.shards):
        table = read_shard(shard)
        if table is not None:
            tokens, offsets = flat_tokens(table)
            found += np.split(tokens, offsets[1:-1])
        if len(found) >= curation.settings.analysis.documents:
            break
    return found[: curation.settings.analysis.documents]
