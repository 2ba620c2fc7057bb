"""What happens while a run works, as typed events that travel through Python's logging.

`emit` logs an event where it happens; the log record carries it as `record.event`. The terminal, JSON lines, failure
files and metrics are logging handlers, and `logging.basicConfig(level=logging.INFO)` shows everything in a notebook.
A generator yields what it emits, for callers that act on it. The driver emits the events of its workers again, so that
the handlers of every process see each event once.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from calibprune.redact import one_line, plain
from calibprune.stage import Record

SET_ASIDE = "set aside"
MOST_CHARACTERS = 500
"""Longest message that is kept of a loss."""
_log = logging.getLogger("calibprune")


class Event:
    """Something that happened; `str()` describes it in one line without secrets."""

    level: ClassVar[int] = logging.INFO


E = TypeVar("E", bound=Event)


def emit(event: E) -> E:
    """Logs the event and returns it, for `yield emit(...)`."""
    _log.log(event.level, "%s", event, extra={"event": event})
    return event


def note(text: str) -> None:
    """Logs a line for people."""
    emit(Note(text))


@dataclass(frozen=True)
class Note(Event):
    """A line for people."""

    text: str

    def __str__(self) -> str:
        return plain(self.text)


@dataclass(frozen=True)
class StageBegun(Event):
    """A driver begins to work on a stage, or goes on with it."""

    run: str
    """Last part of the run folder's URL."""
    stage: str
    units: int
    """Units of work in the plan."""
    done: int
    """Units that were committed before."""
    noun: str = "units"
    """What the units are called in progress lines."""
    layers: int | None = None
    """Decoder layers to sweep through, for a stage whose progress is counted in them; None counts units."""

    def __str__(self) -> str:
        return f"{self.stage}: {self.done} of {self.units} {self.noun} are done"


@dataclass(frozen=True)
class StageEnded(Event):
    """The driver has left the stage that began last, whether it finished or failed."""

    level = logging.DEBUG
    stage: str

    def __str__(self) -> str:
        return f"{self.stage}: ended"


@dataclass(frozen=True)
class StageSkipped(Event):
    """A stage has nothing to do."""

    stage: str
    reason: str

    def __str__(self) -> str:
        return plain(f"{self.stage}: {self.reason}")


@dataclass(frozen=True)
class UnitDone(Event):
    """A unit of work is committed."""

    record: Record
    seconds: float | None = None
    """Time that the unit took, where its record does not say."""

    def __str__(self) -> str:
        return f"{self.record.unit} is committed"


@dataclass(frozen=True)
class LayerEntered(Event):
    """A sweep is about to enter a decoder layer, or has left the last one (`layer == layers`)."""

    layer: int
    layers: int
    work: str = ""
    """What the sweep is for, such as `measuring the allocation`."""
    order: int = 0
    """Place of this sweep among the sweeps of one unit of work: later sweeps have larger numbers."""
    full: bool = True
    """False where the layer is merely swept through, because it is done already."""

    @property
    def position(self) -> tuple[int, int]:
        """Grows as the work goes on."""
        return self.order, self.layer

    def __str__(self) -> str:
        return f"{self.work}{': ' if self.work else ''}layer {self.layer} of {self.layers}"


@dataclass(frozen=True)
class Lost(Event):
    """An engine, worker, node, task or unit was lost, to be made again or not; or the driver failed."""

    kind: str
    """What was lost: unit, engine, worker, node, driver; or `set aside`, for a unit that failed too often."""
    message: str
    units: tuple[str, ...] = ()
    """Units that were under way there."""
    attempt: int | None = None
    node: str | None = None
    name: str = ""
    """Which one of its kind, such as `worker 3`."""
    at: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    @property
    def in_words(self) -> str:
        """One line without credentials."""
        alone = self.kind in ("unit", SET_ASIDE)
        units = f"{'' if alone else ' with'} {', '.join(self.units)}" if self.units else ""
        place = f" on {self.node}" if self.node and self.node not in self.message else ""
        attempt = f", attempt {self.attempt}" if self.attempt else ""
        what = f"{self.name or self.kind}{units}{place}{attempt}"
        return one_line(f"{what}: {self.message}", 2 * MOST_CHARACTERS)

    def __str__(self) -> str:
        return self.in_words if self.kind in (SET_ASIDE, "driver") else f"lost {self.in_words}"


@dataclass(frozen=True)
class Queued(Event):
    """The state of a work queue, about once a second."""

    level = logging.DEBUG
    waiting: int
    """Units that no actor has yet."""
    running: int
    """Units under way on an actor."""
    ready: int
    """Actors that take units."""

    def __str__(self) -> str:
        return f"{self.waiting} units waiting, {self.running} under way, {self.ready} actors ready"


@dataclass(frozen=True)
class Tick(Event):
    """Nothing new for about a second: a chance for the caller to stop. It is yielded, never logged."""


def event_of(record: logging.LogRecord) -> Any:
    """The event that a log record carries; None for any other log line."""
    return getattr(record, "event", None)
