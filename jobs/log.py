"""The driver's log: lines for people, or with `--log-format json` one JSON object a line.

`event` is `unit` (one was committed), `failure`, or `line` (what people would read). Both go through Python's logging,
loggers `calibprune.units` and `calibprune.log`, so that a program around it can take them elsewhere.
"""

import datetime
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

from calibprune.redact import one_line, plain

if TYPE_CHECKING:
    from calibprune.failures import Failure

_units = logging.getLogger("calibprune.units")
_lines = logging.getLogger("calibprune.log")


class JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, event and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        head = {"time": at.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        fields = getattr(record, "fields", None) or {"event": "line", "text": record.getMessage()}
        return json.dumps(head | fields, default=str)


def choose(name: str) -> None:
    """Sets the format. The human lines are printed by jobs/progress.py unless `is_json()`."""
    logger = logging.getLogger("calibprune")
    for handler in [one for one in logger.handlers if isinstance(one.formatter, JsonLines)]:
        logger.removeHandler(handler)
    if name == "json":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        logger.addHandler(handler)
    logger.propagate = name != "json"
    logger.setLevel(logging.INFO)


def is_json() -> bool:
    handlers = logging.getLogger("calibprune").handlers
    return any(isinstance(handler.formatter, JsonLines) for handler in handlers)


def line(text: str, level: int = logging.INFO) -> None:
    """What is told to people."""
    _lines.log(level, "%s", plain(text))


def event(name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Something that happened to a unit, with its fields; shown only as JSON."""
    known = {"event": name} | fields
    summary = " ".join(f"{key}={value}" for key, value in known.items() if value is not None)
    _units.log(level, "%s", summary, extra={"fields": known})


def failure(tags: dict[str, str], failed: "Failure") -> None:
    event(
        "failure", logging.WARNING if is_json() else logging.INFO,
        **tags, unit=",".join(failed.units) or None, attempt=failed.attempt, node=failed.node,
        kind=failed.kind, message=one_line(failed.message),
    )  # fmt: skip
