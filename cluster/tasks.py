"""Work that any process can do, as Ray tasks: enough at a time to keep every core busy, again where one was lost."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from calibprune.failures import Failure, nobody
from calibprune.redact import one_line
from calibprune.stage import Record
from cluster.label import Label
from cluster.places import Bundle, Waiting, capacity, nodes
from cluster.session import death

IN_FLIGHT_PER_PLACE = 2
ATTEMPTS = 3
"""Losses in a row, without a unit in between, before the work is given up."""
POLL_SECONDS = 1.0
NAMED = 4
"""Units in a message."""


class TaskLost(RuntimeError):
    """A task went down with its process or node too often, or nothing is heard of it; names its units and the cause."""


class Done(NamedTuple):
    record: Record
    seconds: float
    """That the task took for it."""


class _Call(NamedTuple):
    units: tuple[str, ...]
    """Those that are missing."""
    attempt: int = 1
    heard: float | None = None
    """When it last gave something, by time.monotonic(); None until there is a process for it."""


def run_tasks(
    function: Callable[..., Iterator[Record | None]],
    arguments: Sequence[Any],
    batches: Sequence[Sequence[str]],
    bundle: Bundle,
    *,
    start_seconds: float,
    label: Label,
    failed: Callable[[Failure], None] = nobody,
    poll_seconds: float = POLL_SECONDS,
    at_once: int | None = None,
    silent_seconds: float = math.inf,
) -> Iterator[Done | None]:
    """Calls `function(*arguments, units)`, a generator, for every batch of units; yields what they commit as it comes.

    None every `poll_seconds` in between. `at_once` calls run at the same time at most; None: as many as find a place.
    A call that is lost with its process or its node, which `failed` is told, is made again for the units that are
    missing. What a call raises ends the work, as RayTaskError with its `cause`; others' commits stay. Raises TaskLost,
    also where a call gives nothing for `silent_seconds`, be it None to say that it goes on, and NoRoom where no call
    finds a place within `start_seconds`.
    """
    task: Any = ray.remote(_timed)
    options = {
        "num_cpus": bundle.cpus, "num_gpus": bundle.gpus, "max_retries": 0, "num_returns": "streaming",
        "name": label.task(function.__name__.strip("_")),
    }  # fmt: skip
    queue = deque(_Call(tuple(units)) for units in batches)
    running: dict[Any, _Call] = {}
    waiting = Waiting(1, bundle, start_seconds)
    try:
        while queue or running:
            if queue:
                room = max(2, IN_FLIGHT_PER_PLACE * capacity(bundle))
                most = min(room, at_once or room)
                for _ in range(min(len(queue), most - len(running))):
                    call = queue.popleft()
                    placed = task.options(**options, **_place(bundle))
                    running[placed.remote(function, *arguments, call.units)] = call
            ready, _ = ray.wait(list(running), num_returns=1, timeout=poll_seconds)
            for stream in ready:
                call = running[stream]
                try:
                    item: Any = ray.get(next(stream))  # type: ignore[arg-type]
                except StopIteration:
                    del running[stream]
                except RayTaskError:
                    raise
                except RayError as error:
                    del running[stream]
                    if call.units:
                        queue.append(_again(call, error, failed))
                else:
                    heard = time.monotonic()
                    if item is None:
                        running[stream] = call._replace(heard=heard)
                        continue
                    left = tuple(unit for unit in call.units if unit != item.record.unit)
                    running[stream] = _Call(left, heard=heard)
                    yield item
            if not running or any(call.heard is not None for call in running.values()):
                waiting.restart()
            waiting.go_on()
            if not ready:
                _check_heard(running.values(), silent_seconds)
                yield None
    finally:
        for stream in running:
            ray.cancel(stream)


def _place(bundle: Bundle) -> dict[str, Any]:
    """Of a task that asks for nothing: where most cores are free, not the head that may be kept free of work."""
    if bundle.as_resources():
        return {}
    node = max(nodes(), key=lambda node: (node.free.get("CPU", 0), node.total.get("CPU", 0)))
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=True)}


def _timed(
    function: Callable[..., Iterator[Record | None]], *arguments: Any
) -> Iterator[Done | None]:
    """None as soon as there is a process for it, then its records, and None where it gives that."""
    yield None
    since = time.monotonic()
    for record in function(*arguments):
        if record is None:
            yield None
            continue
        now = time.monotonic()
        yield Done(record, now - since)
        since = now


def _again(call: _Call, error: RayError, failed: Callable[[Failure], None]) -> _Call:
    reason = one_line(death(error))
    failed(Failure("task", reason, call.units, call.attempt))
    if call.attempt == ATTEMPTS:
        raise TaskLost(f"the task of {_named(call)} was lost {ATTEMPTS} times: {reason}") from None
    return _Call(call.units, call.attempt + 1)


def _check_heard(calls: Iterable[_Call], silent_seconds: float) -> None:
    now = time.monotonic()
    for call in calls:
        if call.heard is not None and now - call.heard > silent_seconds:
            raise TaskLost(f"the task of {_named(call)} gave nothing for {silent_seconds:g} s")


def _named(call: _Call) -> str:
    return ", ".join(call.units[:NAMED]) + (", ..." if len(call.units) > NAMED else "")
