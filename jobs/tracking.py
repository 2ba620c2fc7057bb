"""Experiment tracking by MLflow, Weights & Biases or Trackio, where `report.tracking` asks for it.

One run there for one run here: its id lies in the run's folder, and a resumed run continues it. Logged are the
settings, the seconds of each stage, and what the report found. A tracker that fails later on is said, no more.
"""

import contextlib
import importlib.util
import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from calibprune import storage
from calibprune.config.evaluate import TrackingSettings
from calibprune.errors import UserError
from calibprune.events import note as say
from calibprune.redact import one_line
from calibprune.stage import flat
from jobs.run import Run

FILE = "_tracking.json"
PARAMETERS_AT_ONCE, PARAMETER_CHARACTERS = 100, 500


class Tracker(Protocol):
    id: str

    def log(self, values: Mapping[str, float], facts: Mapping[str, str]) -> None: ...

    def close(self, succeeded: bool) -> None: ...


def check_tracking(settings: TrackingSettings | None) -> None:
    """Raises UserError where the library that is asked for is not installed."""
    if settings is not None and importlib.util.find_spec(settings.type) is None:
        raise UserError(
            f"report.tracking.type is {settings.type}, which is not installed: "
            f"pip install 'calibprune[{settings.type}]', or report.tracking=null"
        )


@contextlib.contextmanager
def tracking(run: Run) -> Iterator[Callable[[], None]]:
    """What is yielded logs whatever has been finished since it was called last.

    Raises UserError when the tracker cannot even be started and never was for this run.
    """
    settings, url = run.config.report.tracking, run.url(FILE)
    if settings is None:
        yield lambda: None
        return
    known = _known(url, settings)
    tracker = _start(run, settings, known)
    if tracker is None:
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
        _close(tracker, succeeded=False)
        raise
    # a driver that is told to stop has no time to wait for a server: the resumed run goes on with this one there
    _close(tracker, succeeded=True)


def _close(tracker: Any, succeeded: bool) -> None:
    with _forgiven("close"):
        tracker.close(succeeded)


def results(run: Run) -> tuple[dict[str, float], dict[str, str]]:
    """The figures of the stages that are finished, and where the report is."""
    values: dict[str, float] = {}
    for name in ("generate", "curate", "prune", "evaluate"):
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


def _known(url: str, settings: TrackingSettings) -> dict[str, Any] | None:
    """The run that is to be continued, if there is one of this kind."""
    try:
        found = storage.read_json(url)
        same = (found["type"], found["project"]) == (settings.type, settings.project)
        return found if same and isinstance(found["id"], str) else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _start(run: Run, settings: TrackingSettings, known: dict[str, Any] | None) -> Tracker | None:
    name = settings.name or run.config.output.rstrip("/").rsplit("/", 1)[-1]
    config = flat(run.config.model_dump(mode="json"))
    kinds: dict[str, Any] = {"mlflow": Mlflow, "wandb": Wandb, "trackio": Trackio}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a command prints is its result
            return kinds[settings.type](settings.project, name, config, known and known["id"])
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        if known is None:
            raise UserError(
                f"{settings.type} cannot be started: {reason}; report.tracking=null goes without"
            ) from None
        say(f"tracking: {settings.type} cannot be started, going on without: {reason}")
        return None


@contextlib.contextmanager
def _forgiven(verb: str) -> Iterator[None]:
    """Says what a tracker raises, and goes on."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except Exception as error:
        say(f"tracking: cannot {verb} it: {one_line(f'{type(error).__name__}: {error}')}")


class Mlflow:
    """Finds its server by MLFLOW_TRACKING_URI."""

    def __init__(self, project: str, name: str, config: dict[str, Any], known: str | None) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own would hold
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # the run up for many minutes
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if known is not None:
            self.id = known
            self._client.update_run(known, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(project)
        self.id = self._client.create_run(number, run_name=name).info.run_id
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
    """Finds its server and key by WANDB_BASE_URL, WANDB_API_KEY and the like; WANDB_MODE=offline works too."""

    def __init__(self, project: str, name: str, config: dict[str, Any], known: str | None) -> None:
        import wandb

        self.id = known or uuid.uuid4().hex[:12]
        quiet = wandb.Settings(
            silent=True, console="off", disable_code=True, disable_git=True, x_disable_stats=True
        )
        self._run = wandb.init(
            project=project, name=name, id=self.id, resume="allow", config=config, settings=quiet
        )

    def log(self, values: Mapping[str, float], facts: Mapping[str, str]) -> None:
        self._run.log(dict(values))
        self._run.summary.update(dict(facts))

    def close(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


class Trackio:
    """On this machine (TRACKIO_DIR), or a space of the hub by TRACKIO_SPACE_ID. A run is known by its name there."""

    def __init__(self, project: str, name: str, config: dict[str, Any], known: str | None) -> None:
        import trackio

        logging.getLogger("httpx").setLevel(logging.WARNING)
        self.id = known or f"{name}-{uuid.uuid4().hex[:6]}"
        self._trackio = trackio
        self._run = trackio.init(
            project, name=self.id, resume="allow", config=config, embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, values: Mapping[str, float], facts: Mapping[str, str]) -> None:
        self._run.log(dict(values) | dict(facts))

    def close(self, succeeded: bool) -> None:
        self._trackio.finish()
