"""The driver's output of events: a live bar on a terminal, plain lines in a log, or JSON lines for programs.

These are handlers of the logger `calibprune`. Names that come from files, servers or models are made harmless before
they are shown: they cannot control the terminal or reveal a secret.
"""

import datetime
import json
import logging
import sys
import threading
import time
from collections import Counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from calibprune.events import (
    SET_ASIDE,
    Event,
    LayerEntered,
    Lost,
    Pace,
    Resumed,
    StageBegun,
    StageEnded,
    Tick,
    UnitDone,
    event_of,
)
from calibprune.redact import one_line, plain
from calibprune.text import duration, pace

LOG_SECONDS = 15.0
"""Shortest time between two progress lines in a log."""
stop_asked = threading.Event()
"""Set when a signal asks to stop, since an exception raised in a signal handler may be lost in a library's callback."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


def set_up(log_format: str) -> None:
    """Sends the events of this process to the terminal, or as `json` lines to stderr."""
    logger = logging.getLogger("calibprune")
    for handler in [one for one in logger.handlers if isinstance(one, Terminal | JsonLines)]:
        logger.removeHandler(handler)
    logger.addHandler(JsonLines() if log_format == "json" else Terminal())
    logger.setLevel(logging.INFO)
    logger.propagate = False


def is_json() -> bool:
    handlers = logging.getLogger("calibprune").handlers
    return any(isinstance(handler, JsonLines) for handler in handlers)


class Terminal(logging.Handler):
    """Shows the running stage as a bar where stderr is a terminal, else as a progress line from time to time, and other
    lines as they are."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._steps: Steps | None = None
        self._stage = ""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._show(event_of(record), record)
        except Exception:
            self.handleError(record)

    def _show(self, event: Any, record: logging.LogRecord) -> None:
        match event:
            case StageBegun():
                self._stage, self._steps = event.stage, Steps(event)
            case StageEnded():
                self._end()
            case UnitDone() | LayerEntered():
                if self._steps is not None:
                    self._steps.advance(event)
            case Tick():
                pass
            case _:
                if isinstance(event, Resumed) and self._steps is not None:
                    self._steps.recount(event.done)
                prefix = f"{self._stage}: " if self._stage else ""
                console.print(f"{prefix}{plain(record.getMessage())}", markup=False)

    def _end(self) -> None:
        if self._steps is not None:
            self._steps.stop()
        self._stage, self._steps = "", None


class Steps:
    """The progress of one stage."""

    def __init__(self, begun: StageBegun) -> None:
        self._stage, self._noun = begun.stage, begun.noun
        self._by_layer = begun.layers is not None
        total, done = (begun.units, begun.done) if begun.layers is None else (begun.layers, 0)
        self._pace, self._printed_at = Pace(total, done), time.monotonic()
        self._tokens, self._since = 0, 0.0
        self._sweeps: list[LayerEntered] = []
        self._bar: Progress | None = None
        if console.is_terminal and total > done:
            self._bar = Progress(
                TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(),
                TextColumn(self._noun), TextColumn("{task.fields[detail]}"), TimeElapsedColumn(),
                console=console,
            )  # fmt: skip
            self._task = self._bar.add_task(self._stage, total=total, completed=done, detail="")
            self._bar.start()
        elif done:
            console.print(f"{self._stage}: {done} of {total} {self._noun} done already")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, event: UnitDone | LayerEntered) -> None:
        if isinstance(event, LayerEntered):
            if self._by_layer:
                self._to(self._layers_done(event), event.work)
        elif not self._by_layer:
            self._to(self._pace.done + 1, self._detail(event))

    def recount(self, done: int) -> None:
        """Corrects the progress: that many units are committed."""
        if not self._by_layer:
            self._pace.to(max(done, self._pace.done))

    def _layers_done(self, event: LayerEntered) -> int:
        """Returns the layers that all sweeps have left behind. A restarted sweep counts from its first layer."""
        if self._sweeps and self._sweeps[-1].work == event.work:
            self._sweeps.pop()
        self._sweeps.append(event)
        return sum(sweep.layer for sweep in self._sweeps)

    def _detail(self, event: UnitDone) -> str:
        """Returns the tokens per second where units have tokens, else the unit's name."""
        tokens = event.record.facts.get("tokens")
        if tokens is None or "finish_reasons" not in event.record.facts:
            return event.record.unit
        seconds = event.record.facts.get("seconds") or event.seconds or 0.0
        self._since = self._since or time.monotonic() - seconds
        self._tokens += tokens
        return f"{self._tokens / max(1e-9, time.monotonic() - self._since):.0f} tokens/s"

    def _to(self, done: int, detail: str) -> None:
        ended = done == self._pace.total != self._pace.done
        self._pace.to(done)
        each, left = self._pace.seconds_each, self._pace.seconds_left
        parts = [] if each is None or left is None else [pace(each), f"{duration(left)} left"]
        parts += [plain(detail)] if detail else []
        if self._bar is not None:
            self._bar.update(self._task, completed=done, detail=escape(", ".join(parts)))
        elif time.monotonic() - self._printed_at >= LOG_SECONDS or ended:
            self._printed_at = time.monotonic()
            line = f"{self._stage}: {done} of {self._pace.total} {self._noun}"
            console.print(", ".join([line, *parts]), markup=False)


