"""Places for actors and tasks: what one asks for, how many there are, in words what does not fit: never, or not yet."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node
from ray.util import client

from calibprune.events import note

FIRST_LINE_SECONDS, NEXT_LINE_SECONDS = 8.0, 30.0
"""Time of waiting after which a line says so, first and then repeatedly."""
NODES_NAMED = 4
COUNTED = ("CPU", "GPU")


@dataclass(frozen=True)
class Bundle:
    """What one worker asks of the cluster."""

    cpus: int
    gpus: int

    def as_resources(self) -> dict[str, float]:
        resources = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: float(amount) for name, amount in resources.items() if amount}

    def fits_in(self, resources: Mapping[str, float]) -> int:
        """How many of them such resources of one node hold; one of those that ask for nothing."""
        needs = self.as_resources().items()
        return int(min((resources.get(name, 0) // amount for name, amount in needs), default=1))


@dataclass(frozen=True)
class Node:
    """A node's CPUs and GPUs, all of them and those that nobody holds now."""

    id: str
    name: str
    """Address and the start of the id: several may share a machine."""
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
    """Number that have to find a place, without which there is no work at all."""
    bundle: Bundle
    work: str
    """What they do, in a few words."""
    host_bytes: int | None = None
    """Most host memory of one actor; None where it is not known beforehand."""
    gpu_bytes: int = 0
    """Memory of each GPU of an actor; 0 without GPUs."""
    movable_bytes: int = 0
    """Part of the GPU memory that moves to host memory where it does not fit."""
    gpu_share: float = 1.0
    """Fraction of a GPU's memory that may be used."""


class NoRoom(RuntimeError):
    """The actors or tasks asked for did not find their places in time."""


def nodes() -> list[Node]:
    """The nodes that are alive."""
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
    """How many such workers the nodes that are alive have room for, were they idle."""
    return sum(bundle.fits_in(node["Resources"]) for node in ray.nodes() if node["Alive"])


def never_fits(count: int, bundle: Bundle, cluster: list[Node]) -> str | None:
    """Why so many workers have no place even in an idle cluster, and what to change; None where they have."""
    room = sum(bundle.fits_in(node.total) for node in cluster)
    if room >= count:
        return None
    total = shown(_sum(node.total for node in cluster))
    if room:
        return (
            f"{wanted(count, bundle)} were asked for, the cluster has {total} in all, room for {room} of them: "
            f"lower cluster.workers or cluster.cpus_per_worker"
        )
    largest = max(cluster, key=lambda node: [node.total.get(n, 0) for n in ("GPU", "CPU")])
    return (
        f"no node has room for {shown(bundle.as_resources())}, the cluster has {total} in all, its largest node "
        f"{shown(largest.total)}: "
        + (
            "set cluster.gpus_per_worker=0 to work on CPUs, for which generate needs vLLM's build for CPUs"
            if bundle.gpus and not largest.total.get("GPU")
            else "lower cluster.cpus_per_worker or generate.tensor_parallel"
        )
    )


class Waiting:
    """The wait for `count` places, or for the first of them: logged now and then, and ended by NoRoom.

    `before` is what the cluster had free before these places were asked for. Where that was enough, processes are
    starting in them, and what looks busy is ours.
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

    def go_on(self) -> None:
        """Called about once a second. Raises NoRoom, naming what is free and what is merely busy, after the limit."""
        now = time.monotonic()
        if now - self._since > self._limit:
            raise self._given_up()
        if now < self._next_line or self._found:
            return
        self._next_line = now + NEXT_LINE_SECONDS
        cluster = nodes()
        free = self._free(cluster)
        busy = sum(self._bundle.fits_in(node.total) for node in cluster) - free
        if free < self._count:  # else a place is found, and a process is starting in it
            note(
                f"waiting for {wanted(self._count, self._bundle)}: {free} free, {busy} busy{_held(cluster)}, "
                f"{now - self._since:.0f} of {self._limit:g} s"
            )

    def _free(self, cluster: list[Node]) -> int:
        return sum(self._bundle.fits_in(node.free) for node in cluster)

    def _given_up(self) -> NoRoom:
        cluster = nodes()
        free, total = (
            _sum(part) for part in ([n.free for n in cluster], [n.total for n in cluster])
        )
        gone = never_fits(self._count, self._bundle, cluster)
        return NoRoom(
            f"{wanted(self._count, self._bundle)} did not become free within {self._limit:g} s; the cluster has "
            f"{shown(total)}, free now {shown(free)}, busy {shown(_sum(n.busy for n in cluster))}{_held(cluster)}: "
            + (gone or "others hold them; wait for them, or raise cluster.start_timeout_seconds")
        )


def wanted(count: int, bundle: Bundle) -> str:
    return f"{count} x ({shown(bundle.as_resources())})"


def shown(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs in words."""
    amounts = {name: resources.get(name, 0) for name in COUNTED}
    return ", ".join(
        f"{amount:g} {name}" for name, amount in amounts.items() if amount or name == "CPU"
    )


def _held(cluster: list[Node]) -> str:
    """Where what is busy is, in brackets."""
    rank = {node.id: [node.busy.get(name, 0) for name in ("GPU", "CPU")] for node in cluster}
    busy = sorted((node for node in cluster if node.busy), key=lambda n: rank[n.id], reverse=True)
    named = "; ".join(f"{shown(node.busy)} on {node.name}" for node in busy[:NODES_NAMED])
    more = f"; and on {len(busy) - NODES_NAMED} more nodes" if len(busy) > NODES_NAMED else ""
    return f" ({named}{more})" if busy else ""


def _counted(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: resources[name] for name in COUNTED if resources.get(name)}


def _sum(parts: Iterator[Mapping[str, float]] | list[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0) + amount
    return total
