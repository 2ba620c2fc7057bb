"""Units of work queued over a crew of actors: bounded in flight, results in completion order, dead actors replaced.

The driver sees done records only. A unit that fails too often is set aside while all others are still done.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from calibprune.errors import UserError
from calibprune.events import SET_ASIDE, Event, Lost, Tick, UnitDone, emit
from calibprune.redact import one_line
from cluster.actors import death, node_died
from cluster.crew import Crew, Member
from cluster.metrics import QueueMetrics

Batch = tuple[str, ...]
"""Names of units that an actor makes one after another in one call."""
HANG_FACTOR, HANG_FLOOR_SECONDS = 10.0, 300.0
"""Multiple of the longest unit so far after which a unit is late, and the least such limit in seconds.

The floor leaves time to wait for a store that fails, while a unit is read and while it is committed.
"""
FIRST_SECONDS = 3600.0
"""Least time limit of a unit until one of its size is done, in seconds, unless the caller knows better."""
SOURCE_SECONDS = 1800.0
"""Longest silence of work that reads a source from its start."""
MAX_NODE_LOSSES = 10
"""Times a unit may be lost together with its node without blame; once more, and the unit may be what kills nodes."""
MAX_FAILING_UNITS, MAX_FAILING_UNITS_AT_FIRST = 20, 2
"""Units that may fail one after another, and as long as none has succeeded; with more there is a common cause."""
POLL_SECONDS = 1.0


class TooManyFailures(RuntimeError):
    """Too many attempts failed one after another for the units to be to blame."""


def _alike(unit: str) -> float:
    """Returns the work of a unit where all have the same size."""
    return 1.0


class Patience:
    """The time that a unit may take before its actor is treated as hung.

    The limit is the one given, or ten times the longest unit so far, which begins as `longest` seconds. Since a small
    unit does not predict larger ones, it is at least `first_seconds` until a unit of as much `work` is done. With
    `final`, a late unit ends all work: a retry would not help.
    """

    def __init__(
        self,
        given: float | None = None,
        longest: float = 0.0,
        first_seconds: float = FIRST_SECONDS,
        work: Callable[[str], float] = _alike,
        final: bool = False,
    ) -> None:
        self._given, self._longest, self._first, self._work = given, longest, first_seconds, work
        self.final = final
        self._most = 0.0
        """Work of the largest unit that is done."""

    def learn(self, unit: str, seconds: float) -> None:
        self._longest = max(self._longest, seconds)
        self._most = max(self._most, self._work(unit))

    def seconds(self, unit: str) -> float:
        measured = max(HANG_FLOOR_SECONDS, HANG_FACTOR * self._longest)
        known = self._most and self._work(unit) <= self._most
        return self._given or (measured if known else max(measured, self._first))


def patience_with_source() -> Patience:
    """Returns the patience with work that reads a source from its start: half an hour of silence ends it."""
    return Patience(SOURCE_SECONDS, final=True)


@dataclass
class Call:
    """A batch in progress on an actor."""

    member: Member
    left: list[str]
    """Units that are not done yet; the first is in progress."""
    since: float
    """Time of the call's last event, or of its start, by time.monotonic()."""


def work_through(
    crew: Crew,
    method: str,
    batches: Iterable[Sequence[str] | None],
    *,
    in_flight: int = 1,
    attempts: int = 3,
    may_fail: int = 0,
    proven: bool = False,
    patience: Patience | None = None,
    fatal: tuple[type[Exception], ...] = (),
    poll_seconds: float = POLL_SECONDS,
) -> Iterator[Event]:
    """Calls the generator `method(units)` for every batch; emits and yields UnitDone and Lost, with Tick in between.

    `batches` is polled about once a second; it yields None while its next batch is not ready.

    An actor that dies, stays silent for longer than `patience` allows, or whose unit raises one of the `fatal` errors
    is replaced, and its units are queued again. Any other error of a unit counts as a failure of that unit alone.
    After `attempts` failures a unit is set aside, which is a Lost event of that kind; `may_fail` units may be.

    Raises TooManyFailures when many more than these fail in a row (fewer suffice until one has succeeded, unless
    `proven` means that earlier work did), a unit's UserError at once, and TimeoutError where patience is final.
    """
    work = _Work(
        crew, method, Queue(batches, attempts), in_flight, attempts, may_fail, proven,
        patience or Patience(), fatal, poll_seconds,
    )  # fmt: skip
    yield from work.events()


