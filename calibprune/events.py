"""The progress of a run as typed events that travel through Python's logging.

`emit` logs an event where it happens; the log record carries it as `record.event`. The terminal, JSON lines, failure
files and metrics are logging handlers, and `logging.basicConfig(level=logging.INFO)` shows everything in a notebook.
Generators also yield what they emit, for callers that act on it. The driver re-emits the events of its workers, so
that the handlers of every process see each event once.
"""

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from calibprune.redact import one_line, plain

if TYPE_CHECKING:
    from calibprune.stage import Record

SET_ASIDE = "set aside"
MAX_CHARACTERS = 500
"""Maximum length of a loss's message."""
RECENT_STEPS = 50
"""Number of recent steps from which the pace is computed."""
TICK_SECONDS = 5.0
"""Minimum time between two ticks of `show_life`, in seconds."""
_log = logging.getLogger("calibprune")
Value = TypeVar("Value")


class Event:
    """Something that happened; `str()` describes it in one line without secrets."""


E = TypeVar("E", bound=Event)


def emit(event: E) -> E:
    """Logs the event and returns it, for `yield emit(...)`."""
    _log.info("%s", event, extra={"event": event})
    return event


class _LastTick:
    """The time of this process's last tick, in seconds of the monotonic clock."""

    at = -math.inf


def show_life() -> None:
    """Emits Tick from inside a call that takes long and cannot yield, at most once in TICK_SECONDS."""
    now = time.monotonic()
    if now - _LastTick.at >= TICK_SECONDS:
        _LastTick.at = now
        emit(Tick())


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
    """A driver begins to work on a stage, or resumes it."""

    run: str
    """Last part of the run folder's URL."""
    stage: str
    units: int
    """Units of work in the plan."""
    done: int
    """Units that were committed before."""
    noun: str = "units"
    """Name of the units in progress lines."""
    layers: int | None = None
    """Decoder layers to sweep through, for a stage whose progress is counted in them; None counts units."""

    def __str__(self) -> str:
        return f"{self.stage}: {self.done} of {self.units} {self.noun} are done"


@dataclass(frozen=True)
class StageEnded(Event):
    """The driver has left the stage that began most recently."""

    stage: str
    seconds: float
    finished: bool
    """Whether the stage is complete; False where an error or the user ended it early."""

    def __str__(self) -> str:
        return f"{self.stage}: {'done' if self.finished else 'stopped'} after {self.seconds:.0f} s"


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

    record: "Record"
    seconds: float | None = None
    """Time that the unit took, where its record does not have it."""

    def __str__(self) -> str:
        return f"{self.record.unit} is committed"


@dataclass(frozen=True)
class Resumed(Event):
    """The work continues after a loss. The lost process may have committed units without reporting them."""

    done: int
    """Number of committed units."""

    def __str__(self) -> str:
        return f"going on, {self.done} units are committed"


@dataclass(frozen=True)
class LayerEntered(Event):
    """A sweep is about to enter a decoder layer, or has left the last one (`layer == layers`)."""

    layer: int
    layers: int
    work: str = ""
    """Purpose of the sweep, such as `measuring the allocation`."""
    order: int = 1
    """Position among the sweeps of the work: 0 for a measurement that comes first, 1 for the work itself."""
    full: bool = True
    """Whether the layer is worked on; False where it is done already and merely swept through."""

    @property
    def position(self) -> tuple[int, int]:
        """Position in the work, which grows as the work proceeds."""
        return self.order, self.layer

    def __str__(self) -> str:
        return f"{self.work}{': ' if self.work else ''}layer {self.layer} of {self.layers}"


@dataclass(frozen=True)
class Lost(Event):
    """An engine, worker, node, task or unit was lost, whether it is retried or not; or the driver failed."""

    kind: str
    """Kind of thing that was lost: unit, engine, worker, node, driver; `memory`: a worker that ran out of its GPU's; or
    `set aside`: a unit that failed too often."""
    message: str
    units: tuple[str, ...] = ()
    """Units that were in progress there."""
    attempt: int | None = None
    node: str | None = None
    name: str = ""
    """Name of the thing that was lost, such as `worker 3`."""
    at: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    @property
    def in_words(self) -> str:
        """Description of the loss and its cause, in one line without credentials."""
        alone = self.kind in ("unit", SET_ASIDE)
        units = f"{'' if alone else ' with'} {', '.join(self.units)}" if self.units else ""
        place = f" on {self.node}" if self.node and self.node not in self.message else ""
        attempt = f", attempt {self.attempt}" if self.attempt else ""
        what = f"{self.name or self.kind}{units}{place}{attempt}"
        return one_line(f"{what}: {self.message}", 2 * MAX_CHARACTERS)

    def __str__(self) -> str:
        return self.in_words if self.kind in (SET_ASIDE, "driver") else f"lost {self.in_words}"


@dataclass(frozen=True)
class Tick(Event):
    """Nothing new, but the work continues. It is yielded, as a chance for the caller to stop the work, or emitted by
    `show_life` where nothing can be yielded."""

    def __str__(self) -> str:
        return "still at work"


def event_of(record: logging.LogRecord) -> Any:
    """Returns the event that a log record carries; None for any other log line."""
    return getattr(record, "event", None)


class EventHandler(logging.Handler):
    """A logging handler for events alone; what it raises is reported and never reaches the work."""

    def emit(self, record: logging.LogRecord) -> None:
        event = event_of(record)
        if event is None:
            return
        try:
            self.handle_event(event)
        except Exception:
            self.handleError(record)

    def handle_event(self, event: Event) -> None:
        """Handles an event; overridden by each handler."""


class Pace:
    """The current pace of a series of steps, and the time that the rest will take."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._times: deque[float] = deque([time.monotonic()], maxlen=RECENT_STEPS)

    def add(self) -> None:
        self.to(self.done + 1)

    def to(self, done: int) -> None:
        """Records that `done` steps are done by now."""
        for _ in range(min(done - self.done, RECENT_STEPS)):
            self._times.append(time.monotonic())
        self.done = done

    @property
    def seconds_each(self) -> float | None:
        """Seconds between the recent steps; None before the first."""
        if len(self._times) < 2:
            return None
        return (self._times[-1] - self._times[0]) / (len(self._times) - 1)

    @property
    def seconds_left(self) -> float | None:
        each = self.seconds_each
        return None if each is None else each * (self.total - self.done)


@contextlib.contextmanager
def listening(*handlers: logging.Handler) -> Iterator[None]:
    """Sends this process's events to the handlers until the block ends."""
    level = _log.level
    if not _log.isEnabledFor(logging.INFO):
        _log.setLevel(logging.INFO)
    for handler in handlers:
        _log.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            _log.removeHandler(handler)
        _log.setLevel(level)


def result_of(events: Generator[Any, None, Value]) -> Value:
    """Runs a generator of events to its end and returns its value."""
    while True:
        try:
            next(events)
        except StopIteration as ended:
            return ended.value
