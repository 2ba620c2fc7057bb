"""Nodes that join and leave while units are worked on: real raylets, one of them killed."""

import itertools
import time
from collections.abc import Iterator, Sequence

import ray

from calibprune.events import SET_ASIDE, Event, Lost, UnitDone
from calibprune.stage import Record
from cluster.crew import Crew
from cluster.label import Label
from cluster.places import Bundle
from cluster.queue import work_through
from cluster.unit_worker import UnitWorker
from tests.cluster.nodes import cluster_of
from tests.cluster.test_queue import Worker


def test_a_node_that_joins_is_used_and_one_that_leaves_costs_no_unit(tmp_path):
    bad: list[Event] = []
    with (
        cluster_of(0, 1) as cluster,
        Crew(
            Worker, 2, Bundle(1, 0), [str(tmp_path), {"seconds": 0.2}], start_seconds=240, concurrency=3
        ) as crew,
    ):  # fmt: skip
        first = cluster.list_all_nodes()[1]
        most, given, done, left = 0, [], [], False
        names = map(str, itertools.count())
        deadline = time.monotonic() + 240

        def units():
            """Yields enough units for two nodes until the first node has left, then 20 more."""
            while not left:
                ready = list(itertools.islice(names, max(0, len(done) + 6 - len(given))))
                given.extend(ready)
                yield from ([unit] for unit in ready)
                yield None
            given.extend(last := list(itertools.islice(names, 20)))
            yield from ([unit] for unit in last)

        for event in work_through(crew, "work", units(), in_flight=2):
            most = max(most, len(crew.ready))
            assert left or time.monotonic() < deadline, "the second node was never used"
            if isinstance(event, Lost) and event.kind == SET_ASIDE:
                bad.append(event)
            if not isinstance(event, UnitDone):
                continue
            done.append(event.record.unit)
            if len(done) == 5:
                cluster.add_node(num_cpus=1)
            if most == 2 and not left:
                cluster.remove_node(first, allow_graceful=False)
                left = True
    assert sorted(done) == sorted(given) and not bad


def where(units: Sequence[str]) -> Iterator[Event]:
    yield UnitDone(
        Record(units[0], None, 0, None, {"node": ray.get_runtime_context().get_node_id()})
    )


def test_a_worker_that_asks_for_nothing_goes_where_work_is_placed():
    """It does not go to a head without CPUs, although the driver runs there."""
    with cluster_of(0, 1) as cluster:
        with Crew(
            UnitWorker, 1, Bundle(0, 0), [where, Label("run", "x")], start_seconds=240, kind="worker"
        ) as crew:  # fmt: skip
            done = [e for e in work_through(crew, "make", [("a",)]) if isinstance(e, UnitDone)]
        (node,) = (event.record.facts["node"] for event in done)
        assert node == cluster.list_all_nodes()[1].node_id
