"""Units of work queued over actors: bounded in flight, results in completion order, the dead replaced.

The driver sees only done records. A unit is given up after `attempts` tries, and then so is the stage: what is
committed stays, and a rerun tries the rest again.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
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
    the unit raised counts as an attempt too; a UserError ends the stage at once.
    """
    queue, tries = deque(units), Counter[str]()
    running: dict[Any, tuple[int, str, float]] = {}
    longest = 0.0
    while queue or running:
        for index, handle in enumerate(actors.handles):
            busy = sum(1 for at, _, _ in running.values() if at == index)
            while queue and busy < in_flight:
                unit = queue.popleft()
                tries[unit] += 1
                running[getattr(handle, method).remote(unit)] = (index, unit, time.monotonic())
                busy += 1
        ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
        limit = timeout_seconds or max(start_timeout_seconds, HANG_FACTOR * longest)
        hanging = [r for r, (_, _, since) in running.items() if time.monotonic() - since > limit]
        if not ready and not hanging:
            yield None
            continue
        for reference in ready:
            index, unit, since = running.pop(reference)
            try:
                record = ray.get(reference)
            except RayActorError as error:
                cause = death(error)
                if isinstance(cause, UserError):
                    raise cause from None
                _requeue(queue, tries, [unit, *_take(running, index)], attempts, cause)
                actors.replace(index)
                break
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                _requeue(queue, tries, [unit], attempts, error.cause or error)
            else:
                longest = max(longest, time.monotonic() - since)
                yield record
        for index in {running[reference][0] for reference in hanging if reference in running}:
            cause = TimeoutError(f"no result within {limit:.0f} s")
            _requeue(queue, tries, _take(running, index), attempts, cause)
            actors.replace(index)


def _take(running: dict[Any, tuple[int, str, float]], index: int) -> list[str]:
    references = [reference for reference, (at, _, _) in running.items() if at == index]
    return [running.pop(reference)[1] for reference in references]


def _requeue(
    queue: deque[str], tries: Counter[str], units: list[str], attempts: int, cause: Exception
) -> None:
    for unit in units:
        if tries[unit] >= attempts:
            reason = " ".join(str(cause).split())[-500:]
            raise UnitFailed(f"unit {unit} failed {tries[unit]} times, the last time: {reason}")
        queue.appendleft(unit)
