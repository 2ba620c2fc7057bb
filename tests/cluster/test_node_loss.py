"""A node of the cluster dies under a gang, and comes back."""

import signal

import pytest

from tests.cluster.gangs import shards
from tests.cluster.nodes import cluster_of


@pytest.mark.slow
def test_a_node_that_dies_and_one_that_comes_back(failpoints, run, alone):
    with cluster_of(1, 1, 1) as cluster:
        lost = cluster.list_all_nodes()[-1]
        events = run.events(workers=3)
        stopped, killed, returned = failpoints / "solve-2-0", False, False
        stopped.write_text(str(int(signal.SIGSTOP)))  # the others wait for this worker at layer 2
        for _ in events:
            if not killed and not stopped.exists():
                cluster.remove_node(lost, allow_graceful=False)  # SIGKILL of its raylet
                killed = True
            if killed and not returned and "2 of 3 workers" in run.heard.text:
                (failpoints / "solve-4-0").touch()
                cluster.add_node(num_cpus=1)
                returned = True
        assert shards(run.stage) == alone("float32", run.way)
        assert killed and returned, run.heard.text
        assert run.heard.losses[0].kind == "node", run.heard.losses[0]
        assert "its node died" in run.losses[0] and "layer 2" in run.losses[0]
        assert "3 of 3 workers at work again" in run.heard.text.rpartition("2 of 3 workers")[2]
