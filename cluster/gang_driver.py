"""A gang of LayerWorkers from the driver's side: built, watched, and rebuilt when one of them is lost.

No worker is restarted inside a gang: a new process has no place in the others' collectives. The first loss ends the
gang; a new one, of as many workers as the cluster then has room for, resumes from what is committed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)

from calibprune.config.model import ClusterSettings
from calibprune.errors import UserError
from calibprune.events import Event, LayerEntered, Lost, Resumed, Tick, emit, note
from calibprune.gang import PeerLost
from calibprune.redact import one_line
from calibprune.stage import Stage
from cluster.actors import Actors, death, ended_at, node_died
from cluster.label import Label
from cluster.layer_worker import LayerWorker
from cluster.places import Bundle, NoRoom, Waiting, capacity
from cluster.suspects import Suspects, WorkerLost

MEMORY = "memory"
"""Kind of loss of a worker that ran out of its GPU's memory."""
ATTEMPTS = 3
"""Losses in a row, without a unit committed in between, after which the work is given up."""
POLL_SECONDS = 1.0
HANG_FACTOR, HANG_FLOOR_SECONDS = 10.0, 180.0
"""Multiple of the longest layer so far after which a silent gang is treated as hung, and the least such limit in
seconds."""
PULSE_SECONDS = 10.0
"""Time between two questions to the workers whether they have made a step."""


@dataclass(frozen=True)
class Relief:
    """What to do about a worker that runs out of its GPU's memory."""

    advice: str
    """What the user can change, for the error where nothing else helps."""
    arguments: tuple[Any, ...] | None = None
    """Arguments with which the work needs less memory, for a second try; None where there are none."""
    note: str = ""
    """What is different in the second try."""


class RoomChanged(Exception):
    """The number of workers that the cluster has room for changed during the wait for a gang."""


class WorkFailed(RuntimeError):
    """The work failed too often, or in a way that would repeat on any other worker."""


def run_gang(
    method: str,
    arguments: tuple[Any, ...],
    *,
    workers: int,
    bundle: Bundle,
    cluster: ClusterSettings,
    stage: Stage,
    layer_timeout_seconds: float | None = None,
    unit_of: Callable[[int], str] | None = None,
    label: Label | None = None,
    relief: Relief | None = None,
) -> Iterator[Event]:
    """Calls `method(*arguments)`, a generator of events, on every worker of a gang; emits and yields the events.

    LayerEntered is yielded once, when the last worker enters a layer, and Tick about once a second. When a worker is
    lost, which is a Lost event, the call is repeated on a new gang: `method` resumes from what is committed to the
    `stage`. `unit_of` returns the unit that a layer belongs to. A worker that runs out of its GPU's memory would
    do so again: the call is repeated once, with the arguments of `relief`. Raises NoRoom where the cluster has no room
    for the first gang, UserError where a worker raised one or the memory does not suffice either way, WorkFailed after
    too many losses without a unit committed in between.
    """
    attempts, before = 0, len(stage.done_units())
    group: WorkerGroup | None = None
    while True:
        try:
            with group or WorkerGroup(workers, bundle, cluster, label=label) as group:
                yield from group.events(method, arguments, layer_timeout_seconds)
            return
        except WorkerLost as lost:
            done = len(stage.done_units())
            attempts, before = (1 if done > before else attempts + 1), done
            units = () if lost.layer is None or unit_of is None else (unit_of(lost.layer),)
            yield emit(Lost(lost.kind, lost.reason, units, attempts, lost.host, lost.name))
            if lost.kind == MEMORY and relief is not None:
                if relief.arguments is None:
                    raise UserError(f"{lost}: {relief.advice}") from None
                note(relief.note)
                arguments, relief = relief.arguments, Relief(relief.advice)
            if attempts >= ATTEMPTS:
                raise WorkFailed(f"gave up after {attempts} losses in a row: {lost}") from None
        yield emit(Resumed(done))
        group = rebuild(workers, bundle, cluster, label)
        note(f"{len(group)} of {workers} workers at work again")


