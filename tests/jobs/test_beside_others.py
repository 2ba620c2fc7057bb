"""A cluster with the work of others: a run takes no more of it than was requested."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from calibprune.calibration.curate_units import Curation
from calibprune.config import Config
from calibprune.events import Event, UnitDone
from calibprune.stage import Record
from cluster.queue import Patience
from jobs import curate
from jobs.run import Run
from tests.cluster.nodes import cluster_of


@pytest.fixture(scope="module")
def four_cpus():
    with cluster_of(4):
        yield


def asking_for(**cluster) -> Run:
    tree = {"model": {"path": "m"}, "output": "runs/shared", "cluster": cluster}
    return Run(Config.model_validate(tree))


def most_at_once(run: Run, folder: Path, awaited: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Returns the maximum number of curate's units at work at once; the first ones wait until `awaited` have begun."""

    def take_a_while(curation: Curation, units: Sequence[str]) -> Iterator[Event]:
        began = time.monotonic()
        (folder / units[0]).touch()
        while len(list(folder.iterdir())) < awaited and time.monotonic() < began + 60:
            time.sleep(0.05)
        time.sleep(0.2)
        facts = {"began": began, "ended": time.monotonic()}
        yield UnitDone(Record(units[0], None, 0, None, facts))

    monkeypatch.setattr(curate, "make_units", take_a_while)
    curation = Curation("runs/shared/curate", run.config.curate, ())
    batches = [(f"unit-{number:02d}",) for number in range(16)]
    events = curate._make(run, curation, batches, Patience())
    facts = [event.record.facts for event in events if isinstance(event, UnitDone)]
    assert len(facts) == 16
    starts = [one["began"] for one in facts]
    return max(sum(one["began"] <= at < one["ended"] for one in facts) for at in starts)


def test_curate_takes_no_more_cores_than_its_workers_have(four_cpus, tmp_path, monkeypatch):
    two = asking_for(workers=2, cpus_per_worker=1)
    assert most_at_once(two, tmp_path, 2, monkeypatch) == 2
    units = [str(unit) for unit in range(16)]
    assert len(list(curate._in_phases(two, [units], set(units)))) == 8
    assert curate._cores(asking_for(workers=3, cpus_per_worker=2)) == 6


def test_curate_takes_the_whole_cluster_where_nobody_says_how_many_workers(
    four_cpus, tmp_path, monkeypatch
):
    assert most_at_once(asking_for(cpus_per_worker=1), tmp_path, 3, monkeypatch) > 2
