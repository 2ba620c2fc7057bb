"""The report's facts, collected from the records of the stages."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from calibprune import storage
from calibprune.calibration.pool import SAMPLE_SCHEMA, parquet_bytes, sample_records
from calibprune.config import Config
from calibprune.events import Lost, emit, listening
from calibprune.failures import FailureFiles, read_failures
from calibprune.reporting.page import render_page
from calibprune.stage import Stage
from jobs import analysis, generate, report
from jobs.run import Run
from tests.tiny import write_tiny_llama


def a_run(model, folder) -> Run:
    return Run(Config.model_validate({"model": {"path": str(model)}, "output": str(folder)}))


def commit_samples(stage: Stage, unit: str, first: int) -> None:
    rows = np.arange(first, first + 4)
    table = pa.table(
        [rows, [[0, 70, 71]] * 4, [1] * 4, -1.0 - rows, ["stop"] * 3 + ["length"], rows, ["self"] * 4],
        schema=SAMPLE_SCHEMA,
    )  # fmt: skip
    published = stage.put(unit, parquet_bytes(table), "parquet", "data", "part")
    facts = {"rows": 4, "tokens": 8, "finish_reasons": {"stop": 3, "length": 1}, "seconds": 2.0}
    stage.commit(unit, published, facts)


def test_prefixes_are_no_samples_and_what_was_set_aside_is_told(tiny_llama, tmp_path):
    run = a_run(tiny_llama, tmp_path / "run")
    stage = run.stage("generate")
    units = ["prefixes-00000", "00000", "00001", "00002"]
    stage.plan({}, units)
    prefixes = stage.put(units[0], b"no table of samples", "parquet", "prefixes", "part")
    stage.commit(units[0], prefixes, {"rows_read": 12})
    stage.commit("00000", None, {"set_aside": "engine died", "rows_missing": [0, 4]})
    for unit, first in (("00001", 4), ("00002", 8)):
        commit_samples(stage, unit, first)
    stage.finish()

    assert [record.unit for record in sample_records(stage)] == ["00001", "00002"]
    assert generate.facts(run) == {
        "samples": 8,
        "tokens": 16,
        "tokens_per_second": None,
        "finish_reasons": {"stop": 6, "length": 2},
        "set_aside": [{"reason": "engine died", "rows": [0, 4]}],
    }
    texts = report._sample_texts(run)
    assert [text["row"] for text in texts] == [4, 5, 7]
    assert (texts[0]["prefix"], texts[0]["tokens"]) == ("<s>", 3)


def test_a_run_of_which_every_shard_was_set_aside_has_no_texts(tiny_llama, tmp_path):
    run = a_run(tiny_llama, tmp_path / "run")
    stage = run.stage("generate")
    stage.plan({}, ["00000"])
    stage.commit("00000", None, {"set_aside": "engine died", "rows_missing": [0, 4]})
    stage.finish()
    assert report._sample_texts(run) == []
    facts = generate.facts(run)
    assert (facts["samples"], facts["tokens_per_second"]) == (0, None)


def test_the_analysis_stands_with_the_selection_if_it_is_what_is_configured(tiny_llama, tmp_path):
    run = a_run(tiny_llama, tmp_path / "run")
    run.open()
    stage = run.stage("curate")
    stage.plan({}, ["selection"])
    stage.commit("selection", None, {"samples": 5})
    stage.finish()
    assert report.collect(run)["curate"] == {"samples": 5}
    comparison = Stage(f"{stage.url}/analysis")
    comparison.plan(analysis._compared(run) | {"samples": "abc"}, ["analysis"])
    comparison.commit("analysis", None, {"ngram": 3})
    assert report.collect(run)["curate"] == {"samples": 5}
    comparison.finish()
    assert report.collect(run)["curate"] == {"samples": 5, "analysis": {"ngram": 3}}
    tree = run.config.model_dump(mode="json")
    tree["curate"]["analysis"]["ngram"] = 4
    assert report.collect(Run(Config.model_validate(tree)))["curate"] == {"samples": 5}


def committed_at(stage: Stage, unit: str, at: float, seconds: float) -> None:
    """Commits a shard of 8 tokens that took some seconds."""
    facts = {"rows": 4, "tokens": 8, "finish_reasons": {}, "seconds": seconds}
    published = stage.put(unit, unit.encode(), "parquet", "data", "part")
    done = Path(stage.url, "_done", f"{unit}.json")
    stage.commit(unit, published, facts)
    done.write_text(json.dumps(json.loads(done.read_text()) | {"finished_at": at}))


def test_a_resumed_run_is_told_whole(tiny_llama, tmp_path):
    """The report counts times, speed and losses of both drivers; the first was killed 30 seconds after its start."""
    run = a_run(tiny_llama, tmp_path / "run")
    run.open()
    stage, now = run.stage("generate"), time.time()
    stage.plan({}, ["00000", "00001", "00002"])
    drivers = Path(stage.url, "_drivers")
    drivers.mkdir()
    for begun in (now - 1000, now - 100):
        (drivers / f"{int(1000 * begun)}-abcd.json").write_text("{}")
    with listening(FailureFiles(stage.url)):
        for attempt in (1, 2):
            emit(Lost("engine", "it died", ("00001",), attempt, "node-7"))
    committed_at(stage, "00000", now - 970, 20)  # 10 s for the engines to start
    committed_at(stage, "00001", now - 60, 20)
    committed_at(stage, "00002", now - 40, 40)
    stage.finish({"losses": [lost.in_words for lost in read_failures(stage.url, 9)[1]]})
    found = report.collect(run)
    assert found["stages"]["generate"]["seconds"] == pytest.approx(30 + 100, abs=1)
    assert found["stages"]["generate"]["drivers"] == 2
    assert len(found["stages"]["generate"]["losses"]) == 2
    # 20 s by the first driver, and 40 s by the second, whose shards overlap
    assert found["generate"]["tokens_per_second"] == pytest.approx(24 / 60, rel=0.01)


def test_a_report_needs_no_model_and_shows_the_versions_of_the_run(tmp_path):
    model = write_tiny_llama(tmp_path / "model")
    run = a_run(model, tmp_path / "run")
    run.open()
    stage = run.stage("generate")
    stage.plan({}, ["00000"])
    commit_samples(stage, "00000", 0)
    stage.finish()
    content = run.read()
    storage.write_json(run.url("run.json"), content | {"versions": {"torch": "1.2.3"}})
    shutil.rmtree(model)
    found = report.collect(a_run(model, tmp_path / "run"))
    assert found["versions"] == {"torch": "1.2.3"}
    assert found["model"] is not None and found["model"]["layers"] == 3
    assert "1.2.3" in render_page(found)
