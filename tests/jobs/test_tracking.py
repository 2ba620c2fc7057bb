"""Experiment tracking through the real libraries, each with a store on this machine."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from calibprune import storage
from calibprune.config import Config
from calibprune.errors import UserError
from jobs.run import Run
from jobs.tracking import FILE, tracking
from tests.jobs.command import ENVIRONMENT, calibprune_here

REPORT = {
    "stages": {"report": {"seconds": 0.5}},
    "sparsity": 0.5,
    "generate": {"samples": 8, "tokens": 16, "tokens_per_second": 8.0, "finish_reasons": {}},
    "perplexity": {"docs": {"dense": 14.5, "pruned": 28.5}},
}


def a_run(folder, kind) -> Run:
    tree = {"model": {"path": "m"}, "output": str(folder), "report": {"tracking": kind}}
    return Run(Config.model_validate(tree))


def finish(run: Run, name: str, seconds: float) -> None:
    stage = run.stage(name)
    stage.plan({}, ["0"])
    stage.commit("0", None, {})
    stage.finish({"seconds": seconds})


def interrupted_and_resumed(run: Run) -> str:
    """Tracks a run that fails after a stage, and again until it ends; returns its id in the tracker."""
    with pytest.raises(ZeroDivisionError), tracking(run) as track:
        finish(run, "generate", 2.5)
        track()
        raise ZeroDivisionError
    known = storage.read_json(run.url(FILE))
    with tracking(run) as track:
        track()
        finish(run, "prune", 7.0)
        track()
        storage.write_json(run.url("report", "report.json"), REPORT)
        track()
    assert storage.read_json(run.url(FILE))["id"] == known["id"]
    return known["id"]


EXPECTED = {
    "seconds/generate": 2.5, "seconds/prune": 7.0, "seconds/report": 0.5, "sparsity": 0.5,
    "perplexity/docs/dense": 14.5, "perplexity/docs/pruned": 28.5, "tokens_per_second": 8.0,
    "samples": 8, "tokens": 16,
}  # fmt: skip


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    return pytest.importorskip("mlflow")


def test_mlflow_holds_settings_figures_and_where_the_report_is_in_one_run(mlflow, tmp_path):
    run = a_run(tmp_path / "my-run", {"type": "mlflow", "project": "pruning"})
    known = interrupted_and_resumed(run)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("pruning")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == known and found.info.run_name == "my-run"
    assert found.info.status == "FINISHED"
    assert found.data.metrics == EXPECTED
    assert all(len(client.get_metric_history(known, key)) == 1 for key in EXPECTED)
    assert found.data.params["prune.method.type"] == run.config.prune.method.type
    assert found.data.tags["report"] == run.url("report", "index.html")


def test_a_tracker_that_fails_later_is_logged_and_the_run_goes_on(mlflow, tmp_path, caplog):
    caplog.set_level("INFO", "calibprune")
    run = a_run(tmp_path / "run", "mlflow")
    with tracking(run) as track:
        (tmp_path / "mlruns").rename(tmp_path / "away")
        finish(run, "generate", 2.5)
        track()
    assert "tracking: cannot log to it" in caplog.text
    with tracking(run) as track:  # nor does it prevent a run from being resumed
        track()
    assert "mlflow cannot be started, going on without" in caplog.text
    (tmp_path / "away").rename(tmp_path / "mlruns")
    with tracking(run) as track:
        track()
    known = storage.read_json(run.url(FILE))["id"]
    assert mlflow.MlflowClient().get_run(known).data.metrics == {"seconds/generate": 2.5}


def test_a_tracker_that_cannot_be_started_ends_a_new_run_in_one_line(mlflow, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nosuch://me:pa55word@place")
    with (
        pytest.raises(UserError, match="mlflow cannot be started") as caught,
        tracking(a_run(tmp_path / "run", "mlflow")),
    ):
        pass
    assert "pa55word" not in str(caught.value) and not (tmp_path / "run").exists()


def test_trackio_holds_one_run(tmp_path):
    """Runs in a process of its own, since the library reads its folder from the environment when it is imported."""
    pytest.importorskip("trackio")
    code = (
        "import json, sys, pathlib; from tests.jobs.test_tracking import *\n"
        "run = a_run(pathlib.Path(sys.argv[1]) / 'my-run', {'type': 'trackio', 'project': 'pruning'})\n"
        "known = interrupted_and_resumed(run)\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "runs = SQLiteStorage.get_runs('pruning')\n"
        "print(json.dumps([known, runs, SQLiteStorage.get_logs('pruning', known)]))\n"
    )
    out = in_own_process(code, tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    known, runs, logs = json.loads(out.splitlines()[-1])
    assert runs == [known] and known.startswith("my-run-")
    merged = {key: value for row in logs for key, value in row.items()}
    assert merged.items() >= EXPECTED.items()
    assert merged["report"].endswith("my-run/report/index.html")


def test_wandb_writes_one_run_offline(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "import json, sys, pathlib; from tests.jobs.test_tracking import *\n"
        "run = a_run(pathlib.Path(sys.argv[1]) / 'my-run', {'type': 'wandb', 'project': 'pruning'})\n"
        "print(json.dumps(interrupted_and_resumed(run)))\n"
    )
    folder = {"WANDB_DIR": str(tmp_path), "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    known = json.loads(
        in_own_process(code, tmp_path, WANDB_MODE="offline", **folder).splitlines()[-1]
    )
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{known}*/run-{known}.wandb"))
    content = b"".join(path.read_bytes() for path in written)
    for text in (
        b"perplexity/docs/pruned",
        b"28.5",
        b"my-run/report/index.html",
        b"prune.sparsity",
    ):
        assert text in content


def in_own_process(code: str, folder, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=280,
        env=ENVIRONMENT | environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("kind", ["mlflow", "wandb", "trackio"])
def test_a_library_that_is_not_installed_is_refused_before_any_work(
    tmp_path, monkeypatch, capsys, kind
):
    monkeypatch.setitem(sys.modules, kind, None)
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{path: {tmp_path / 'model'}}}\noutput: {tmp_path / 'out'}\n")
    code, _, errors = calibprune_here(capsys, "run", config, f"report.tracking={kind}")
    assert code == 2 and f"pip install 'calibprune[{kind}]'" in errors
    assert len(errors.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras[kind]


def test_it_is_off_unless_asked_for(tmp_path):
    run = a_run(tmp_path / "run", None)
    with tracking(run) as track:
        track()
    assert not (tmp_path / "run").exists()
