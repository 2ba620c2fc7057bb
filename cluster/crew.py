"""Actors that work independently of each other: as many as the cluster has room for, while the others wait for room.

They share no placement group, so that a new node is used at once and a lost one takes only its own actors with it.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from calibprune.errors import UserError
from calibprune.events import Lost, emit
from calibprune.redact import one_line
from cluster.actors import actor_options, death
from cluster.label import Label
from cluster.places import Bundle, Waiting, capacity, nodes

START_FAILURES = 5
"""Failed starts in a row, while no other actor is up, after which the cause is taken to be the same everywhere."""
RESTART_SECONDS = 5.0
"""Pause after the first failed start, in seconds; it grows with every further one, up to MAX_RESTART_SECONDS."""
MAX_RESTART_SECONDS = 60.0
STOP_SECONDS, HASTY_STOP_SECONDS = 15.0, 1.0
"""Time that actors have to shut down; and when the driver was asked to stop, since Ray then kills it after 3 s."""


class StartFailed(RuntimeError):
    """No actor of a stage comes up; the message has the last cause."""


@dataclass(eq=False)
class Member:
    """One actor: waiting for a place, then starting, then ready."""

    handle: Any
    slot: int
    """Number of the actor, which its replacement takes over."""
    pending: Any
    """Result that arrives when the current phase ends; None once ready."""
    phase: Literal["placing", "starting", "ready"] = "placing"
    since: float = field(default_factory=time.monotonic)
    node: str | None = None
    """Name of its machine, known once `start()` has returned it."""
    group: Any = None
    """Placement group of an actor whose parts may be on several nodes."""


class Crew:
    """Up to `count` actors of one class, whose constructor is quick and whose `start()` does the long work.

    `start()` returns the name of its machine. With `count` None there are as many as the cluster has room for at the
    time; `kind` and `label` name the actors. A context manager: on leaving it calls their `stop()`, where the class
    has one, and kills them. Raises NoRoom, with what was requested, what is free and what is busy, when not even one
    finds room within `start_seconds`.
    """

    def __init__(
        self,
        actor_class: Any,
        count: int | None,
        bundle: Bundle,
        arguments: Sequence[Any],
        *,
        start_seconds: float,
        concurrency: int = 1,
        label: Label | None = None,
        kind: str = "engine",
    ) -> None:
        self._count, self._bundle, self._start_seconds = count, bundle, float(start_seconds)
        self._class, self._stops = (
            ray.remote(max_restarts=0)(actor_class),
            hasattr(actor_class, "stop"),
        )
        self._options = actor_options(bundle) | {"max_concurrency": concurrency}
        self._arguments, self.label, self.kind = arguments, label, kind
        self.members: list[Member] = []
        self._waiting = Waiting(1, bundle, self._start_seconds, nodes())
        self._failures, self._rest_until = 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopping = [member.handle.stop.remote() for member in self.ready if self._stops]
        hasty = kind is not None and not issubclass(kind, Exception)
        seconds = HASTY_STOP_SECONDS if hasty else STOP_SECONDS
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=seconds)
        for member in list(self.members):
            self.dismiss(member)

    @property
    def count(self) -> int:
        """Maximum number of actors at a time."""
        return max(1, capacity(self._bundle)) if self._count is None else self._count

    @property
    def ready(self) -> list[Member]:
        return [member for member in self.members if member.phase == "ready"]

    def fill(self, wanted: int) -> None:
        """Requests the actors that are missing from `wanted`, unless starts have just failed."""
        if time.monotonic() < self._rest_until or len(self.members) >= wanted:
            return
        count = min(wanted, self.count)
        while len(self.members) < count:
            slot = min(set(range(count)) - {member.slot for member in self.members})
            named = {"name": self.label.actor(self.kind, slot)} if self.label else {}
            group = _group(self._bundle)
            place = _place(self._bundle) if group is None else _first_place(group)
            handle = self._class.options(**self._options | named | place).remote(*self._arguments)
            member = Member(handle, slot, handle.__ray_ready__.remote(), group=group)
            self.members.append(member)

    def pending(self) -> dict[Any, Member]:
        return {member.pending: member for member in self.members if member.pending is not None}

    def advance(self, member: Member) -> None:
        """Moves a member whose phase is over into the next one.

        Raises the UserError of its start, and StartFailed as `start_failed` does.
        """
        try:
            answer: Any = ray.get(member.pending)
        except RayError as error:
            task = isinstance(error, RayTaskError)
            self.start_failed(member, error.cause or error if task else death(error))
            return
        member.since = time.monotonic()
        if member.phase == "placing":
            member.phase, member.pending = "starting", member.handle.start.remote()
        else:
            member.phase, member.pending, member.node = "ready", None, answer
            self._failures = 0

    def start_failed(self, member: Member, cause: Exception) -> None:
        """Removes an actor that did not come up. Raises StartFailed after too many in a row, a UserError at once."""
        if isinstance(cause, UserError):
            raise cause from None
        self.dismiss(member)
        self._failures += 1
        reason = one_line(cause)
        emit(Lost(self.kind, f"did not start: {reason}", attempt=self._failures))
        if self._failures >= START_FAILURES and all(m.phase == "placing" for m in self.members):
            raise StartFailed(f"{self._failures} starts in a row failed, the last one: {reason}")
        rest = min(RESTART_SECONDS * self._failures, MAX_RESTART_SECONDS)
        self._rest_until = time.monotonic() + rest

    def overdue(self) -> Iterator[Member]:
        """Yields the members that take too long to start. Raises NoRoom when none has found room for too long."""
        now = time.monotonic()
        if any(member.phase != "placing" for member in self.members) or not self.members:
            self._waiting.restart()
        self._waiting.check()
        for member in list(self.members):
            if member.phase == "starting" and now - member.since > self._start_seconds:
                yield member

    def dismiss(self, member: Member) -> None:
        """Kills an actor, if it still lives; `fill` then requests another."""
        ray.kill(member.handle)
        if member.group is not None:
            remove_placement_group(member.group)
        self.members.remove(member)


def _group(bundle: Bundle) -> Any:
    """Returns a placement group, on few nodes, with one GPU in every bundle, as vLLM wants it; None for an actor on one
    node."""
    if bundle.parts == 1:
        return None
    each = {"CPU": bundle.cpus / bundle.gpus, "GPU": 1.0}
    return placement_group([each] * (bundle.gpus * bundle.parts), strategy="PACK")


def _first_place(group: Any) -> dict[str, Any]:
    """Returns the options of an actor that starts others in its placement group; it takes nothing of it itself."""
    place = PlacementGroupSchedulingStrategy(
        group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
    )
    return {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": place}


def _place(bundle: Bundle) -> dict[str, Any]:
    """Returns the placement of an actor that asks for nothing: the node with most free cores, so that it stays off a
    head that is kept free of work."""
    if bundle.as_resources():
        return {}
    node = max(nodes(), key=lambda node: (node.free.get("CPU", 0), node.total.get("CPU", 0)))
    # A soft one is ignored now and then for actors without resources. A node that dies costs one start.
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False)}
