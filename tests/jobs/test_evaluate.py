"""Running evaluate alone, on the results of other stages."""

import json
from typing import cast

from calibprune.config import Config
from jobs import evaluate
from jobs.run import Run
from jobs.stage_runner import run_stage
from jobs.stages import StageModule


def test_that_nothing_is_measured_is_said_once(tiny_llama, tmp_path, heard):
    run = Run(Config.model_validate({"model": {"path": str(tiny_llama)}, "output": str(tmp_path)}))
    run.stage("prune").plan({}, [])
    run.stage("prune").finish()
    for _ in range(2):
        run_stage(cast(StageModule, evaluate), run)
    assert heard.text.count("evaluate.perplexity names no text") == 1
    assert heard.text.count("evaluate: done already") == 1
    for unit in evaluate.UNITS:
        found = json.loads((tmp_path / "evaluate" / f"perplexity-{unit}.json").read_text())
        assert found == {"perplexity": {}}