def rebuild(
    workers: int, bundle: Bundle, cluster: ClusterSettings, label: Label | None = None
) -> "WorkerGroup":
    """Builds a gang of as many workers as the cluster has room for, up to `workers`.

    Logs the wait for room from time to time, and starts over when the cluster has become larger or smaller. Raises
    WorkFailed, with what was requested, what is free and what is busy, after `start_timeout_seconds`.
    """
    waiting = Waiting(workers, bundle, cluster.start_timeout_seconds)
    lost: WorkerLost | None = None
    while True:
        room = min(workers, capacity(bundle))

        def while_waiting(room: int = room) -> None:
            waiting.check()
            if min(workers, capacity(bundle)) != room:
                raise RoomChanged

        try:
            waiting.check()
            if room:
                return WorkerGroup(room, bundle, cluster, while_waiting=while_waiting, label=label)
            lost = None
        except RoomChanged:
            continue
        except WorkerLost as error:
            lost = error
        except NoRoom as error:
            raise WorkFailed(f"no new gang came up: {lost or error}") from None
        time.sleep(POLL_SECONDS)


class WorkerGroup:
    """LayerWorkers joined into one gang; a context manager that ends them."""

    def __init__(
        self,
        count: int,
        bundle: Bundle,
        cluster: ClusterSettings,
        *,
        while_waiting: Callable[[], None] | None = None,
        label: Label | None = None,
    ) -> None:
        """Starts the workers and joins them; `while_waiting` is that of `Actors`."""
        seconds = cluster.start_timeout_seconds
        self._actors = Actors(
            LayerWorker,
            count,
            bundle,
            [bundle.cpus, seconds],
            timeout_seconds=seconds,
            while_waiting=while_waiting,
            concurrency_groups={"health": 1},
            spinning=True,
            label=label,
        )
        self.nodes = self._actors.nodes
        self._start_seconds = float(seconds)
        self._at: list[LayerEntered | None] = [None] * count
        try:
            self._join()
        except BaseException:
            self._actors.__exit__()
            raise

    def __len__(self) -> int:
        return len(self._actors.handles)

    def __enter__(self) -> "WorkerGroup":
        return self

    def __exit__(self, *exception: object) -> None:
        self._actors.__exit__()

    def events(
        self, method: str, arguments: tuple[Any, ...], layer_timeout_seconds: float | None
    ) -> Iterator[Event]:
        """Yields the workers' events in the order of arrival, and Tick about once a second in between.

        Raises WorkerLost, WorkFailed and UserError.
        """
        self._at = [None] * len(self)
        streams = {
            getattr(handle, method).options(num_returns="streaming").remote(*arguments): rank
            for rank, handle in enumerate(self._actors.handles)
        }
        pace = _LayerPace(layer_timeout_seconds, self._start_seconds)
        pulse, suspects = _Pulse(self._actors.handles), self._no_suspects()
        while streams or suspects:
            ready = _ready(list(streams))
            now = time.monotonic()
            for stream in ready:
                rank = streams[stream]
                try:
                    event: Any = ray.get(next(stream))  # type: ignore[arg-type]
                except StopIteration:
                    del streams[stream]
                except (RayActorError, RayTaskError) as error:
                    lost, died = self._lost(rank, error), isinstance(error, RayActorError)
                    bereft = isinstance(getattr(error, "cause", None), PeerLost)
                    if not isinstance(lost, WorkerLost) or not (died or bereft):
                        raise lost from None
                    away = isinstance(error, ActorUnavailableError)
                    suspects.add(rank, lost, now, died=died, out_of_reach=away)
                    del streams[stream]
                else:
                    pace.heard_at = now
                    if not isinstance(event, LayerEntered):
                        yield emit(event)
                    elif self._last_to_enter(rank, event):
                        pace.enter(event, now)
                        yield emit(event)
            if suspects and (rank := suspects.culprit(now, len(streams))) is not None:
                if rank in self._dead_nodes():
                    raise self._lost_with_node(rank)
                raise suspects.loss(rank) or self._lost_with_node(rank)
            if pulse.beats(now):
                pace.heard_at = now
            if pace.overdue(now):
                raise self._hanging(pace.limit)
            if not ready:
                yield Tick()

    def _no_suspects(self) -> Suspects:
        over_nccl = bool(self._actors.bundle.gpus) and len(self) > 1
        return Suspects(
            over_nccl and len(set(self._actors.node_ids)) > 1,
            self._dead_nodes,
            lambda rank: ended_at(self._actors.handles[rank]),
        )

    def _dead_nodes(self) -> set[int]:
        """Returns the workers whose nodes are dead."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return {rank for rank, node in enumerate(self._actors.node_ids) if node not in alive}

    def _lost_with_node(self, rank: int) -> WorkerLost:
        at = self._at[rank]
        where, reason = f" on {self.nodes[rank]}", f"at {_place(at)}: its node died"
        return WorkerLost(
            f"worker {rank}", where, reason, self._actors.hosts[rank], _layer(at), "node"
        )

    def _last_to_enter(self, rank: int, event: LayerEntered) -> bool:
        """Records how far a worker is; returns whether it was the last one to get this far."""
        at = self._at[rank]
        if at is not None and event.position <= at.position:
            return False
        self._at[rank] = event
        return all(at is not None and at.position >= event.position for at in self._at)

    def _join(self) -> None:
        handles, count = self._actors.handles, len(self)
        try:
            meeting = None
            if count > 1:
                meeting = ray.get(
                    handles[0].open_meeting.remote(len(set(self.nodes)) == 1),
                    timeout=self._start_seconds,
                )
            joining = {
                handle.join.remote(rank, count, meeting): rank
                for rank, handle in enumerate(handles)
            }
            kinds: dict[str, str] = {}
            deadline = time.monotonic() + self._start_seconds
            while joining:
                left = max(0.0, deadline - time.monotonic())
                ready, _ = ray.wait(list(joining), num_returns=1, timeout=left)
                if not ready:
                    rank = min(joining.values())
                    reason = f"at its start: not ready within {self._start_seconds:.0f} s"
                    raise WorkerLost(f"worker {rank}", f" on {self.nodes[rank]}", reason)
                rank = joining.pop(ready[0])
                kind: Any = ray.get(ready[0])
                kinds[kind] = self.nodes[rank]
        except (RayActorError, RayTaskError, GetTimeoutError) as error:
            raise self._lost(0 if count == 1 else None, error) from None
        if len(kinds) > 1:
            each = ", ".join(f"{kind} on {node}" for kind, node in sorted(kinds.items()))
            raise UserError(f"the workers' GPUs differ: {each}: take nodes of one kind")

    def _lost(self, rank: int | None, error: Exception) -> Exception:
        """Returns what to raise for a worker's error: one that only the user can fix, or a loss that a new gang may
        survive."""
        cause = death(error) if isinstance(error, RayActorError) else getattr(error, "cause", error)
        if isinstance(cause, UserError):
            return UserError(str(cause))
        if rank is None:
            return WorkerLost("a worker", "", f"at its start: {one_line(cause, 400)}")
        at, where = self._at[rank], f" on {self.nodes[rank]}"
        reason = f"at {_place(at)}: {one_line(cause, 400)}"
        if isinstance(cause, ValueError):  # the same numbers would raise it on any worker
            return WorkFailed(f"worker {rank}{where} {reason}")
        kind = "node" if isinstance(error, RayActorError) and node_died(error) else "worker"
        kind = MEMORY if _out_of_memory(cause) else kind
        host = self._actors.hosts[rank]
        return WorkerLost(f"worker {rank}", where, reason, host, _layer(at), kind)

    def _hanging(self, limit: float) -> WorkerLost:
        """Returns the loss of a gang that hangs. It names the workers that do not even answer a call, or else all."""
        asked = {_progress(handle): rank for rank, handle in enumerate(self._actors.handles)}
        _, silent = ray.wait(list(asked), num_returns=len(asked), timeout=5.0)
        ranks = sorted(asked[reference] for reference in silent) or sorted(asked.values())
        named = ", ".join(f"worker {rank} on {self.nodes[rank]}" for rank in ranks)
        state = "does not answer" if silent else "makes no progress"
        slowest = min(self._at, key=lambda at: (-1, 0) if at is None else at.position)
        hosts = ", ".join(sorted({str(self._actors.hosts[rank]) for rank in ranks}))
        reason = f"at {_place(slowest)}: {state}, no step within {limit:.0f} s"
        return WorkerLost(named, "", reason, hosts, _layer(slowest))


def _ready(streams: list[Any]) -> list[Any]:
    """Returns the streams that have something, after about a second at most."""
    if not streams:
        time.sleep(POLL_SECONDS)
        return []
    some, _ = ray.wait(streams, num_returns=1, timeout=POLL_SECONDS)
    return ray.wait(streams, num_returns=len(streams), timeout=0)[0] if some else []


def _out_of_memory(cause: object) -> bool:
    """Returns whether a GPU's memory ran out: of PyTorch's own allocations, or of a library's."""
    return isinstance(cause, torch.OutOfMemoryError) or "CUDA error: out of memory" in str(cause)


