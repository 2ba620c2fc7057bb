"""The actors of a stage: the options that each is started with, a group of them, and why one died."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray._private import state
from ray.exceptions import RayError
from ray.util import client
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from calibprune.redact import plain
from cluster.label import Label
from cluster.places import Bundle, Waiting

POLL_SECONDS = 1.0


class Actors:
    """`count` actors of one class, each on a bundle of its own; a context manager that kills them on leaving.

    Raises NoRoom, with what was requested, what is free and what is busy, when the cluster has no room in time.
    `while_waiting` replaces that time limit: it is called about once a second until there is room, and may raise.
    """

    def __init__(
        self,
        actor_class: Any,
        count: int,
        bundle: Bundle,
        arguments: Sequence[Any],
        *,
        timeout_seconds: float,
        while_waiting: Callable[[], None] | None = None,
        concurrency_groups: Mapping[str, int] | None = None,
        spinning: bool = False,
        label: Label | None = None,
    ) -> None:
        self.bundle, self._label = bundle, label
        self._group = placement_group([bundle.as_resources()] * count, strategy="PACK")
        while_waiting = while_waiting or Waiting(count, bundle, timeout_seconds).check
        try:
            while not self._group.wait(POLL_SECONDS):
                while_waiting()
        except BaseException:
            remove_placement_group(self._group)
            raise
        groups: dict[str, Any] = {"concurrency_groups": dict(concurrency_groups or {}) or None}
        self._class = ray.remote(max_restarts=0, **groups)(actor_class)
        self._arguments = arguments
        self._options = actor_options(bundle, spinning)
        self._order = self._by_node(count)
        self.handles = [self._start(index) for index in range(count)]

    def __enter__(self) -> "Actors":
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            ray.kill(handle)
        remove_placement_group(self._group)

    def _start(self, index: int) -> Any:
        place = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=self._order[index]
        )
        named = {"name": self._label.actor("worker", index)} if self._label else {}
        return self._class.options(scheduling_strategy=place, **self._options, **named).remote(
            *self._arguments
        )

    def _by_node(self, count: int) -> list[int]:
        """Returns the bundle indices sorted by node: a placement group lists its bundles in no such order."""
        node_of = placement_group_table(self._group)["bundles_to_node_id"]
        order = sorted(range(count), key=lambda index: (node_of[index], index))
        names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        self.nodes = [f"{names.get(node_of[i], '?')} ({node_of[i][:8]})" for i in order]
        hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
        self.hosts = [hosts.get(node_of[i]) for i in order]
        self.node_ids = [node_of[i] for i in order]
        return order


def actor_options(bundle: Bundle, spinning: bool = False) -> dict[str, Any]:
    """Returns the options that every actor is started with: no restarts, since the driver must see a death to act."""
    return {
        "num_cpus": bundle.cpus,
        "num_gpus": bundle.gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": _environment(bundle, spinning)},
    }


def _environment(bundle: Bundle, spinning: bool) -> dict[str, str]:
    # Ray leaves all of a node's GPUs visible to an actor that asked for none.
    hidden = {} if bundle.gpus else {"CUDA_VISIBLE_DEVICES": ""}
    # Blocks of gigabytes come and go beside long-lived hidden states. An engine shares its memory between processes,
    # which does not work with segments that grow.
    growing = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if bundle.gpus and spinning else {}
    return _thread_environment(bundle.cpus, spinning) | hidden | growing


def _thread_environment(cpus: int, spinning: bool) -> dict[str, str]:
    """Returns variables that decide how OpenMP threads wait for one another between two operations.

    By default they spin for a long time, which makes CPU work up to ten times slower where other processes want the
    same cores; sleeping is safe. With `spinning` they spin briefly, for work of many small operations that has its
    cores to itself; freed memory is then kept for the next operation too.
    """
    environment = {"OMP_NUM_THREADS": str(cpus)}
    if not spinning:
        return environment | {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    memory = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    return environment | {"GOMP_SPINCOUNT": "100000"} | memory


def node_died(error: RayError) -> bool:
    """Returns whether an actor was lost together with its node, or was preempted."""
    return bool(getattr(error, "preempted", False)) or "its node has died" in str(error)


def ended_at(handle: Any) -> float:
    """Returns when an actor's process ended, in ms since the epoch; infinity where the cluster does not know yet."""
    if client.ray.is_connected():  # only processes of the cluster itself may ask
        return math.inf
    return state.actors(handle._actor_id.hex()).get("EndTime") or math.inf


def death(error: RayError) -> RuntimeError:
    """Returns why an actor died: the last line of Ray's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return RuntimeError(plain(lines[-1] if lines else type(error).__name__))
