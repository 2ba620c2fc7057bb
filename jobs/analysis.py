"""The sources of curate beside the reference corpora: how alike they are, and how familiar to the model.

A small stage of its own inside curate's folder, so that other references can be asked for at any time.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from calibprune import storage
from calibprune.calibration.compare import analyse, min_k_scores, read_reference
from calibprune.calibration.curate_units import Curation
from calibprune.calibration.sources import flat_tokens, read_shard
from calibprune.config.model import ModelSettings
from calibprune.errors import DriftError
from calibprune.model import build_skeleton, load_tokenizer
from calibprune.stage import Record, Stage
from cluster.label import label_of
from cluster.places import Bundle
from cluster.session import worker_bundle
from cluster.tasks import run_tasks
from jobs.progress import say, tick
from jobs.run import Run
from jobs.watching import Watch

FOLDER = "analysis"


def run(run: Run, curation: Curation) -> None:
    """Compares sources and references, if there are any of these and it has not been done yet."""
    settings = curation.settings
    if not settings.references:
        return
    stage = Stage(storage.join(curation.stage_url, FOLDER))
    identity = compared(run) | {
        "samples": run.stage("curate").content_id(),
    }
    try:
        missing = stage.plan(identity, [FOLDER])
    except DriftError:  # others were asked for
        storage.remove_folder(stage.url)
        missing = stage.plan(identity, [FOLDER])
    if not missing and stage.finished:
        return
    say(f"curate: comparing {len(settings.sources)} sources with {len(settings.references)} texts")
    started = time.monotonic()
    label = replace(label_of(curation.stage_url), stage=FOLDER)
    watch = Watch(stage, 1, 0, label)
    bundle = task_bundle(run)
    device = "cuda" if bundle.gpus else "cpu"
    arguments = (curation, run.config.model, run.skeleton.checkpoint.url, device, stage)
    for done in run_tasks(
        _analyse, arguments, [missing] if missing else [], bundle,
        start_seconds=run.config.cluster.start_timeout_seconds, label=label, failed=watch.lost,
    ):  # fmt: skip
        tick()
        if done is not None:
            watch.committed(*done)
    stage.finish({"seconds": time.monotonic() - started})


def task_bundle(run: Run) -> Bundle:
    """What the comparison asks of the cluster: a worker's place where the model is asked, else a core."""
    needs_model = run.config.curate.analysis.min_k is not None
    return worker_bundle(run.config.cluster) if needs_model else Bundle(1, 0)


def compared(run: Run) -> dict[str, Any]:
    """What the configuration asks to be compared."""
    return run.config.curate.model_dump(mode="json", include={"references", "analysis"})


def _analyse(
    curation: Curation,
    model: ModelSettings,
    folder: str,
    device: str,
    stage: Stage,
    units: Sequence[str],
) -> Iterator[Record]:
    settings = curation.settings
    tokenizer = load_tokenizer(folder, model.trust_remote_code)
    most = settings.analysis.documents, settings.sequence_tokens
    references = {one.name: read_reference(one, tokenizer, *most) for one in settings.references}
    sources = {one.name: _documents(curation, n) for n, one in enumerate(settings.sources)}
    scores = None
    if settings.analysis.min_k is not None:
        skeleton = build_skeleton(model, device)
        scores = min_k_scores(skeleton, settings.analysis, sources, references)
    yield stage.commit(FOLDER, None, analyse(settings, sources, references, scores))


def _documents(curation: Curation, source: int) -> list[np.ndarray]:
    """The first documents of a source, whether kept or dropped."""
    found: list[np.ndarray] = []
    for shard in (s for one in curation.portions if one.source == source for s in one.shards):
        table = read_shard(shard)
        if table is not None:
            tokens, offsets = flat_tokens(table)
            found += np.split(tokens, offsets[1:-1])
        if len(found) >= curation.settings.analysis.documents:
            break
    return found[: curation.settings.analysis.documents]
