"""A cluster that others work in too: no more of it is taken than was asked for."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibprune.config import Config
from calibprune.failures import nobody
from calibprune.stage import Record
from cluster.label import Label
from jobs import curate
from jobs.run import Run
from tests.cluster.nodes import cluster_of

WATCH: Any = SimpleNamespace(
    committed=lambda *_: None, lost=nobody, label=Label("shared", "curate")
)


@pytest.fixture(scope="module")
def four_cpus():
    with cluster_of(4):
        yield


def asking_for(**cluster) -> Run:
    tree = {"model": {"path": "m"}, "output": "runs/shared", "cluster": cluster}
    return Run(Config.model_validate(tree))


def most_at_once(run: Run, folder: Path, awaited: int) -> int:
    """Tasks of curate that were at work at the same time, of sixteen; the first wait until so many have begun."""

    def take_a_while(units: tuple[str, ...]):
        began = time.monotonic()
        (folder / units[0]).touch()
        while len(list(folder.iterdir())) < awaited and time.monotonic() < began + 60:
            time.sleep(0.05)
        time.sleep(0.2)
        yield Record(units[0], None, 0, None, {"began": began, "ended": time.monotonic()})

    batches = [(f"unit-{number:02d}",) for number in range(16)]
    facts = [record.facts for record in curate._tasks(run, take_a_while, (), batches, WATCH)]
    assert len(facts) == 16
    starts = [one["began"] for one in facts]
    return max(sum(one["began"] <= at < one["ended"] for one in facts) for at in starts)


def test_curate_takes_no_more_cores_than_its_workers_have(four_cpus, tmp_path):
    two = asking_for(workers=2, cpus_per_worker=1)
    assert most_at_once(two, tmp_path, 2) == 2
    assert len(curate._batches(two, [str(unit) for unit in range(16)])) == 8
    assert curate.tasks_at_once(asking_for(workers=3, cpus_per_worker=2)) == 6


def test_curate_takes_the_whole_cluster_where_nobody_says_how_many_workers(four_cpus, tmp_path):
    assert most_at_once(asking_for(cpus_per_worker=1), tmp_path, 3) > 2
