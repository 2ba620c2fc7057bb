"""status: what a run has done, what is left and when it moved last, read from its folder alone."""

import time
from typing import Any

from calibprune import storage
from calibprune.errors import UserError
from calibprune.run import Stage
from jobs.progress import duration

STAGES = ("generate", "curate", "prune", "evaluate")


def stage_status(stage: Stage) -> dict[str, Any]:
    """Units done of all, seconds a unit and seconds left, and seconds since the last commit."""
    if not stage.planned:
        return {"state": "not started"}
    units = stage.read_plan()["units"]
    if stage.finished:
        return {"done": len(units), "units": len(units), "state": "done"}
    done = stage.done(units).values()
    status: dict[str, Any] = {"done": len(done), "units": len(units)}
    times = sorted(record.finished_at for record in done)
    if times:
        status["since_last_seconds"] = time.time() - times[-1]
    if len(times) > 1:
        status["seconds_each"] = (times[-1] - times[0]) / (len(times) - 1)
        status["left_seconds"] = status["seconds_each"] * (len(units) - len(done))
    return status | {"state": "unfinished"}


def describe(url: str) -> list[str]:
    """One line a stage. Raises UserError when there is no run at the URL."""
    if not storage.exists(storage.join(url, "run.json")):
        raise UserError(f"there is no run at {url}")
    lines = []
    for name in STAGES:
        status = stage_status(Stage(storage.join(url, name)))
        text = f"{name:<9} {status['state']}"
        if "units" in status:
            text += f", {status['done']} of {status['units']} units"
        if "seconds_each" in status:
            text += (
                f", {status['seconds_each']:.3g} s each, {duration(status['left_seconds'])} left"
            )
        if "since_last_seconds" in status:
            text += f", last commit {duration(status['since_last_seconds'])} ago"
        lines.append(text)
    report = storage.join(url, "report", "index.html")
    lines.append(f"report    {report if storage.exists(report) else 'not made yet'}")
    return lines
