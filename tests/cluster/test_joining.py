"""Nodes that join and leave while units are worked on: real raylets, one of them killed."""

from cluster.crew import Crew
from cluster.dispatch import dispatch
from cluster.room import Bundle
from tests.cluster.nodes import cluster_of
from tests.cluster.test_dispatch import Worker


def test_a_node_that_joins_is_used_and_one_that_leaves_costs_no_unit(tmp_path):
    bad: dict[str, str] = {}
    with (
        cluster_of(0, 1) as cluster,
        Crew(
            Worker, 2, Bundle(1, 0), [str(tmp_path), {"seconds": 0.2}], start_seconds=60, concurrency=3
        ) as crew,
    ):  # fmt: skip
        first = cluster.list_all_nodes()[1]
        most, done, left = 0, [], False
        work = dispatch(
            crew, "work", [f"{unit:03d}" for unit in range(120)],
            in_flight=2, attempts=3, set_aside=bad.__setitem__,
        )  # fmt: skip
        for record in work:
            most = max(most, len(crew.ready))
            if record is None:
                continue
            done.append(record.unit)
            if len(done) == 5:
                cluster.add_node(num_cpus=1)
            if most == 2 and not left:
                cluster.remove_node(first, allow_graceful=False)
                left = True
    assert left, "the second node was never used"
    assert sorted(done) == [f"{unit:03d}" for unit in range(120)] and not bad
