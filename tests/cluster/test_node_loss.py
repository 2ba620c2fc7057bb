"""A node of the cluster dies under a gang, and comes back."""

import pytest

from cluster.worker_group import run_gang
from tests.cluster.gangs import BUNDLE, SETTINGS, shards
from tests.cluster.nodes import cluster_of


@pytest.mark.slow
def test_a_node_that_dies_and_one_that_comes_back(failpoints, run, alone):
    with cluster_of(1, 1, 1) as cluster:
        lost = cluster.list_all_nodes()[-1]
        events = run_gang(
            "prune", run.arguments, workers=3, bundle=BUNDLE, cluster=SETTINGS,
            progress=lambda: len(run.stage.done_units()), notice=run.notices.append,
        )  # fmt: skip
        killed = returned = False
        for _ in events:
            done = len(run.stage.done_units())
            if done >= 2 and not killed:
                cluster.remove_node(lost, allow_graceful=False)  # SIGKILL of its raylet
                killed = True
            if killed and not returned and any("2 of 3" in notice for notice in run.notices):
                cluster.add_node(num_cpus=1)
                (failpoints / "solve-4-0").touch()
                returned = True
        assert shards(run.stage) == alone("float32", run.way)
        assert killed and returned, run.notices
        assert "3 of 3 workers at work again" in run.notices[-1]
