"""Units of work queued over a crew of actors: bounded in flight, results in completion order, the dead replaced.

The driver sees only done records. A unit that fails too often is set aside, and all others are done first.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from calibprune.errors import UserError
from calibprune.failures import Failure
from calibprune.redact import one_line
from calibprune.stage import Record
from cluster.crew import Crew, Member
from cluster.metrics import QueueMetrics
from cluster.session import death, node_died

HANG_FACTOR, HANG_FLOOR_SECONDS = 10.0, 300.0
"""The floor leaves room for a store to be sat out, while a unit is read and while it is committed."""
FIRST_SECONDS = 3600.0
"""For a unit while nobody knows how long one of its size takes, unless the caller knows better."""
MOST_WITH_A_NODE = 10
"""Losses of a unit together with its node, for which no unit is blamed: one more, and it may be what kills them."""
POLL_SECONDS = 1.0


def _bear(failures: int, reason: str) -> None:
    """However many."""


def _alike(unit: str) -> float:
    """The work of units that are all of one size."""
    return 1.0


@dataclass(frozen=True)
class Call:
    """A unit under way on an actor."""

    member: Member
    unit: str
    since: float


def dispatch(
    crew: Crew,
    method: str,
    units: Sequence[str],
    *,
    in_flight: int,
    attempts: int,
    set_aside: Callable[[str, str], None],
    in_a_row: Callable[[int, str], None] = _bear,
    timeout_seconds: float | None = None,
    longest: float = 0.0,
    first_seconds: float = FIRST_SECONDS,
    work: Callable[[str], float] = _alike,
    fatal: tuple[type[Exception], ...] = (),
    more: Iterator[Sequence[str]] | None = None,
) -> Iterator[Record | None]:
    """Calls `method(unit)` for every unit; yields records as they come, and None about once a second in between.

    `more` has the units that others are still preparing: once a second or more often, until it ends, it is asked for
    those that are ready now.

    An actor that dies, or whose unit takes longer than the time limit (the one given, or ten times the longest
    measured unit, which begins with `longest`; `first_seconds` at least before a unit of as much `work` is done), or
    whose unit raises a `fatal` error, is replaced, and its units are queued again. Any other error that a unit raises
    counts as a failure too; after `attempts` of them `set_aside` is called with the unit and the last cause. `in_a_row`
    is told how many of these failures there were since the last unit done, and the last cause; what it raises ends the
    stage, and a UserError of a unit does so at once. `crew.failed` is told of every failure.
    """
    queue = Queue(units, attempts, set_aside, in_a_row, more)
    metrics = QueueMetrics(crew.label) if crew.label else None
    patience = Patience(timeout_seconds, longest, first_seconds, work)
    running: dict[Any, Call] = {}

    def lose(member: Member, cause: Exception, counted: bool = True) -> None:
        lost = [reference for reference, call in running.items() if call.member is member]
        crew.dismiss(member)
        failed(
            [running.pop(reference).unit for reference in lost], cause, member, "engine", counted
        )

    def failed(
        lost: list[str], cause: Exception, member: Member, kind: str, counted: bool = True
    ) -> None:
        if not isinstance(cause, UserError):
            reason = one_line(cause)
            attempt = 1 + max(map(queue.failures, lost), default=0)
            crew.failed(
                Failure(kind if counted else "node", reason, tuple(lost), attempt, member.node)
            )
        queue.failed(lost, cause, counted)

    while queue or running:
        queue.refill()
        crew.fill(len(queue) + len(running))
        _assign(crew, method, queue, running, in_flight)
        starting = crew.pending()
        for reference in _ready([*running, *starting]):
            if (member := starting.get(reference)) is not None:
                crew.advance(member)
                continue
            if (call := running.get(reference)) is None:  # its actor was lost a moment ago
                continue
            try:
                record: Any = ray.get(reference)
            except RayTaskError as error:
                cause = error.cause or error
                if isinstance(cause, fatal):
                    lose(call.member, cause)
                else:
                    del running[reference]
                    failed([call.unit], cause, call.member, "unit")
            except RayError as error:  # dead, or nothing will be heard of it any more
                lose(call.member, death(error), counted=not node_died(error))
            else:
                del running[reference]
                patience.learn(call.unit, time.monotonic() - call.since)
                queue.succeeded()
                yield record
        now = time.monotonic()
        late = {
            call.member: limit
            for call in running.values()
            if now - call.since > (limit := patience.seconds(call.unit))
        }
        for member, limit in late.items():
            lose(
                member, TimeoutError(f"no result within {limit:.0f} s (see shard_timeout_seconds)")
            )
        for member in crew.late():
            crew.start_failed(member, TimeoutError("it took too long"))
        if metrics:
            metrics.record(len(queue), len(running), len(crew.ready))
        yield None


def _assign(
    crew: Crew, method: str, queue: "Queue", running: dict[Any, Call], in_flight: int
) -> None:
    """Gives units to whoever has the fewest, until all have enough or none is left."""
    busy: dict[Member, list[str]] = {member: [] for member in crew.ready}
    for call in running.values():
        busy[call.member].append(call.unit)
    for depth in range(in_flight):
        for member, here in busy.items():
            if len(here) > depth or (unit := queue.take(here)) is None:
                continue
            reference = getattr(member.handle, method).remote(unit)
            running[reference] = Call(member, unit, time.monotonic())
            here.append(unit)


def _ready(references: list[Any]) -> list[Any]:
    """Those that are there, after a second at most."""
    if not references:
        time.sleep(POLL_SECONDS)
        return []
    some, _ = ray.wait(references, num_returns=1, timeout=POLL_SECONDS)
    return ray.wait(references, num_returns=len(references), timeout=0)[0] if some else []


class Patience:
    """How long a unit may take before its actor is held to hang. A small unit says nothing of larger ones."""

    def __init__(
        self, given: float | None, longest: float, first: float, work: Callable[[str], float]
    ) -> None:
        self._given, self._longest, self._first, self._work = given, longest, first, work
        self._most = 0.0
        """Work of the largest unit done."""

    def learn(self, unit: str, seconds: float) -> None:
        self._longest = max(self._longest, seconds)
        self._most = max(self._most, self._work(unit))

    def seconds(self, unit: str) -> float:
        measured = max(HANG_FLOOR_SECONDS, HANG_FACTOR * self._longest)
        known = self._most and self._work(unit) <= self._most
        return self._given or (measured if known else max(measured, self._first))


class Queue:
    """Units still to be started. One of several units that went down with an actor may have killed it: to find out
    which, each of them is tried alone, and only a failure alone counts. A unit that failed comes last: others go on."""

    def __init__(
        self,
        units: Sequence[str],
        attempts: int,
        set_aside: Callable[[str, str], None],
        in_a_row: Callable[[int, str], None] = _bear,
        more: Iterator[Sequence[str]] | None = None,
    ) -> None:
        self._waiting, self._attempts, self._set_aside = deque(units), attempts, set_aside
        self._failures, self._suspects = Counter[str](), set[str]()
        self._with_node = Counter[str]()
        self._in_a_row, self._tell = 0, in_a_row
        self._more = more
        """None once no more units are being prepared."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __bool__(self) -> bool:
        return self._more is not None or bool(self._waiting)

    def refill(self) -> None:
        """Takes in the units that have become ready."""
        if self._more is not None:
            ready = next(self._more, None)
            if ready is None:
                self._more = None
            self._waiting.extend(ready or ())

    def failures(self, unit: str) -> int:
        return self._failures[unit]

    def take(self, beside: Sequence[str]) -> str | None:
        """The next unit for an actor that is busy with these, or None if it has to wait."""
        if not self._waiting or self._suspects.intersection(beside):
            return None
        for place, unit in enumerate(self._waiting):
            if not beside or unit not in self._suspects:
                del self._waiting[place]
                return unit
        return None

    def failed(self, units: Sequence[str], cause: Exception, counted: bool = True) -> None:
        """Queues units again, or sets one aside that failed too often. Raises the cause if the user can mend it.

        Not `counted` is what no unit can be blamed for, such as the loss of a node, unless one is always there.
        """
        if isinstance(cause, UserError):
            raise cause from None
        if not counted:
            self._with_node.update(units)
            counted = any(self._with_node[unit] > MOST_WITH_A_NODE for unit in units)
        if not counted:
            self._waiting.extendleft(reversed(units))
            return
        if len(units) > 1:
            self._suspects.update(units)
            self._waiting.extendleft(reversed(units))
            return
        for unit in units:
            reason = one_line(cause)
            self._failures[unit] += 1
            self._in_a_row += 1
            if self._failures[unit] >= self._attempts:
                self._set_aside(unit, reason)
            else:
                self._waiting.append(unit)
            self._tell(self._in_a_row, reason)

    def succeeded(self) -> None:
        self._in_a_row = 0
