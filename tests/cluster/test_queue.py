"""Units of work over real Ray actors that die, fail, hang, come late and leave."""

import os
import re
import time
from pathlib import Path

import pytest
import ray

from calibprune.config.model import ClusterSettings
from calibprune.errors import UserError
from calibprune.stage import Record
from cluster.crew import Crew, StartFailed
from cluster.places import Bundle, NoRoom
from cluster.queue import Patience, Queue, dispatch
from cluster.session import connect
from tests.cluster.leftovers import assert_nothing_left, leftovers


@pytest.fixture(scope="module")
def cluster():
    with connect(ClusterSettings()):
        yield


@pytest.fixture(autouse=True)
def nothing_left(cluster):
    """Whatever a test does to its actors, none is left after it."""
    yield
    assert_nothing_left()


class Worker:
    """Commits units; misbehaves once, or always, for the units it is told to."""

    def __init__(self, folder: str, trouble: dict[str, str]) -> None:
        self._folder, self._trouble = Path(folder), trouble

    def start(self) -> None:
        trouble = self._trouble.get("start", "")
        starts = len(list(self._folder.glob("start.*")))
        (self._folder / f"start.{starts}").touch()
        if trouble == "user":
            raise UserError("the context is too short")
        if trouble == "die always" or (trouble == "die" and starts == 0):
            os._exit(1)
        if trouble == "hang" and starts == 0:
            time.sleep(1000)

    def stop(self) -> None:
        (self._folder / f"stopped.{os.getpid()}").touch()

    def work(self, unit: str) -> Record:
        attempt = len(list(self._folder.glob(f"{unit}.*")))
        (self._folder / f"{unit}.{attempt}").touch()
        trouble = self._trouble.get(unit, "")
        if trouble.endswith("always") or attempt == 0:
            if trouble.startswith("die"):
                os._exit(1)
            if trouble.startswith("hang"):
                time.sleep(1000)
            if trouble.startswith("raise"):
                raise ValueError("the prompt is poisoned")
            if trouble.startswith("user"):
                raise UserError("the prefix source is gone")
        time.sleep(0 if trouble == "no work" else self._trouble.get("seconds", 0))
        return Record(unit, None, 0, None, {"attempt": attempt, "node": os.environ.get("NODE")})


def run(folder, trouble, *, units=6, workers=2, start_seconds=240, in_flight=2, **options):
    """(attempt that did it, for every unit done; cause, for every unit set aside)"""
    bad: dict[str, str] = {}
    with Crew(
        Worker, workers, Bundle(1, 0), [str(folder), trouble], start_seconds=start_seconds, concurrency=3
    ) as crew:  # fmt: skip
        records = dispatch(
            crew, "work", [str(u) for u in range(units)],
            in_flight=in_flight, attempts=3, set_aside=bad.__setitem__, **options,
        )  # fmt: skip
        done = [record for record in records if record is not None]
    assert len({record.unit for record in done}) == len(done)
    return {record.unit: record.facts["attempt"] for record in done}, bad


def test_every_unit_is_done_once(cluster, tmp_path):
    assert run(tmp_path, {}) == ({str(unit): 0 for unit in range(6)}, {})
    assert len(list(tmp_path.glob("[0-9]*"))) == 6


def test_units_may_become_ready_while_others_are_worked_on(cluster, tmp_path):
    more = iter([["0"], [], ["1", "2"], ["3"]])
    assert run(tmp_path, {"1": "raise"}, units=0, more=more)[0].keys() == {"0", "1", "2", "3"}
    assert next(more, None) is None


@pytest.mark.parametrize("trouble", ["die", "raise"])
def test_a_unit_that_fails_once_is_done_again(cluster, tmp_path, trouble):
    attempts, bad = run(tmp_path, {"2": trouble, "5": trouble})
    assert attempts.keys() == {str(unit) for unit in range(6)} and not bad
    assert attempts["2"] >= 1 and attempts["5"] >= 1


def test_a_hanging_actor_is_treated_like_a_dead_one(cluster, tmp_path):
    attempts, _ = run(tmp_path, {"1": "hang"}, timeout_seconds=5)
    assert attempts.keys() == {str(unit) for unit in range(6)} and attempts["1"] >= 1


