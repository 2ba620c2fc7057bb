"""A gang of LayerWorkers from the driver's side: built, watched, and built anew when one of them is lost.

No worker is restarted inside a gang: a new process has no place in the others' collectives. The first loss ends the
gang, and a new one, of as many workers as the cluster has room for then, takes up the work from what is committed.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from calibprune.config.model import ClusterSettings
from calibprune.errors import UserError
from calibprune.failures import Failure, nobody
from calibprune.gang import PeerLost
from calibprune.pruning.layer import layer_unit
from calibprune.redact import one_line
from calibprune.stage import Record
from cluster.label import Label
from cluster.layer_worker import LayerWorker
from cluster.places import Bundle, NoRoom, Waiting, capacity
from cluster.session import Actors, death, node_died

ATTEMPTS = 3
"""Losses in a row, without a step of progress in between, before the work is given up."""
NOWHERE = -(1 << 30)
POLL_SECONDS = 1.0
CULPRIT_SECONDS = 15.0
"""How long a worker whose peers are gone waits for one of them to turn out dead."""
HANG_FACTOR, HANG_FLOOR_SECONDS = 10.0, 180.0


class WorkerLost(RuntimeError):
    """A worker of the gang died, hangs or failed; names worker, node, how far it was, and why."""

    def __init__(
        self, message: str, host: str | None = None, layer: int | None = None, kind: str = "worker"
    ) -> None:
        super().__init__(message)
        self.host, self.layer, self.kind = host, layer, kind


class RoomChanged(Exception):
    """The cluster has room for more workers, or for fewer, than are being waited for."""


class WorkFailed(RuntimeError):
    """Work that no other worker could do better, or that failed too often."""


def run_gang(
    method: str,
    arguments: tuple[Any, ...],
    *,
    workers: int,
    bundle: Bundle,
    cluster: ClusterSettings,
    layer_timeout_seconds: float | None = None,
    progress: Callable[[], int],
    notice: Callable[[str], None],
    failed: Callable[[Failure], None] = nobody,
    label: Label | None = None,
) -> Iterator[Any]:
    """Calls `method(*arguments)`, a generator, on every worker of a gang; yields what they yield, None now and then.

    When a worker is lost the call is made again on a new gang: `method` goes on from what is committed, and
    `progress()` tells how much that is. `notice` gets a line about every loss and every new gang, `failed` every loss;
    `label` names the actors. Raises NoRoom where the first gang finds no places, UserError where a worker raised one,
    WorkFailed after too many losses without progress.
    """
    attempts, before = 0, progress()
    group: WorkerGroup | None = None
    while True:
        try:
            with group or WorkerGroup(workers, bundle, cluster, label=label) as group:
                yield from group.events(method, arguments, layer_timeout_seconds)
            return
        except WorkerLost as lost:
            done = progress()
            attempts, before = (1 if done > before else attempts + 1), done
            layers = () if lost.layer is None or method != "prune" else (lost.layer,)
            units = tuple(map(layer_unit, layers))
            failed(Failure(lost.kind, str(lost), units, attempts, lost.host))
            if attempts >= ATTEMPTS:
                raise WorkFailed(f"gave up after {attempts} losses in a row: {lost}") from None
            notice(f"{lost}; going on with a new gang")
        group = rebuild(workers, bundle, cluster, label)
        notice(f"{len(group)} of {workers} workers at work again")


def rebuild(
    workers: int, bundle: Bundle, cluster: ClusterSettings, label: Label | None = None
) -> "WorkerGroup":
    """A gang of as many workers, up to `workers`, as there is room for in the cluster.

    Waits for places, which is told now and then, and asks anew only when the cluster has become larger or smaller.
    Raises WorkFailed, saying what was asked, what is free and what is busy, after `start_timeout_seconds`.
    """
    waiting = Waiting(workers, bundle, cluster.start_timeout_seconds)
    lost: WorkerLost | None = None
    while True:
        room = min(workers, capacity(bundle))

        def go_on(room: int = room) -> None:
            waiting.go_on()
            if min(workers, capacity(bundle)) != room:
                raise RoomChanged

        try:
            waiting.go_on()
            if room:
                return WorkerGroup(room, bundle, cluster, go_on=go_on, label=label)
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
        go_on: Callable[[], None] | None = None,
        label: Label | None = None,
    ) -> None:
        """`go_on` as in `Actors`."""
        seconds = cluster.start_timeout_seconds
        self._actors = Actors(
            LayerWorker,
            count,
            bundle,
            [bundle.cpus, seconds],
            timeout_seconds=seconds,
            go_on=go_on,
            concurrency_groups={"health": 1},
            spinning=True,
            label=label,
        )
        self.nodes = self._actors.nodes
        self._start_seconds = float(seconds)
        self._at = [NOWHERE] * count
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
    ) -> Iterator[Any]:
        """What the workers yield, in the order of arrival; None about once a second in between.

        Whole numbers are taken for the layers left behind, negative ones for those of a sweep before the real one.
        Raises WorkerLost and UserError.
        """
        self._at, moves, measured = [NOWHERE] * len(self), 0, False
        streams = {
            getattr(handle, method).options(num_returns="streaming").remote(*arguments): rank
            for rank, handle in enumerate(self._actors.handles)
        }
        moved, longest = time.monotonic(), 0.0
        suspect: tuple[float, Exception] | None = None
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=POLL_SECONDS)
            now = time.monotonic()
            for stream in ready:
                rank = streams[stream]
                try:
                    event = ray.get(next(stream))  # type: ignore[arg-type]
                except StopIteration:
                    del streams[stream]
                except (RayActorError, RayTaskError) as error:
                    lost = self._lost(rank, error)
                    if not isinstance(getattr(error, "cause", None), PeerLost):
                        raise lost from None
                    suspect = suspect or (now, lost)  # one of its peers is to blame: which?
                    del streams[stream]
                else:
                    if isinstance(event, int) and event > self._at[rank]:
                        self._at[rank] = event
                        if event == min(self._at):
                            longest, moved, moves = max(longest, now - moved), now, moves + 1
                    # what is swept through only is no measure of a layer that is pruned
                    measured = measured or (
                        moves > 1
                        if method != "prune"
                        else isinstance(event, Record) and "layer" in event.facts
                    )
                    yield event
            if suspect and (now - suspect[0] > CULPRIT_SECONDS or not streams):
                raise suspect[1]
            limit = layer_timeout_seconds or max(HANG_FLOOR_SECONDS, HANG_FACTOR * longest)
            if moves < 1 or not (layer_timeout_seconds or measured):
                limit = max(limit, self._start_seconds)
            if now - moved > limit:
                raise self._hanging(limit)
            if not ready:
                yield None

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
            deadline = time.monotonic() + self._start_seconds
            while joining:
                left = max(0.0, deadline - time.monotonic())
                ready, _ = ray.wait(list(joining), num_returns=1, timeout=left)
                if not ready:
                    rank = min(joining.values())
                    raise WorkerLost(
                        f"{self._named(rank)} did not start within {self._start_seconds:.0f} s"
                    )
                rank = joining.pop(ready[0])
                ray.get(ready[0])
        except (RayActorError, RayTaskError, GetTimeoutError) as error:
            raise self._lost(0 if count == 1 else None, error) from None

    def _lost(self, rank: int | None, error: Exception) -> Exception:
        """What to raise for a worker's error: the user's to mend, or a loss that a new gang may survive."""
        cause = death(error) if isinstance(error, RayActorError) else getattr(error, "cause", error)
        if isinstance(cause, UserError):
            return UserError(str(cause))
        where = self._named(rank) if rank is not None else "a worker"
        at = f" at {_place(self._at[rank])}" if rank is not None else ""
        reason = one_line(cause, 400)
        if isinstance(cause, ValueError):  # the same numbers would raise it on any worker
            return WorkFailed(f"{where}{at}: {reason}")
        host = self._actors.hosts[rank] if rank is not None else None
        layer = max(self._at[rank], 0) if rank is not None else None
        kind = "node" if isinstance(error, RayActorError) and node_died(error) else "worker"
        return WorkerLost(f"{where} was lost{at}: {reason}", host, layer, kind)

    def _hanging(self, limit: float) -> WorkerLost:
        """Names the workers that do not even say where they are, or all of them."""
        asked = {
            handle.where.options(concurrency_group="health").remote(): rank
            for rank, handle in enumerate(self._actors.handles)
        }
        _, silent = ray.wait(list(asked), num_returns=len(asked), timeout=5.0)
        ranks = sorted(asked[reference] for reference in silent) or sorted(asked.values())
        named = ", ".join(self._named(rank) for rank in ranks)
        state = "does not answer" if silent else "makes no progress"
        place = _place(min(self._at))
        hosts = ", ".join(sorted({str(self._actors.hosts[rank]) for rank in ranks}))
        text = f"{named} {state} at {place}: no step within {limit:.0f} s"
        return WorkerLost(text, hosts, max(min(self._at), 0))

    def _named(self, rank: int) -> str:
        return f"worker {rank} on {self.nodes[rank]}"


def _place(at: int) -> str:
    if NOWHERE < at < 0:
        return "the sweep before the first layer is pruned"
    return f"layer {max(at, 0)}"