class JsonLines(logging.StreamHandler):
    """Writes one JSON object per line: time, level, `event`, and the event's fields.

    `event` is `unit` (a unit was committed), `failure`, `perplexity` (the result), or `line` (a line for people).
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setLevel(logging.INFO)
        self._begun: StageBegun | None = None
        self._done = 0
        self._failures: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        event = event_of(record)
        if isinstance(event, StageBegun):
            self._begun, self._done, self._failures = event, event.done, Counter()
        if isinstance(event, StageEnded):
            self._begun = None
        if isinstance(event, Resumed):
            self._done = event.done
        if not isinstance(event, StageBegun | StageEnded | LayerEntered | Tick):
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        head = {"time": at.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        event = event_of(record)
        match event:
            case UnitDone():
                head |= {"event": "unit"} | self._tags() | self._unit(event)
            case Lost():
                self._failures.update(event.units if event.kind != SET_ASIDE else ())
                head |= {"event": "failure", "level": "warning"} | self._tags() | _loss(event)
            case Event():
                prefix = f"{self._begun.stage}: " if self._begun else ""
                head |= {"event": "line", "text": f"{prefix}{event}"}
            case _:
                fields = getattr(record, "fields", None)
                head |= fields or {"event": "line", "text": plain(record.getMessage())}
        return json.dumps(head, default=str)

    def _tags(self) -> dict[str, Any]:
        return {"run": self._begun.run, "stage": self._begun.stage} if self._begun else {}

    def _unit(self, event: UnitDone) -> dict[str, Any]:
        record = event.record
        self._done += 1
        return {
            "unit": record.unit,
            "attempt": 1 + self._failures[record.unit],
            "node": record.node or None,
            "seconds": _seconds(record.facts, event.seconds),
            "done": self._done,
            "units": self._begun.units if self._begun else None,
            "bytes": record.bytes,
            **_figures(record.facts),
        }


def _loss(lost: Lost) -> dict[str, Any]:
    return {
        "unit": ",".join(lost.units) or None, "attempt": lost.attempt, "node": lost.node,
        "kind": lost.kind, "message": one_line(lost.message),
    }  # fmt: skip


def _seconds(facts: dict[str, Any], measured: float | None) -> float | None:
    """Returns the seconds that a unit took: those in its record, all kinds of work together, else the driver's."""
    noted = facts.get("seconds", measured)
    if isinstance(noted, dict):
        noted = sum(noted.values())
    return None if noted is None else round(noted, 3)


def _figures(facts: dict[str, Any]) -> dict[str, Any]:
    """Returns a record's numbers and texts, without nested facts."""
    return {
        key: value
        for key, value in facts.items()
        if isinstance(value, int | float | str) and key not in ("seconds", "run", "stage")
    }
