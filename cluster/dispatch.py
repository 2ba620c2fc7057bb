"""Units of work queued over actors: bounded in flight, results in completion order, the dead replaced.

The driver sees only done records. A unit that fails `attempts` times ends the stage: what is committed stays, and a
rerun tries the rest again.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from calibprune.errors import UserError
from calibprune.run import Record
from cluster.session import Actors, death

HANG_FACTOR = 10.0
POLL_SECONDS = 1.0


class UnitFailed(RuntimeError):
    """A unit of work failed more often than allowed; names the unit and the last cause."""


@dataclass(frozen=True)
class Call:
    """A unit under way on an actor."""

    actor: int
    unit: str
    since: float


def dispatch(
    actors: Actors,
    method: str,
    units: Sequence[str],
    *,
    in_flight: int,
    attempts: int,
    timeout_seconds: float | None,
    start_timeout_seconds: float,
) -> Iterator[Record | None]:
    """Calls `method(unit)` for every unit; yields records as they come, and None about once a second in between.

    An actor that dies, or whose unit takes longer than the time limit (given, or ten times the longest measured
    unit, but never less than an actor's start may take), is replaced and its units are queued again. An error that
    the unit raised counts as a failure too; a UserError ends the stage at once.
    """
    queue = Queue(units, attempts)
    running: dict[Any, Call] = {}
    longest = 0.0
    while queue or running:
        for index, handle in enumerate(actors.handles):
            here = [call.unit for call in running.values() if call.actor == index]
            while len(here) < in_flight and (unit := queue.take(here)) is not None:
                reference = getattr(handle, method).remote(unit)
                running[reference] = Call(index, unit, time.monotonic())
                here.append(unit)
        ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
        now, dead = time.monotonic(), None
        for reference in ready:
            call = running.pop(reference)
            try:
                record = ray.get(reference)
            except RayActorError as error:
                running[reference] = call
                dead = call.actor, death(error)
            except RayTaskError as error:
                queue.failed([call.unit], error.cause or error)
            else:
                longest = max(longest, now - call.since)
                yield record
        limit = timeout_seconds or max(start_timeout_seconds, HANG_FACTOR * longest)
        hanging = [call.actor for call in running.values() if now - call.since > limit]
        if dead is None and hanging:
            dead = hanging[0], TimeoutError(f"no result within {limit:.0f} s")
        if dead is not None:
            index, cause = dead
            lost = [reference for reference, call in running.items() if call.actor == index]
            queue.failed([running.pop(reference).unit for reference in lost], cause)
            actors.replace(index)
        elif not ready:
            yield None


class Queue:
    """Units still to be started. One of several units that went down with an actor may have killed it: to find out
    which, each of them is tried alone, and only a failure alone counts."""

    def __init__(self, units: Sequence[str], attempts: int) -> None:
        self._waiting, self._attempts = deque(units), attempts
        self._failures, self._suspects = Counter[str](), set[str]()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self, beside: Sequence[str]) -> str | None:
        """The next unit for an actor that is busy with these, or None if it has to wait."""
        if not self._waiting or self._suspects.intersection(beside):
            return None
        if beside and self._waiting[0] in self._suspects:
            return None
        return self._waiting.popleft()

    def failed(self, units: Sequence[str], cause: Exception) -> None:
        """Queues units again. Raises the cause if the user can mend it, UnitFailed after too many failures."""
        if isinstance(cause, UserError):
            raise cause from None
        self._waiting.extendleft(reversed(units))
        if len(units) > 1:
            self._suspects.update(units)
            return
        (unit,) = units
        self._failures[unit] += 1
        if self._failures[unit] >= self._attempts:
            reason = " ".join(str(cause).split())[:300]
            raise UnitFailed(f"unit {unit} failed {self._attempts} times, the last time: {reason}")
