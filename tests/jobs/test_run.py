"""The run's folder: what a driver writes when it opens a run."""

from calibprune.config import Config
from jobs.run import Run


def test_an_opened_run_holds_what_the_report_needs_and_no_probe(tiny_llama, tmp_path):
    config = {"model": {"path": str(tiny_llama)}, "output": str(tmp_path / "run")}
    run = Run(Config.model_validate(config | {"prune": {"pool": "elsewhere"}}))
    left = tmp_path / "run" / ".calibprune-abc.tmp"
    left.parent.mkdir()
    left.touch()
    assert not run.begun
    run.open()
    assert run.begun and not left.exists()
    found = run.read()
    assert found["config"] == run.config.model_dump(mode="json")
    assert found["unneeded"] == dict.fromkeys(["generate", "curate"], "prune.pool is given") | {
        "curate/analysis": "curate.references names no text to compare with"
    }
    assert found["model"]["layers"] == 3 and found["model"]["architecture"] == "LlamaForCausalLM"
    assert found["versions"].keys() >= {"torch", "calibprune"} and found["opened_at"] > 0
