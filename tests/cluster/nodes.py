"""Runs a Ray cluster of several nodes on this machine: real raylets, each with a given number of CPUs."""

import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.cluster_utils import Cluster

DEATHS_SEEN_SOON = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}


class Nodes(Cluster):
    """A cluster that starts a node again if it did not come up in time: Ray waits only 15 s for a node's agents."""

    def add_node(self, *arguments, **settings):
        for _ in range(2):
            try:
                return super().add_node(*arguments, **settings)
            except Exception as error:
                if "timed out during startup" not in str(error):
                    raise
        return super().add_node(*arguments, **settings)


@contextmanager
def cluster_of(*cpus: int, metrics: bool = False) -> Iterator[Nodes]:
    """Starts nodes with these numbers of CPUs and connects this process to them as a driver.

    With `metrics`, waits until the head serves them: a process that finds no agent within seconds never sends it any.
    """
    cluster = Nodes(
        initialize_head=True,
        head_node_args={
            "num_cpus": cpus[0],
            "include_dashboard": False,
            "_system_config": DEATHS_SEEN_SOON,
        },
    )
    try:
        for count in cpus[1:]:
            cluster.add_node(num_cpus=count)
        if metrics:
            _wait_for_metrics(cluster)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def _wait_for_metrics(cluster: Nodes, seconds: float = 120) -> None:
    (head,) = cluster.global_state.node_table()
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(metrics_url(head), timeout=10).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def metrics_url(node: dict) -> str:
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
