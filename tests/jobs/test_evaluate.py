"""Evaluating by itself, on what other stages left."""

from calibprune.config import Config
from jobs import evaluate
from jobs.run import Run


def test_that_nothing_is_measured_is_said_once(tiny_llama, tmp_path, capsys):
    run = Run(Config.model_validate({"model": {"path": str(tiny_llama)}, "output": str(tmp_path)}))
    run.stage("prune").plan({}, [])
    run.stage("prune").finish()
    evaluate.run(run)
    assert capsys.readouterr().err.count("evaluate.perplexity names no text") == 1
    evaluate.run(run)
    assert "names no text" not in capsys.readouterr().err
