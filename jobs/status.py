"""status: the state of a run, read from its folder alone, which may be damaged, half-written, or not a run at all.

Only run.json, the plans, a few failures and the lease are read. Done records are not read but listed, with the times
at which they were written, since a stage may have very many.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from calibprune import lease, storage
from calibprune.errors import UserError
from calibprune.events import SET_ASIDE
from calibprune.failures import read_failures
from calibprune.redact import one_line
from calibprune.retry import redacted_url
from calibprune.stage import Stage
from calibprune.text import duration, pace
from jobs.stages import STAGES

if TYPE_CHECKING:
    from rich.table import Table

WINDOW_SECONDS, WINDOW_UNITS = 600.0, 20
"""The pace is that of the commits in the last ten minutes of work, or of the last 20 where these took longer."""
PAUSE_FACTOR, PAUSE_SECONDS = 10.0, 60.0
"""Times the usual gap between two commits, and seconds, above both of which no driver worked in between."""
FAILURES_READ = 50
MAX_NAMED = 5
"""Maximum number of units that a line names."""
MAX_CHARACTERS = 300
"""Maximum characters of the last failure."""
Status = dict[str, Any]


class NoRun(UserError):
    """There is no run at a URL, or there is none yet."""


def run_status(url: str) -> Status:
    """Reads the state of a run. Raises NoRun when there is none; what cannot be read becomes a message in its place."""
    url = url.rstrip("/")
    if not storage.exists(storage.join(url, "run.json")):
        raise NoRun(f"there is no run at {url}")
    opened, unneeded = _opened(url)
    driver = _guarded(lambda: lease.read_holder(url))
    alive = driver is not None and not isinstance(driver, str) and driver.alive
    stages: dict[str, Status] = {}
    for name in STAGES:
        if name == "report":
            continue
        stage = Stage(storage.join(url, *name.split("/")))
        status = _guarded(lambda stage=stage: stage_status(stage, opened, alive))
        if isinstance(status, str):
            status = {"state": "unreadable", "trouble": status}
        if status["state"] == "not started" and name in unneeded:
            status["state"] = "not needed"
        if "/" not in name or status["state"] in ("unfinished", "done", "unreadable"):
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
        "run": redacted_url(url),
        "finished": finished,
        "elapsed_seconds": max(0.0, end - begun) if begun and end else None,
        "driver": {"trouble": driver} if isinstance(driver, str) else driver and asdict(driver),
        "stages": stages,
        "report": page if made else None,
    }


def stage_status(stage: Stage, opened_at: float | None = None, alive: bool = False) -> Status:
    """Reads the state of a stage: units, pace, time left, failures.

    `opened_at` is when the last driver began, `alive` whether it still works. Durations are in seconds, `..._at` in
    seconds since the epoch. Raises CorruptionError for a damaged plan.
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
    """Returns the recent seconds between two commits, without the pauses between two drivers; `times` are sorted.

    Uses the commits of the current driver where it has two or more, else those of earlier drivers. While a driver
    works (`now` is given), silence since the last commit counts too, since units often come in bursts.
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
    """Returns how many failures there were, the last one, and the units that are still set aside, if any."""
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
    """Returns whether a unit was committed without data because it had failed too often."""
    try:
        return "set_aside" in stage.record(unit).facts
    except (UserError, FileNotFoundError):
        return False


def _opened(url: str) -> tuple[float | None, set[str]]:
    """Returns (when the current or last driver began, stages that the run does not need)."""
    try:
        content = storage.read_json(storage.join(url, "run.json"))
        opened, unneeded = content.get("opened_at"), set(map(str, content.get("unneeded", ())))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None, set()
    return (opened if isinstance(opened, int | float) else None), unneeded


def _guarded(read: Any) -> Any:
    """Returns what `read` does, or a message where it fails. Raises UserError where access is denied."""
    try:
        return read()
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


def show(url: str, every: float | None, as_json: bool) -> None:
    """Prints the state of a run; with `every` repeatedly, with that many seconds between, until all stages are done.

    Repeatedly on a terminal, it is a table that is redrawn in place; otherwise lines or JSON. Raises NoRun where there
    is no run, unless `every` is given, which waits for one, and UserError for a URL that cannot be a run's.
    """
    if every is not None and sys.stdout.isatty() and not as_json:
        _show_in_place(url, every)
        return
    for status, trouble in _statuses(url, every):
        if as_json:
            print(json.dumps(status), flush=True)
        else:
            print("\n".join([*describe(status), *filter(None, [trouble])]), flush=True)


def _statuses(url: str, every: float | None) -> Iterator[tuple[Status, str]]:
    """Yields (status, trouble), where `trouble` is why the status could not be refreshed, if so."""
    status, trouble = _first_status(url, every), ""
    while True:
        yield status, trouble
        if every is None or status["finished"]:
            return
        time.sleep(every)
        try:
            status, trouble = run_status(url), ""
        except (OSError, UserError) as error:
            trouble = f"cannot read the run: {one_line(error)}"


def _first_status(url: str, every: float | None) -> Status:
    """Reads the state of a run; with `every` it waits for a run that does not exist yet, such as that of a new job."""
    waiting = False
    while True:
        try:
            return run_status(url)
        except NoRun as error:
            if every is None:
                raise
            if not waiting:
                print(f"{error} yet, waiting for it", file=sys.stderr, flush=True)
            waiting = True
            time.sleep(every)


def _show_in_place(url: str, every: float) -> None:
    from rich.console import Console, Group
    from rich.live import Live

    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        for status, trouble in _statuses(url, every):
            below = [*_below(status), trouble]
            live.update(Group(_table(status), *map(escape, below)), refresh=True)


def describe(status: Status) -> list[str]:
    """Describes a run: one line per stage, then the report, the driver, the last failure and the time taken."""
    stages = {name: one for name, one in status["stages"].items() if name != "report"}
    lines = [_printable(f"{name:<9} {_stage_line(one)}") for name, one in stages.items()]
    return [*lines, f"report    {status['report'] or 'not made yet'}", *_below(status)]


def _below(status: Status) -> list[str]:
    """Describes what a status has besides the stages."""
    lines = [f"driver    {_driver(status)}"]
    last = [one["last_failure"] for one in status["stages"].values() if "last_failure" in one]
    if last:
        newest = min(last, key=lambda failure: failure["age_seconds"])
        ago = duration(newest["age_seconds"])
        lines.append(f"last failure {ago} ago: {newest['text'][:MAX_CHARACTERS]}")
    if status["elapsed_seconds"] is not None:
        lines.append(f"elapsed   {duration(status['elapsed_seconds'])}")
    return list(map(_printable, lines))


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in line)


def _stage_line(one: Status) -> str:
    parts = [one["state"]]
    if "units" in one:
        parts.append(f"{one['done']} of {one['units']} units")
    if "seconds_each" in one:
        parts += [pace(one["seconds_each"]), f"{duration(one['left_seconds'])} left"]
    if "since_last_seconds" in one and one["state"] != "done":
        parts.append(f"last commit {duration(one['since_last_seconds'])} ago")
    if one.get("failures"):
        parts.append(f"{one['failures']} failure{'s' * (one['failures'] > 1)}")
    if "set_aside" in one:
        parts.append(f"set aside: {_named(one['set_aside'])}")
    if "trouble" in one:
        parts.append(one["trouble"])
    return ", ".join(parts)


def _named(units: list[str]) -> str:
    more = len(units) - MAX_NAMED
    return " ".join(units[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _driver(status: Status) -> str:
    driver = status["driver"]
    if driver is None:
        return "none" if status["finished"] else "none: the same command resumes the run"
    if "trouble" in driver:
        return driver["trouble"]
    silent = driver["silent_seconds"]
    sign = "" if silent is None else f", last sign of life {duration(silent)} ago"
    process = f"process {driver['pid']} on {driver['host']} since {driver['since']}{sign}"
    return process if driver["alive"] else f"gone: {process}; the same command resumes the run"


def _table(status: Status) -> "Table":
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "state", "", "units", "pace", "left", "last commit", "failures"):
        table.add_column(heading, justify="left" if heading in ("stage", "state", "") else "right")
    for name, one in status["stages"].items():
        units = "units" in one
        table.add_row(
            name,
            one["state"],
            ProgressBar(total=one["units"], completed=one["done"], width=20) if units else "",
            f"{one['done']} of {one['units']}" if units else "",
            pace(one["seconds_each"]) if "seconds_each" in one else "",
            duration(one["left_seconds"]) if "left_seconds" in one else "",
            f"{duration(one['since_last_seconds'])} ago" if "since_last_seconds" in one else "",
            str(one.get("failures") or ""),
        )
    return table
