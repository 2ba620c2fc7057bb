"""What the report gathers from the records of the stages."""

import numpy as np
import pyarrow as pa

from calibprune.calibration.pool import SAMPLE_SCHEMA, parquet_bytes, sample_records
from calibprune.config import Config
from calibprune.stage import Stage
from jobs.analysis import compared
from jobs.report import curate_facts, generate_facts, sample_texts
from jobs.run import Run


def a_run(model, folder) -> Run:
    return Run(Config.model_validate({"model": {"path": str(model)}, "output": str(folder)}))


def commit_samples(stage: Stage, unit: str, first: int) -> None:
    rows = np.arange(first, first + 4)
    table = pa.table(
        [rows, [[0, 70, 71]] * 4, [1] * 4, -1.0 - rows, ["stop"] * 3 + ["length"], rows, ["self"] * 4],
        schema=SAMPLE_SCHEMA,
    )  # fmt: skip
    published = stage.put(unit, parquet_bytes(table), "parquet", "data", "part")
    facts = {"rows": 4, "tokens": 8, "finish_reasons": {"stop": 3, "length": 1}}
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
    stage.finish({"tokens": 16, "seconds": 3.0, "working_seconds": 2.0})

    assert [record.unit for record in sample_records(stage)] == ["00001", "00002"]
    assert generate_facts(run) == {
        "samples": 8,
        "tokens": 16,
        "tokens_per_second": 8.0,
        "finish_reasons": {"stop": 6, "length": 2},
        "set_aside": [{"reason": "engine died", "rows": [0, 4]}],
    }
    texts = sample_texts(run)
    assert [text["row"] for text in texts] == [4, 5, 7]
    assert (texts[0]["prefix"], texts[0]["tokens"]) == ("<s>", 3)


def test_a_run_of_which_every_shard_was_set_aside_has_no_texts(tiny_llama, tmp_path):
    run = a_run(tiny_llama, tmp_path / "run")
    stage = run.stage("generate")
    stage.plan({}, ["00000"])
    stage.commit("00000", None, {"set_aside": "engine died", "rows_missing": [0, 4]})
    stage.finish({"tokens": 0, "seconds": 1.0, "working_seconds": 0.5})
    assert sample_texts(run) == []
    facts = generate_facts(run)
    assert (facts["samples"], facts["tokens_per_second"]) == (0, None)


def test_the_analysis_stands_with_the_selection_if_it_is_what_is_configured(tiny_llama, tmp_path):
    run = a_run(tiny_llama, tmp_path / "run")
    stage = run.stage("curate")
    stage.commit("selection", None, {"samples": 5})
    assert curate_facts(run) == {"samples": 5}
    comparison = Stage(f"{stage.url}/analysis")
    comparison.plan(compared(run) | {"samples": "abc"}, ["analysis"])
    comparison.commit("analysis", None, {"ngram": 3})
    assert curate_facts(run) == {"samples": 5}
    comparison.finish()
    assert curate_facts(run) == {"samples": 5, "analysis": {"ngram": 3}}
    tree = run.config.model_dump(mode="json")
    tree["curate"]["analysis"]["ngram"] = 4
    assert curate_facts(Run(Config.model_validate(tree))) == {"samples": 5}