@pytest.mark.parametrize(("trouble", "cause"), [("raise always", "poisoned"), ("die always", "")])
def test_a_unit_that_fails_too_often_is_set_aside_and_all_others_are_done(
    cluster, tmp_path, trouble, cause
):
    attempts, bad = run(tmp_path, {"3": trouble}, workers=1, units=5)
    assert attempts.keys() == {"0", "1", "2", "4"}
    assert bad.keys() == {"3"} and cause in bad["3"]
    assert 3 <= len(list(tmp_path.glob("3.*"))) <= 4  # once more where it died beside another


def test_after_a_failure_the_others_come_first():
    queue = Queue(["a", "b", "c"], 2, lambda unit, reason: None)
    queue.failed([queue.take([])], ValueError())
    assert [queue.take([]) for _ in range(3)] == ["b", "c", "a"]


def test_units_that_went_down_together_are_tried_alone_at_once_and_the_deadly_one_last():
    queue = Queue(["a", "b", "c", "d"], 3, lambda unit, reason: None)
    queue.failed([queue.take([]), queue.take(["a"])], OSError())
    assert queue.take([]) == "a" and queue.take(["a"]) is None
    queue.failed(["a"], OSError())
    assert queue.take([]) == "b" and queue.take(["b"]) is None
    assert [queue.take([]), queue.take(["c"])] == ["c", "d"] and queue.take(["d"]) is None
    assert queue.take([]) == "a" and not queue


def test_failures_in_a_row_are_counted_from_the_last_unit_done(cluster, tmp_path):
    told = []
    bad = {"0": "raise always", "1": "raise always"}
    run(
        tmp_path, bad, workers=1, units=4, in_flight=1, in_a_row=lambda count, reason: told.append(count)
    )  # fmt: skip
    assert told == [1, 2, 1, 2, 3, 4]


def test_what_no_unit_can_be_blamed_for_is_no_failure_in_a_row():
    told = []
    queue = Queue(["a", "b"], 9, print, lambda count, reason: told.append(count))
    queue.failed(["a"], ValueError())
    queue.failed(["b"], ValueError())
    queue.failed(["a"], ValueError(), counted=False)
    queue.failed(["a", "b"], OSError())
    assert told == [1, 2]
    queue.succeeded()
    queue.failed(["b"], ValueError())
    assert told == [1, 2, 1]


def test_a_unit_that_is_lost_with_its_node_again_and_again_is_blamed_in_the_end():
    bad: dict[str, str] = {}
    queue, done, lost = Queue(["a", "b", "c"], 3, bad.__setitem__), [], 0
    while queue and lost < 20:
        units = [queue.take([])]
        units += filter(None, [queue.take(units)])
        if "b" in units:
            queue.failed(units, OSError("its node has died"), counted=False)
            lost += 1
        else:
            done += units
    assert done == ["a", "c"] and bad == {"b": "its node has died"}
    assert lost == 10 + 1 + 3  # the eleventh time beside another
    queue.failed([], OSError(), counted=False)  # a node without any