@dataclass
class _Work:
    """One call of `work_through`: its arguments and its state."""

    crew: Crew
    method: str
    queue: "Queue"
    in_flight: int
    attempts: int
    may_fail: int
    proven: bool
    patience: Patience
    fatal: tuple[type[Exception], ...]
    poll_seconds: float
    running: dict[Any, Call] = field(default_factory=dict)
    in_a_row: int = 0
    """Failures since the last unit that was done."""

    def events(self) -> Iterator[Event]:
        crew, queue = self.crew, self.queue
        metrics = QueueMetrics(crew.label) if crew.label else None
        while queue or self.running:
            queue.refill()
            crew.fill(len(queue) + len(self.running))
            self._assign()
            starting = crew.pending()
            for reference in _ready([*self.running, *starting], self.poll_seconds):
                if (member := starting.get(reference)) is not None:
                    crew.advance(member)
                elif (
                    call := self.running.get(reference)
                ) is not None:  # otherwise lost a moment ago
                    yield from self._receive(reference, call)
            yield from self._end_overdue()
            if metrics:
                metrics.record(len(queue), len(self.running), len(crew.ready))
            yield Tick()

    def _assign(self) -> None:
        """Hands out batches, the least busy actors first, until all have `in_flight` or none is left."""
        busy: dict[Member, list[str]] = {member: [] for member in self.crew.ready}
        calls = Counter(call.member for call in self.running.values())
        for call in self.running.values():
            busy[call.member].extend(call.left)
        for depth in range(self.in_flight):
            for member, here in busy.items():
                if calls[member] > depth or (batch := self.queue.take(here)) is None:
                    continue
                stream = getattr(member.handle, self.method).options(num_returns="streaming")
                call = Call(member, list(batch), time.monotonic())
                self.running[stream.remote(batch)] = call
                here.extend(batch)
                calls[member] += 1

    def _receive(self, stream: Any, call: Call) -> Iterator[Event]:
        """Handles the next event of a call, or its end."""
        try:
            event: Any = ray.get(next(stream))
        except StopIteration:
            if call.left:
                cause = RuntimeError(f"the work ended without {', '.join(call.left)}")
                yield from self._fail(stream, call, cause)
            else:
                del self.running[stream]
        except RayTaskError as error:
            cause = error.cause or error
            if isinstance(cause, self.fatal):
                yield from self._lose(call.member, cause)
            else:
                yield from self._fail(stream, call, cause)
        except RayError as error:  # the actor is dead, or out of reach for good
            yield from self._lose(call.member, death(error), counted=not node_died(error))
        else:
            now = time.monotonic()
            if isinstance(event, UnitDone):
                seconds = now - call.since
                call.left.remove(event.record.unit)
                self.patience.learn(event.record.unit, seconds)
                self.in_a_row, self.proven = 0, True
                yield emit(UnitDone(event.record, seconds))
            call.since = now

    def _end_overdue(self) -> Iterator[Event]:
        now = time.monotonic()
        late = {
            call.member: limit
            for call in self.running.values()
            if call.left and now - call.since > (limit := self.patience.seconds(call.left[0]))
        }
        for member, limit in late.items():
            if self.patience.final:
                raise TimeoutError(f"the work has been silent for {limit:.0f} s")
            cause = TimeoutError(f"no result within {limit:.0f} s (see shard_timeout_seconds)")
            yield from self._lose(member, cause)
        for member in list(self.crew.overdue()):
            self.crew.start_failed(member, TimeoutError("it took too long"))

    def _lose(self, member: Member, cause: Exception, counted: bool = True) -> Iterator[Event]:
        """Replaces an actor. The unit in progress in each of its calls is suspected of having killed it."""
        calls = [stream for stream, call in self.running.items() if call.member is member]
        self.crew.dismiss(member)
        suspects = []
        for call in map(self.running.pop, calls):
            suspects += call.left[:1]
            self.queue.put_back(call.left[1:])
        kind = self.crew.kind if counted else "node"
        yield from self._failed(suspects, cause, member, kind, counted)

    def _fail(self, stream: Any, call: Call, cause: Exception) -> Iterator[Event]:
        """Ends a call whose unit in progress failed; its actor stays."""
        del self.running[stream]
        self.queue.put_back(call.left[1:])
        yield from self._failed(call.left[:1], cause, call.member, "unit", True)

    def _failed(
        self, units: list[str], cause: Exception, member: Member, kind: str, counted: bool
    ) -> Iterator[Event]:
        if isinstance(cause, UserError):
            raise cause from None
        reason = one_line(cause)
        attempt = 1 + max(map(self.queue.failures, units), default=0)
        name = "" if kind == "unit" else f"{self.crew.kind} {member.slot}"
        yield emit(Lost(kind, reason, tuple(units), attempt, member.node, name))
        if not self.queue.failed(units, counted):
            return
        (unit,) = units
        if self.queue.failures(unit) >= self.attempts:
            yield emit(Lost(SET_ASIDE, reason, (unit,), self.attempts))
        self.in_a_row += 1
        most = self.may_fail + (MAX_FAILING_UNITS if self.proven else MAX_FAILING_UNITS_AT_FIRST)
        if self.in_a_row >= self.attempts * max(most + 1, self.crew.count * self.in_flight):
            raise TooManyFailures(
                f"{self.in_a_row} attempts in a row failed, the last one at {unit}: {reason}"
            )


