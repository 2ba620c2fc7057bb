"""How a run stands, read from its folder alone, which may be damaged, half-written, or somebody else's.

Of a stage with many units only the names of the done records are listed, with the times at which they were written:
none is read. What is read are the plan, a few failures and the lease.
"""

import statistics
import time
from dataclasses import asdict
from typing import Any

from calibprune import lease, storage
from calibprune.errors import UserError
from calibprune.failures import SET_ASIDE, read_failures
from calibprune.redact import one_line
from calibprune.retry import shown
from calibprune.stage import Stage

STAGES = ("generate", "curate", "curate/analysis", "prune", "evaluate")
WINDOW_SECONDS, WINDOW_UNITS = 600.0, 20
"""The pace is that of the commits of the last ten minutes of work, or of the last 20 where they took longer."""
PAUSE_FACTOR, PAUSE_SECONDS = 10.0, 60.0
"""Between two commits so many times the usual distance, and so long, nobody worked."""
FAILURES_READ = 50
Status = dict[str, Any]


def run_status(url: str) -> Status:
    """How the run stands. Raises UserError when there is none; what cannot be read of it stands in its place."""
    url = url.rstrip("/")
    if not storage.exists(storage.join(url, "run.json")):
        raise UserError(f"there is no run at {url}")
    opened, unneeded = _opened(url)
    driver = _guarded(lambda: lease.look(url))
    alive = driver is not None and not isinstance(driver, str) and driver.alive
    stages: dict[str, Status] = {}
    for name in STAGES:
        stage = Stage(storage.join(url, *name.split("/")))
        status = _guarded(lambda stage=stage: stage_status(stage, opened, alive))
        if isinstance(status, str):
            status = {"state": "unreadable", "trouble": status}
        if status["state"] == "not started" and name in unneeded:
            status["state"] = "not needed"
        if status["state"] != "not started" or name != "curate/analysis":
            stages[name] = status
    at_work = next((s for s in stages.values() if s["state"] == "unfinished"), None)
    if alive and at_work is not None:
        at_work["state"] = "running"
    page = storage.join(url, "report", "index.html")
    made = _guarded(lambda: storage.exists(page)) is True
    stages["report"] = {"state": "done" if made else "not started"}
    finished = all(one["state"] in ("done", "not needed") for one in stages.values())
    begun = min((s["begun_at"] for s in stages.values() if s.get("begun_at")), default=opened)
    moved = max((s["last_at"] for s in stages.values() if s.get("last_at")), default=None)
    end = time.time() if alive and not finished else moved
    return {
        "run": shown(url),
        "finished": finished,
        "elapsed_seconds": max(0.0, end - begun) if begun and end else None,
        "driver": {"trouble": driver} if isinstance(driver, str) else driver and asdict(driver),
        "stages": stages,
        "report": page if made else None,
    }


def stage_status(stage: Stage, opened_at: float | None = None, alive: bool = False) -> Status:
    """State, units, pace, time left, failures. `opened_at`: when the last driver began; `alive`: it is at work.

    Seconds are seconds, `..._at` seconds since the epoch. Raises CorruptionError for a damaged plan.
    """
    if not stage.planned:
        return {"state": "not started"} | _failures(stage)
    plan = stage.read_plan()
    units, begun = set(map(str, plan["units"])), plan.get("created_at")
    written = storage.times(storage.join(stage.url, "_done"))
    done = {name.removesuffix(".json"): at for name, at in written.items() if name[-5:] == ".json"}
    done = {unit: at for unit, at in done.items() if unit in units}
    times = sorted(at for at in done.values() if at is not None)
    status: Status = {
        "state": "done" if stage.finished else "unfinished",
        "done": len(done),
        "units": len(units),
        "begun_at": begun if isinstance(begun, int | float) else None,
        "last_at": times[-1] if times else None,
    } | _failures(stage, done)
    if times:
        status["since_last_seconds"] = max(0.0, time.time() - times[-1])
    now = time.time() if alive else None
    if status["state"] == "unfinished" and (each := seconds_each(times, opened_at, now)):
        status["seconds_each"] = each
        status["left_seconds"] = each * (len(units) - len(done))
    return status


def seconds_each(
    times: list[float], opened_at: float | None = None, now: float | None = None
) -> float | None:
    """The distance of two commits in the recent past, pauses between two drivers left out; `times` sorted.

    Commits of the present driver where there are two of them, else of the drivers before. `now`, while one is at work:
    then silence since the last commit counts too, for units often come in bursts.
    """
    present = [at for at in times if opened_at is not None and at >= opened_at]
    own = len(present) > 1
    before = [at for at in times if opened_at is None or at < opened_at]
    times = present if own else before
    first, distances = len(times) - 1, list[float]()
    while first > 0:
        distance = times[first] - times[first - 1]
        recent = times[-1] - times[first - 1] <= WINDOW_SECONDS or len(distances) < WINDOW_UNITS - 1
        usual = statistics.median(distances) if distances else distance
        if not recent or (not own and distance > max(PAUSE_SECONDS, PAUSE_FACTOR * usual)):
            break
        distances.append(distance)
        first -= 1
    if not distances:
        return None
    silent = (now - times[first]) / (len(distances) + 1) if now is not None and own else 0.0
    return max(sum(distances) / len(distances), silent)


def _failures(stage: Stage, done: dict[str, Any] | None = None) -> Status:
    """How many there were, the last one, and the units that are set aside now, if any."""
    count, failures = read_failures(stage.url, FAILURES_READ)
    if not count:
        return {"failures": 0}
    named = sorted({unit for one in failures if one.kind == SET_ASIDE for unit in one.units})
    aside = [unit for unit in named if unit not in (done or {}) or _left_out(stage, unit)]
    found: Status = {"failures": count} | ({"set_aside": aside} if aside else {})
    if failures:
        last = failures[0]
        age = max(0.0, time.time() - last.at)
        found["last_failure"] = asdict(last) | {"text": last.in_words, "age_seconds": age}
    return found


def _left_out(stage: Stage, unit: str) -> bool:
    """Whether a unit was committed without data since it had failed too often."""
    try:
        return "set_aside" in stage.record(unit).facts
    except (UserError, FileNotFoundError):
        return False


def _opened(url: str) -> tuple[float | None, set[str]]:
    """When the present driver, or the last one, began; and the stages that the configuration does without."""
    try:
        content = storage.read_json(storage.join(url, "run.json"))
        config, opened = content["config"], content.get("opened_at")
        pool = config["prune"]["pool"] is not None
        own = any(
            one["type"] == "generated" and one.get("path") is None
            for one in config["curate"]["sources"]
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None, set()
    unneeded = {"generate", "curate"} if pool else (set() if own else {"generate"})
    return (opened if isinstance(opened, int | float) else None), unneeded


def _guarded(look: Any) -> Any:
    """What `look` finds, or in words why it cannot. Raises UserError where access is denied."""
    try:
        return look()
    except UserError as error:
        if "access denied" in str(error):
            raise
        return one_line(error)
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        return one_line(f"{type(error).__name__}: {error}")
