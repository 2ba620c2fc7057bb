"""Of several workers that are lost together, the one that took the others with it is named."""

import math

import pytest

from cluster.suspects import CULPRIT_SECONDS, Suspects, WorkerLost


def suspects(*, spread=False, dead_nodes=(), ended=None):
    ended = ended or {}
    return Suspects(spread, lambda: dead_nodes, lambda rank: ended.get(rank, math.inf))


def loss(rank):
    return WorkerLost(f"worker {rank}", "", "at layer 1")


@pytest.mark.parametrize("spread", [False, True])
def test_of_two_dead_processes_the_earlier_is_named(spread):
    """NCCL ends the process of a survivor, which may be heard of first."""
    found = suspects(spread=spread, ended={0: 1007.0, 3: 1002.0})
    found.add(0, loss(0), 10.0, died=True)
    found.add(3, loss(3), 10.1, died=True)
    assert found.culprit(10.1, 2) == (None if spread else 3)
    assert found.culprit(11.0 + CULPRIT_SECONDS, 2) == 3
    assert str(found.loss(3)) == "worker 3 was lost at layer 1"


def test_a_dead_node_is_named_before_its_survivors():
    dead_nodes = []
    found = suspects(spread=True, dead_nodes=dead_nodes, ended={0: 5.0})
    found.add(0, loss(0), 0.0, died=True)
    assert found.culprit(1.0, 3) is None
    dead_nodes.append(2)  # which has reported nothing itself
    assert found.culprit(2.0, 3) == 2 and found.loss(2) is None


def test_who_is_merely_left_alone_is_named_only_where_nobody_else_is_found():
    found = suspects()
    found.add(1, loss(1), 0.0, died=False)
    assert found.culprit(1.0, 2) is None
    found.add(2, loss(2), 1.0, died=True)
    assert found.culprit(1.0, 1) == 2
    alone = suspects()
    alone.add(1, loss(1), 0.0, died=False)
    assert alone.culprit(CULPRIT_SECONDS + 1, 2) == 1
    assert alone.culprit(0.5, 0) == 1


def test_what_is_out_of_reach_may_be_a_dead_node():
    dead_nodes = []
    found = suspects(dead_nodes=dead_nodes)
    found.add(0, loss(0), 0.0, died=False)
    found.add(1, loss(1), 0.0, died=True, out_of_reach=True)
    assert found.culprit(1.0, 0) is None
    assert found.culprit(CULPRIT_SECONDS + 1, 0) == 1
    dead_nodes.append(1)
    assert found.culprit(2.0, 0) == 1
