"""status: how a run stands, told once or again and again until all stages are done."""

import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape

from calibprune.errors import UserError
from calibprune.redact import one_line
from jobs.progress import duration, pace
from jobs.run_status import Status, run_status

if TYPE_CHECKING:
    from rich.table import Table

MOST_NAMED = 5


def show(url: str, every: float | None, as_json: bool) -> None:
    """Prints how the run stands; with `every` again after so many seconds, until all stages are done.

    On a terminal a table in place, else lines, or JSON. Raises UserError where there is no run.
    """
    if every is not None and sys.stdout.isatty() and not as_json:
        _show_in_place(url, every)
        return
    for status, trouble in _looks(url, every):
        lines = [json.dumps(status)] if as_json else [*describe(status), *filter(None, [trouble])]
        print("\n".join(lines), flush=True)


def _looks(url: str, every: float | None) -> Iterator[tuple[Status, str]]:
    """What is seen, and why it is no longer the latest where a store gives trouble for the time being."""
    status, trouble = run_status(url), ""  # where there is no run, it is said at once
    while True:
        yield status, trouble
        if every is None or status["finished"]:
            return
        time.sleep(every)
        try:
            status, trouble = run_status(url), ""
        except (OSError, UserError) as error:
            trouble = f"cannot look: {one_line(error)}"


def _show_in_place(url: str, every: float) -> None:
    from rich.console import Console, Group
    from rich.live import Live

    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        for status, trouble in _looks(url, every):
            below = [
                line for line in describe(status) if line.split(" ")[0] not in status["stages"]
            ]
            live.update(Group(_table(status), *map(escape, [*below, trouble])), refresh=True)


def describe(status: Status) -> list[str]:
    """One line a stage, then the driver, the last failure, the time taken and the report."""
    lines = [f"{name:<9} {_stage_line(one)}" for name, one in status["stages"].items()]
    lines[-1] = f"report    {status['report'] or 'not made yet'}"
    lines.append(f"driver    {_driver(status)}")
    last = [one["last_failure"] for one in status["stages"].values() if "last_failure" in one]
    if last:
        newest = min(last, key=lambda failure: failure["age_seconds"])
        ago = duration(newest["age_seconds"])
        lines.append(f"last failure {ago} ago: {newest['text'][:300]}")
    if status["elapsed_seconds"] is not None:
        lines.append(f"elapsed   {duration(status['elapsed_seconds'])}")
    return ["".join(c if c.isprintable() else "?" for c in line) for line in lines]


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
    more = len(units) - MOST_NAMED
    return " ".join(units[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _driver(status: Status) -> str:
    driver = status["driver"]
    if driver is None:
        return "none" if status["finished"] else "none: the same command resumes the run"
    if "trouble" in driver:
        return driver["trouble"]
    silent = driver["silent_seconds"]
    sign = "" if silent is None else f", last sign of life {duration(silent)} ago"
    who = f"process {driver['pid']} on {driver['host']} since {driver['since']}{sign}"
    return who if driver["alive"] else f"gone: {who}; the same command resumes the run"


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