def _ready(references: list[Any], poll_seconds: float) -> list[Any]:
    """Returns the references that have a result, after `poll_seconds` at most."""
    if not references:
        time.sleep(poll_seconds)
        return []
    some, _ = ray.wait(references, num_returns=1, timeout=poll_seconds)
    return ray.wait(references, num_returns=len(references), timeout=0)[0] if some else []


class Queue:
    """Batches still to be started.

    Of several units that were lost with an actor, one may have killed it. To find out which, each is retried with no
    other unit on its actor, and only a failure alone counts. A unit that failed is queued last.
    """

    def __init__(self, batches: Iterable[Sequence[str] | None], attempts: int) -> None:
        self._coming: Iterator[Sequence[str] | None] | None = iter(batches)
        """Source of further batches; None once it has ended."""
        self._waiting, self._attempts = deque[Batch](), attempts
        self._failures, self._suspects = Counter[str](), set[str]()
        self._with_node = Counter[str]()
        self.refill()

    def __len__(self) -> int:
        return len(self._waiting)

    def __bool__(self) -> bool:
        return self._coming is not None or bool(self._waiting)

    def refill(self) -> None:
        """Queues the batches that have become ready."""
        while self._coming is not None:
            try:
                batch = next(self._coming)
            except StopIteration:
                self._coming = None
                return
            if batch is None:
                return
            self._waiting.append(tuple(batch))

    def failures(self, unit: str) -> int:
        return self._failures[unit]

    def take(self, beside: Sequence[str]) -> Batch | None:
        """Returns the next batch for an actor that is busy with the units `beside`, or None if it has to wait."""
        if not self._waiting or self._suspects.intersection(beside):
            return None
        for place, batch in enumerate(self._waiting):
            if not beside or self._suspects.isdisjoint(batch):
                del self._waiting[place]
                return batch
        return None

    def put_back(self, units: Sequence[str]) -> None:
        """Queues units again that no failure is held against."""
        if units:
            self._waiting.appendleft(tuple(units))

    def failed(self, units: Sequence[str], counted: bool) -> bool:
        """Queues units again, each alone, unless one failed too often; returns whether this was one unit's failure.

        `counted` is False for losses that no unit is to blame for, such as that of a node. A unit that was lost that
        way more than MAX_NODE_LOSSES times is blamed all the same.
        """
        if not counted:
            self._with_node.update(units)
            counted = any(self._with_node[unit] > MAX_NODE_LOSSES for unit in units)
        if not counted or len(units) != 1:
            if counted:
                self._suspects.update(units)
            self._waiting.extendleft((unit,) for unit in reversed(units))
            return False
        (unit,) = units
        self._failures[unit] += 1
        if self._failures[unit] < self._attempts:
            self._waiting.append((unit,))
        return True
