"""Room for workers in the cluster: what each one asks for, how many fit, and messages for those that do not."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node
from ray.util import client

from calibprune.events import note

FIRST_LINE_SECONDS, NEXT_LINE_SECONDS = 8.0, 30.0
"""Time of waiting before the first line about it is logged, and between two later ones, in seconds."""
MAX_NAMED = 4
"""Maximum number of busy nodes that a message names."""
COUNTED = ("CPU", "GPU")
"""The resources that matter here, by Ray's names."""


@dataclass(frozen=True)
class Bundle:
    """The resources that one worker asks for."""

    cpus: int
    gpus: int
    parts: int = 1
    """Number of times that it asks for them: each part is on one node, different parts may be on different nodes."""

    def as_resources(self) -> dict[str, float]:
        resources = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: float(amount) for name, amount in resources.items() if amount}

    def fits_in(self, resources: Mapping[str, float]) -> int:
        """Returns how many such parts fit into one node's resources; 1 for a worker that asks for nothing."""
        needs = self.as_resources().items()
        return int(min((resources.get(name, 0) // amount for name, amount in needs), default=1))

    def fits_into(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """Returns how many such workers fit into the resources of several nodes together."""
        return sum(map(self.fits_in, nodes)) // self.parts

    @property
    def in_words(self) -> str:
        each = in_words(self.as_resources())
        return each if self.parts == 1 else f"{self.parts} x ({each})"


@dataclass(frozen=True)
class Node:
    """A node of the cluster with its CPUs and GPUs: all of them, and those that are free now."""

    id: str
    name: str
    """Address and the start of the id, since several nodes may share a machine."""
    total: Mapping[str, float]
    free: Mapping[str, float]

    @property
    def busy(self) -> dict[str, float]:
        held = {name: self.total[name] - self.free.get(name, 0) for name in self.total}
        return {name: amount for name, amount in held.items() if amount > 0}


@dataclass(frozen=True)
class Need:
    """Actors of a stage that are at work at the same time."""

    stage: str
    actor: str
    count: int
    least: int
    """Smallest number of these actors with which the stage can work at all."""
    bundle: Bundle
    work: str
    """Description of their work in a few words."""
    host_bytes: int | None = None
    """Peak host memory of one actor, in bytes; None where it is not known beforehand."""
    gpu_bytes: int = 0
    """Memory needed on each GPU of an actor, in bytes; 0 without GPUs."""
    movable_bytes: int = 0
    """Part of `gpu_bytes` that moves to host memory where it does not fit the GPU."""
    gpu_share: float = 1.0
    """Fraction of a GPU's memory that may be used."""
    more_room: str = "use larger GPUs, or nodes with more memory"
    """Advice where an actor does not fit the memory."""


class NoRoom(RuntimeError):
    """The cluster had no room for the requested workers in time."""


def nodes() -> list[Node]:
    """Returns the nodes that are alive."""
    available = _available()
    return [
        Node(
            id=node["NodeID"],
            name=f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})",
            total=_counted(node["Resources"]),
            free=_counted(available.get(node["NodeID"], {})),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _available() -> dict[str, dict[str, float]]:
    if client.ray.is_connected():  # only processes of the cluster itself may ask
        return ray.get(ray.remote(num_cpus=0)(available_resources_per_node).remote())
    return available_resources_per_node()


def capacity(bundle: Bundle) -> int:
    """Returns how many such workers would fit onto the live nodes if these were idle."""
    return bundle.fits_into(node["Resources"] for node in ray.nodes() if node["Alive"])


def never_fits(count: int, bundle: Bundle, cluster: list[Node]) -> str | None:
    """Explains why `count` workers do not fit even into an idle cluster, and what to change; None where they fit."""
    room = bundle.fits_into(node.total for node in cluster)
    if room >= count:
        return None
    total = in_words(_sum(node.total for node in cluster))
    if room:
        return (
            f"{request_in_words(count, bundle)} were asked for, the cluster has {total} in all, room for {room} of "
            f"them: lower cluster.workers or cluster.cpus_per_worker"
        )
    largest = max(cluster, key=lambda node: [node.total.get(n, 0) for n in ("GPU", "CPU")])
    nowhere = "no node has room" if bundle.parts == 1 else "there is no room"
    advice = "lower cluster.cpus_per_worker or generate.tensor_parallel"
    if bundle.gpus and not largest.total.get("GPU"):
        advice = "set cluster.gpus_per_worker=0 to work on CPUs, for which generate needs vLLM's build for CPUs"
    elif bundle.gpus > 1 and bundle.parts == 1:
        advice += ", and split a model that needs several nodes by generate.pipeline_parallel"
    return (
        f"{nowhere} for {bundle.in_words}, the cluster has {total} in all, its largest node "
        f"{in_words(largest.total)}: {advice}"
    )


class Waiting:
    """The wait for room for `count` workers: logs what is missing from time to time, and raises NoRoom in the end.

    `before` is the state of the nodes before the room was requested. Where they had enough of it then, what is busy
    now are these workers themselves, starting up, and nothing is logged.
    """

    def __init__(
        self,
        count: int,
        bundle: Bundle,
        limit_seconds: float,
        before: list[Node] | None = None,
    ) -> None:
        self._count, self._bundle, self._limit = count, bundle, limit_seconds
        self._found = before is not None and self._free(before) >= count
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()
        self._next_line = self._since + FIRST_LINE_SECONDS

    def check(self) -> None:
        """Logs the wait when a line is due; to be called about once a second.

        Raises NoRoom after the limit, with what is free and what is merely busy.
        """
        now = time.monotonic()
        if now - self._since > self._limit:
            raise self._timed_out()
        if now < self._next_line or self._found:
            return
        self._next_line = now + NEXT_LINE_SECONDS
        cluster = nodes()
        free = self._free(cluster)
        busy = self._bundle.fits_into(node.total for node in cluster) - free
        if free < self._count:  # otherwise there is room by now, and a process is starting in it
            note(
                f"waiting for {request_in_words(self._count, self._bundle)}: {free} free, "
                f"{busy} busy{_busy_nodes(cluster)}, {now - self._since:.0f} of {self._limit:g} s"
            )

    def _free(self, cluster: list[Node]) -> int:
        return self._bundle.fits_into(node.free for node in cluster)

    def _timed_out(self) -> NoRoom:
        cluster = nodes()
        free, total = (
            _sum(part) for part in ([n.free for n in cluster], [n.total for n in cluster])
        )
        never = never_fits(self._count, self._bundle, cluster)
        return NoRoom(
            f"{request_in_words(self._count, self._bundle)} did not become free within {self._limit:g} s; the cluster "
            f"has {in_words(total)}, free now {in_words(free)}, "
            f"busy {in_words(_sum(n.busy for n in cluster))}{_busy_nodes(cluster)}: "
            + (
                never
                or "other work holds them; wait until it ends, or raise cluster.start_timeout_seconds"
            )
        )


def request_in_words(count: int, bundle: Bundle) -> str:
    """Describes a number of workers, such as "2 x (4 CPU, 1 GPU)"."""
    return f"{count} x ({bundle.in_words})"


def in_words(resources: Mapping[str, float]) -> str:
    """Describes CPUs and GPUs, such as "4 CPU, 1 GPU"."""
    amounts = {name: resources.get(name, 0) for name in COUNTED}
    return ", ".join(
        f"{amount:g} {name}" for name, amount in amounts.items() if amount or name == "CPU"
    )


def _busy_nodes(cluster: list[Node]) -> str:
    """Lists what is busy on which nodes in parentheses, those with the most busy GPUs first."""
    rank = {node.id: [node.busy.get(name, 0) for name in ("GPU", "CPU")] for node in cluster}
    busy = sorted((node for node in cluster if node.busy), key=lambda n: rank[n.id], reverse=True)
    named = "; ".join(f"{in_words(node.busy)} on {node.name}" for node in busy[:MAX_NAMED])
    more = f"; and on {len(busy) - MAX_NAMED} more nodes" if len(busy) > MAX_NAMED else ""
    return f" ({named}{more})" if busy else ""


def _counted(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: resources[name] for name in COUNTED if resources.get(name)}


def _sum(parts: Iterator[Mapping[str, float]] | list[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0) + amount
    return total
