"""Experiment tracking with MLflow, Weights & Biases or Trackio, where `report.tracking` asks for it.

A run is one run of the tracker, whose id is kept in the run's folder, so that a resumed run continues it. It gets the
settings, the seconds of each stage, and the figures of the report. A tracker that fails after its start only costs a
line in the log.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from calibprune import storage
from calibprune.config.evaluate import TrackingSettings
from calibprune.errors import UserError
from calibprune.events import note
from calibprune.redact import one_line
from calibprune.stage import flat
from jobs.run import Run
from jobs.stages import COMMANDS

FILE = "_tracking.json"
PARAMETERS_AT_ONCE, PARAMETER_CHARACTERS = 100, 500
"""MLflow's limits on the parameters of one call, and on the characters of a value."""


def check_tracking(settings: TrackingSettings | None) -> None:
    """Raises UserError where the configured library is not installed."""
    if settings is not None and importlib.util.find_spec(settings.type) is None:
        raise UserError(
            f"report.tracking.type is {settings.type}, which is not installed: "
            f"pip install 'calibprune[{settings.type}]', or set report.tracking=null"
        )


@contextlib.contextmanager
def tracking(run: Run) -> Iterator[Callable[[], None]]:
    """Yields a function that logs what has been finished since its last call.

    Raises UserError when the tracker cannot be started and never was for this run.
    """
    settings, url = run.config.report.tracking, run.url(FILE)
    known = _known(url, settings)
    tracker = None if settings is None else _start(run, settings, known)
    if settings is None or tracker is None:
        yield lambda: None
        return
    state = {"type": settings.type, "project": settings.project, "id": tracker.id}
    logged = dict(known.get("logged", {})) if known else {}
    storage.write_json(url, state | {"logged": logged})

    def track() -> None:
        with _forgiven("log to"):
            values, facts = results(run)
            news = {key: value for key, value in values.items() if logged.get(key) != value}
            if news:
                tracker.log(news, facts)
                logged.update(news)
                storage.write_json(url, state | {"logged": logged})

    try:
        yield track
    except Exception:
        with _forgiven("close"):
            tracker.close(False)
        raise
    # not after an interrupt: a driver that must stop has no time to wait for a server, and the resumed run continues
    with _forgiven("close"):
        tracker.close(True)


def results(run: Run) -> tuple[dict[str, float], dict[str, str]]:
    """Returns (figures of the finished stages, URLs of the run and its report)."""
    values: dict[str, float] = {}
    for name in COMMANDS:
        stage = run.stage(name)
        if stage.finished:
            values[f"seconds/{name}"] = stage.manifest()["facts"]["seconds"]
    page, content = (run.url("report", name) for name in ("index.html", "report.json"))
    facts = {"output": run.config.output}
    if storage.exists(content):
        report = storage.read_json(content)
        facts["report"] = page
        values["seconds/report"] = report["stages"]["report"]["seconds"]
        found = {"sparsity": report["sparsity"], **(report["generate"] or {})}
        for key in ("sparsity", "samples", "tokens", "tokens_per_second"):
            if found.get(key) is not None:
                values[key] = found[key]
        for text, of in report["perplexity"].items():
            values |= {f"perplexity/{text}/{side}": of[side] for side in ("dense", "pruned")}
    return values, facts


def _known(url: str, settings: TrackingSettings | None) -> dict[str, Any] | None:
    """Returns the tracker's run to continue, if there is one in the same library and project."""
    if settings is None:
        return None
    try:
        found = storage.read_json(url)
        same = (found["type"], found["project"]) == (settings.type, settings.project)
        return found if same and isinstance(found["id"], str) else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _start(
    run: Run, settings: TrackingSettings, known: dict[str, Any] | None
) -> "Mlflow | Wandb | None":
    name = settings.name or run.config.output.rstrip("/").rsplit("/", 1)[-1]
    kind = Mlflow if settings.type == "mlflow" else Wandb
    config = flat(run.config.model_dump(mode="json"))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the command's result
            return kind(settings, name, config, known["id"] if known else None)
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        if known is None:
            raise UserError(
                f"{settings.type} cannot be started: {reason}; report.tracking=null turns tracking off"
            ) from None
        note(f"tracking: {settings.type} cannot be started, going on without: {reason}")
        return None


@contextlib.contextmanager
def _forgiven(verb: str) -> Iterator[None]:
    """Logs what a tracker raises inside the block, and continues."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except Exception as error:
        note(f"tracking: cannot {verb} it: {one_line(f'{type(error).__name__}: {error}')}")


class Mlflow:
    """MLflow, which finds its server by MLFLOW_TRACKING_URI."""

    def __init__(
        self, settings: TrackingSettings, name: str, config: dict[str, Any], known: str | None
    ) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its defaults would hold
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # the run up for many minutes
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if known is not None:
            self.id = known
            self._client.update_run(known, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(settings.project)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(settings.project)
        )
        self.id = self._client.create_run(experiment, run_name=name).info.run_id
        parameters = [
            Param(key, str(value)[:PARAMETER_CHARACTERS]) for key, value in config.items()
        ]
        for first in range(0, len(parameters), PARAMETERS_AT_ONCE):
            part = parameters[first : first + PARAMETERS_AT_ONCE]
            self._client.log_batch(self.id, params=part)

    def log(self, values: Mapping[str, float], facts: Mapping[str, str]) -> None:
        for key, value in values.items():
            self._client.log_metric(self.id, key, value)
        for key, text in facts.items():
            self._client.set_tag(self.id, key, text)

    def close(self, succeeded: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if succeeded else "FAILED")


class Wandb:
    """Weights & Biases, or Trackio, which has the same interface but identifies a run by its name.

    Weights & Biases finds server and key by WANDB_BASE_URL, WANDB_API_KEY and the like, and respects
    WANDB_MODE=offline. Trackio stays on this machine (TRACKIO_DIR) or uses a space of the hub (TRACKIO_SPACE_ID).
    """

    def __init__(
        self, settings: TrackingSettings, name: str, config: dict[str, Any], known: str | None
    ) -> None:
        if settings.type == "wandb":
            self.id = known or uuid.uuid4().hex[:12]
            quiet = {"silent": True, "console": "off", "x_disable_stats": True}
            quiet |= {"disable_code": True, "disable_git": True}
            own: dict[str, Any] = {"name": name, "id": self.id, "settings": quiet}
        else:
            self.id = known or f"{name}-{uuid.uuid4().hex[:6]}"
            own = {"name": self.id, "embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self._library = importlib.import_module(settings.type)
        self._library.init(project=settings.project, config=config, resume="allow", **own)
        self._has_exit_code = settings.type == "wandb"

    def log(self, values: Mapping[str, float], facts: Mapping[str, str]) -> None:
        self._library.log(dict(values) | dict(facts))

    def close(self, succeeded: bool) -> None:
        exit_code = {"exit_code": 0 if succeeded else 1} if self._has_exit_code else {}
        self._library.finish(**exit_code)
