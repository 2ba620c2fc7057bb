"""curate on real Ray actors: the same bytes as in one process, whichever actors died."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from calibprune.calibration import curate_units as units_of_work
from calibprune.calibration.curate_units import plan_curation
from calibprune.calibration.pool import read_samples
from calibprune.config import Config
from calibprune.config.model import ClusterSettings
from calibprune.errors import DriftError, UserError
from calibprune.publish import publish
from calibprune.stage import Stage
from cluster.session import connect
from jobs import analysis, curate
from jobs.run import Run
from jobs.stage_runner import run_stage
from tests.calibprune.calibration.samples import curated, generated
from tests.tiny import write_tiny_llama

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def failpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failpoints")
    os.environ["CALIBPRUNE_FAILPOINTS"] = str(folder)
    yield folder
    del os.environ["CALIBPRUNE_FAILPOINTS"]


@pytest.fixture(scope="module")
def cluster(failpoints):
    with connect(ClusterSettings()):
        yield


@pytest.fixture
def run(tmp_path, tiny_llama, monkeypatch):
    """Makes a run whose samples are written already, in several portions."""
    monkeypatch.setattr(units_of_work, "PORTION_BYTES", 6000)
    samples = [RNG.integers(0, 200, RNG.integers(40, 90)).tolist() for _ in range(60)]
    (tmp_path / "lines.txt").write_text("\n".join(f"line {i} of {i * 7919}" for i in range(30)))
    config = {
        "model": {"path": str(tiny_llama)},
        "output": str(tmp_path / "run"),
        "curate": {"sequences": 20, "sequence_tokens": 32, "filters": [{"type": "duplicates"}]},
    }
    made = Run(Config.model_validate(config))
    samples[7] = samples[2]
    generated(Path(made.url("generate")), samples, shard_rows=5)
    return made


def with_curate(run, **changes):
    tree = run.config.model_dump(mode="json")
    tree["curate"] |= changes
    return Run(Config.model_validate(tree))


def hashes(stage):
    return {unit: record.sha256 for unit, record in stage.done().items()}


def test_tasks_make_what_one_process_makes_though_one_dies(run, cluster, failpoints, tmp_path):
    wanted = curated(tmp_path / "here", run.config.curate, own=run.stage("generate"))
    assert len(wanted.portions) > 2
    for unit in ("scores-00001", "selection", "pool-00000"):
        (failpoints / f"between-data-and-done-{unit}").touch()
    run_stage(curate, run)
    assert not list(failpoints.iterdir())  # all three were killed
    stage = run.stage("curate")
    assert stage.finished and hashes(stage) == hashes(wanted.stage)
    (Path(stage.url) / "_SUCCESS").unlink()
    for unit in ("scores-00000", "dropped-00000", "pool-00000"):
        (Path(stage.url) / "_done" / f"{unit}.json").unlink()
    run_stage(curate, run)
    assert hashes(stage) == hashes(wanted.stage)
    with pytest.raises(DriftError, match=r"curate.seed was 0, now 1"):
        run_stage(curate, with_curate(run, seed=1))
    run_stage(curate, with_curate(run, analysis={"documents": 3}))  # says nothing about the pool


def test_the_comparison_is_made_again_for_other_references_and_only_then(run, cluster, tmp_path):
    run_stage(curate, run)
    lines = [{"name": "lines", "path": str(tmp_path / "lines.txt")}]
    stage, made = run.stage("curate/analysis"), []
    for settings in ({}, {"references": lines}, {"references": lines, "analysis": {"ngram": 2}}):
        for _ in range(2):
            compared = with_curate(run, **settings)
            run_stage(analysis, compared)
            made.append(stage.record("analysis").finished_at if stage.finished else None)
    assert made[:2] == [None, None]
    assert made[2] == made[3] < made[4] == made[5]
    facts = analysis.facts(compared)
    assert facts is not None and facts["ngram"] == 2
    assert facts["vocabulary"]["references"]["lines"]["documents"] == 30
    assert analysis.facts(with_curate(run, references=lines)) is None


@pytest.mark.slow
def test_documents_beside_samples_are_scored_where_a_filter_asks(run, cluster, tmp_path):
    model = write_tiny_llama(tmp_path / "model", hidden=128)  # which the engine's CPU kernels know
    lines = {"type": "text", "name": "lines", "path": str(tmp_path / "lines.txt"), "weight": 0.25,
             "documents": 40}  # fmt: skip
    tree = run.config.model_dump(mode="json") | {"model": {"path": str(model)}}
    tree["generate"] |= {"cpu_kvcache_gib": 1}
    mixed = with_curate(
        Run(Config.model_validate(tree)),
        sources=[{"type": "generated"}, lines],
        filters=[{"type": "perplexity", "drop_worst": 0.1}],
    )
    run_stage(curate, mixed)
    stage = mixed.stage("curate")
    facts = stage.record("selection").facts
    assert facts["sources"]["lines"] == {
        "samples": 30, "tokens": facts["sources"]["lines"]["tokens"], "kept": 27,
        "used": facts["sources"]["lines"]["used"], "used_tokens": 128, "sequences": 4,
    }  # fmt: skip
    texts = read_samples(stage, stage.record("text-lines-00000"))["token_ids"].to_pylist()
    scored = read_samples(stage, stage.record("scored-lines-00000"))["cumulative_logprob"]
    forward = AutoModelForCausalLM.from_pretrained(model)
    for ids, value in zip(texts, scored.to_pylist(), strict=True):
        with torch.no_grad():
            logits = forward(torch.tensor([ids])).logits[0, :-1]
        known = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].sum()
        assert value == pytest.approx(float(known), abs=1e-2)


def test_what_a_task_finds_wrong_reaches_the_user(run, cluster):
    short = with_curate(run, sequences=2000)
    with pytest.raises(Exception, match="self-generated must fill 2000 sequences") as raised:
        run_stage(curate, short)
    assert isinstance(getattr(raised.value, "cause", raised.value), UserError)


def test_published_samples_are_known_by_their_model(run, tmp_path):
    for number, identity in enumerate((run.model_identity, "another", None)):
        folder, target = tmp_path / f"run-{number}", str(tmp_path / f"pool-{number}")
        generated(folder / "generate", [[1, 2]], facts={"model": identity} if identity else {})
        publish(str(folder / "generate"), target)
        published = with_curate(run, sources=[{"type": "generated", "path": target}])
        if identity == run.model_identity:
            stage = curate.generated_stages(published)["self-generated"]
            assert stage.content_id() == Stage(str(folder / "generate")).content_id()
            continue
        message = (
            "were written by another model"
            if identity
            else "_plan.json is not there, .* give the folder"
        )
        with pytest.raises(UserError, match=message):
            curate.generated_stages(published)


def test_samples_of_another_model_are_refused(run, tmp_path):
    other = {"type": "generated", "path": run.url("generate")}
    with pytest.raises(UserError, match="were written by another model"):
        curate.generated_stages(with_curate(run, sources=[other]))
    plan = Path(run.url("generate", "_plan.json"))
    plan.write_text(
        json.dumps(json.loads(plan.read_text()) | {"identity": {"model": run.model_identity}})
    )
    stages = curate.generated_stages(with_curate(run, sources=[other]))
    assert isinstance(stages["self-generated"], Stage)
    assert plan_curation("nowhere", run.config.curate, stages).portions