def test_the_first_unit_may_take_longer_than_what_was_measured_by_another_driver(
    cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr("cluster.queue.HANG_FLOOR_SECONDS", 0.1)
    trouble = {"seconds": 1.5}
    attempts, _ = run(tmp_path, trouble, units=1, longest=0.01, first_seconds=60)
    assert attempts == {"0": 0}


def test_what_was_measured_by_another_driver_counts(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.queue.HANG_FLOOR_SECONDS", 0.1)
    attempts, _ = run(tmp_path, {"seconds": 1.5}, units=1, longest=10.0, first_seconds=0.1)
    assert attempts == {"0": 0}


def test_a_unit_without_work_does_not_shorten_the_time_of_others(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.queue.HANG_FLOOR_SECONDS", 0.1)
    work = {"0": 0.0, "1": 7.0}
    attempts, _ = run(
        tmp_path, {"0": "no work", "seconds": 3}, units=2, workers=1, first_seconds=60, work=work.__getitem__
    )  # fmt: skip
    assert attempts == {"0": 0, "1": 0}


def test_what_a_unit_took_counts_for_units_of_no_more_work():
    work = {"empty": 0.0, "small": 3.0, "large": 500.0}
    patience = Patience(None, 0.0, 3600.0, work.__getitem__)
    patience.learn("empty", 0.1)
    assert {patience.seconds(unit) for unit in work} == {3600.0}
    patience.learn("small", 2.0)
    assert [patience.seconds(unit) for unit in work] == [300.0, 300.0, 3600.0]
    patience.learn("large", 400.0)
    assert {patience.seconds(unit) for unit in work} == {4000.0}


def test_what_the_user_can_mend_ends_the_stage_at_once(cluster, tmp_path):
    with pytest.raises(UserError, match="the prefix source is gone"):
        run(tmp_path, {"0": "user"})
    assert len(list(tmp_path.glob("0.*"))) == 1


@pytest.mark.parametrize("trouble", ["die", pytest.param("hang", marks=pytest.mark.slow)])
def test_a_start_that_fails_once_costs_no_unit_an_attempt(cluster, tmp_path, trouble):
    seconds = 10 if trouble == "hang" else 240
    attempts, _ = run(tmp_path, {"start": trouble}, workers=1, units=3, start_seconds=seconds)
    assert attempts == {"0": 0, "1": 0, "2": 0}


def test_starts_that_fail_again_and_again_end_the_stage(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.crew.RESTART_SECONDS", 0.1)
    with pytest.raises(StartFailed, match="5 starts in a row failed"):
        run(tmp_path, {"start": "die always"}, workers=1)
    with pytest.raises(UserError, match="the context is too short"):
        run(tmp_path, {"start": "user"})


def test_an_actor_that_fits_no_node_says_what_was_asked_and_what_is_there(cluster, tmp_path):
    with (
        Crew(
            Worker, 2, Bundle(1000, 0), [str(tmp_path), {}], start_seconds=2, concurrency=1
        ) as crew,
        pytest.raises(NoRoom, match=r"no node has room for 1000 CPU, the cluster has \d+ CPU"),
    ):
        list(dispatch(crew, "work", ["0"], in_flight=1, attempts=3, set_aside=print))


def test_a_place_that_others_hold_is_told_while_waiting_and_after(
    cluster, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("cluster.places.FIRST_LINE_SECONDS", 1.0)
    cpus = int(ray.cluster_resources()["CPU"])
    with Crew(
        Worker, 1, Bundle(cpus, 0), [str(tmp_path), {}], start_seconds=240, concurrency=1
    ) as other:
        other.fill(1)
        ray.get(other.members[0].pending)
        busy = rf"\({cpus} CPU on [\d.]+ \(\w{{8}}\)\)"
        with (
            Crew(Worker, 1, Bundle(cpus, 0), [str(tmp_path), {}], start_seconds=6, concurrency=1) as crew,
            pytest.raises(
                NoRoom,
                match=rf"1 x \({cpus} CPU\) did not become free within 6 s; the cluster has {cpus} CPU, "
                rf"free now 0 CPU, busy {cpus} CPU {busy}: others hold them",
            ),
        ):  # fmt: skip
            list(dispatch(crew, "work", ["0"], in_flight=1, attempts=3, set_aside=print))
    told = capfd.readouterr().err
    assert re.search(
        rf"waiting for 1 x \({cpus} CPU\): 0 free, 1 busy {busy}, [1-6] of 6 s\n", told
    )


def test_an_interrupted_crew_leaves_nothing(cluster, tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        Crew(
            Worker, 2, Bundle(1, 0), [str(tmp_path), {"seconds": 0.2}], start_seconds=240, concurrency=3
        ) as crew,
    ):  # fmt: skip
        for record in dispatch(
            crew, "work", [str(unit) for unit in range(9)],
            in_flight=2, attempts=3, set_aside=lambda unit, cause: None,
        ):  # fmt: skip
            if record is not None:
                assert leftovers()["actors"]
                raise KeyboardInterrupt
