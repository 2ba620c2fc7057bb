"""Finds what a stage must not leave behind in a cluster: actors, placement groups, reserved CPUs and GPUs."""

import time
from typing import Any

import ray
from ray._private import state
from ray.util import placement_group_table


def leftovers() -> dict[str, Any]:
    """Lists what is left of a stage, detached actors included; empty where nothing is."""
    actors = [a for a in state.actors().values() if a["State"] != "DEAD"]
    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    free, total = ray.available_resources(), ray.cluster_resources()
    held = {
        name: total[name] - free.get(name, 0)
        for name in ("CPU", "GPU")
        if free.get(name, 0) < total.get(name, 0)
    }
    found = {"actors": actors, "placement groups": groups, "held": held}
    return {kind: left for kind, left in found.items() if left}


def assert_nothing_left(seconds: float = 90) -> None:
    """Waits a few seconds, since Ray takes a moment to kill actors."""
    deadline = time.monotonic() + seconds
    while left := leftovers():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