def _progress(handle: Any) -> Any:
    return handle.progress.options(concurrency_group="health").remote()


class _Pulse:
    """Asks the workers now and then how many steps they have made, without waiting for the answers."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles
        self._steps = [0] * len(handles)
        self._asked: dict[Any, int] = {}
        self._next = time.monotonic() + PULSE_SECONDS

    def beats(self, now: float) -> bool:
        """Returns whether an answer has come of a worker that has made a step since its last one."""
        beats = False
        asked = list(self._asked)
        answers = ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else []
        for answer in answers:
            rank = self._asked.pop(answer)
            with suppress(RayError):  # that a worker is dead is heard of through its stream
                steps: Any = ray.get(answer)
                beats, self._steps[rank] = beats or steps > self._steps[rank], steps
        if now > self._next:
            self._next = now + PULSE_SECONDS
            silent = set(self._asked.values())
            for rank, handle in enumerate(self._handles):
                if rank not in silent:
                    self._asked[_progress(handle)] = rank
        return beats


class _LayerPace:
    """The time that a gang may be silent before it is treated as hung: ten times the longest layer so far; or the time
    that a layer may take, where that is given.

    A layer that is merely swept through, or one of an earlier sweep, does not predict layers that are pruned. Until
    one of these is done, the limit is at least the time that a start may take.
    """

    def __init__(self, given: float | None, start_seconds: float) -> None:
        self._given, self._start_seconds = given, start_seconds
        self._longest, self._measured = 0.0, False
        self._last: LayerEntered | None = None
        self.entered_at = self.heard_at = time.monotonic()

    def enter(self, event: LayerEntered, now: float) -> None:
        """Records that all workers have entered a layer."""
        if self._last is not None:
            same_sweep = self._last.order == event.order
            self._measured = same_sweep and (self._measured or self._last.full)
            self._longest = max(self._longest, now - self.entered_at)
        self._last, self.entered_at = event, now

    def overdue(self, now: float) -> bool:
        in_layer = self._given is not None and self._last is not None
        return now - (self.entered_at if in_layer else self.heard_at) > self.limit

    @property
    def limit(self) -> float:
        if self._given and self._last is not None:
            return self._given
        limit = self._given or max(HANG_FLOOR_SECONDS, HANG_FACTOR * self._longest)
        return limit if self._measured else max(limit, self._start_seconds)


def _layer(at: LayerEntered | None) -> int:
    return 0 if at is None or at.order == 0 else at.layer


def _place(at: LayerEntered | None) -> str:
    if at is None:
        return "layer 0"
    return f"layer {at.layer}{f', {at.work}' if at.order == 0 else ''}"
