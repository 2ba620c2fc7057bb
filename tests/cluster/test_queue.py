"""Units of work on real Ray actors that die, fail, hang, join late and leave."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import ray

from calibprune.config.model import ClusterSettings
from calibprune.errors import UserError
from calibprune.events import SET_ASIDE, Event, Lost, Tick, UnitDone
from calibprune.stage import Record, Stage
from cluster.crew import Crew, StartFailed
from cluster.label import Label
from cluster.places import Bundle, NoRoom
from cluster.queue import Patience, Queue, TooManyFailures, work_through
from cluster.session import connect
from cluster.unit_worker import UnitWorker
from tests.cluster.leftovers import assert_nothing_left, leftovers


@pytest.fixture(scope="module")
def cluster():
    with connect(ClusterSettings()):
        yield


@pytest.fixture(autouse=True)
def nothing_left(cluster):
    """Checks that a test leaves none of its actors."""
    yield
    assert_nothing_left()


class Worker:
    """Commits units; misbehaves once or always for certain units."""

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

    def work(self, units: Sequence[str]) -> Iterator[Event]:
        for unit in units:
            yield UnitDone(self._work(unit))

    def _work(self, unit: str) -> Record:
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


def run(
    folder, trouble, *, units=6, workers=2, start_seconds=240, in_flight=2, batches=None, **options
):
    """Returns (the attempt that made it, for every unit done; the cause, for every unit set aside)."""
    if batches is None:
        batches = [[str(unit)] for unit in range(units)]
    with Crew(
        Worker, workers, Bundle(1, 0), [str(folder), trouble], start_seconds=start_seconds, concurrency=3
    ) as crew:  # fmt: skip
        events = list(work_through(crew, "work", batches, in_flight=in_flight, **options))
    done = [event.record for event in events if isinstance(event, UnitDone)]
    lost = [event for event in events if isinstance(event, Lost) and event.kind == SET_ASIDE]
    assert len({record.unit for record in done}) == len(done)
    return {record.unit: record.facts["attempt"] for record in done}, {
        event.units[0]: event.message for event in lost
    }


def test_every_unit_is_done_once(cluster, tmp_path):
    assert run(tmp_path, {}) == ({str(unit): 0 for unit in range(6)}, {})
    assert len(list(tmp_path.glob("[0-9]*"))) == 6


def test_units_may_become_ready_while_others_are_worked_on(cluster, tmp_path):
    batches = iter([["0"], None, ["1"], ["2"], None, ["3"]])
    assert run(tmp_path, {"1": "raise"}, batches=batches)[0].keys() == {"0", "1", "2", "3"}
    assert next(batches, None) is None


@pytest.mark.parametrize("trouble", ["die", "raise"])
def test_a_unit_that_fails_once_is_done_again(cluster, tmp_path, trouble):
    attempts, bad = run(tmp_path, {"2": trouble, "5": trouble})
    assert attempts.keys() == {str(unit) for unit in range(6)} and not bad
    assert attempts["2"] >= 1 and attempts["5"] >= 1


def test_a_hanging_actor_is_treated_like_a_dead_one(cluster, tmp_path):
    attempts, _ = run(tmp_path, {"1": "hang"}, patience=Patience(5))
    assert attempts.keys() == {str(unit) for unit in range(6)} and attempts["1"] >= 1


@pytest.mark.parametrize(("trouble", "cause"), [("raise always", "poisoned"), ("die always", "")])
def test_a_unit_that_fails_too_often_is_set_aside_and_all_others_are_done(
    cluster, tmp_path, trouble, cause
):
    attempts, bad = run(tmp_path, {"3": trouble}, workers=1, units=5)
    assert attempts.keys() == {"0", "1", "2", "4"}
    assert bad.keys() == {"3"} and cause in bad["3"]
    assert 3 <= len(list(tmp_path.glob("3.*"))) <= 4  # once more where it died beside another


def alone(queue: Queue, *beside: str) -> str | None:
    """Returns the only unit of the next batch."""
    batch = queue.take(beside)
    return batch and batch[0]


def test_after_a_failure_the_others_come_first():
    queue = Queue([["a"], ["b"], ["c"]], 2)
    assert queue.failed([alone(queue)], counted=True)
    assert [alone(queue) for _ in range(3)] == ["b", "c", "a"]


def test_units_that_went_down_together_are_tried_alone_at_once_and_the_deadly_one_last():
    queue = Queue([["a"], ["b"], ["c"], ["d"]], 3)
    assert not queue.failed([alone(queue), alone(queue, "a")], counted=True)
    assert alone(queue) == "a" and alone(queue, "a") is None
    assert queue.failed(["a"], counted=True)
    assert alone(queue) == "b" and alone(queue, "b") is None
    assert [alone(queue), alone(queue, "c")] == ["c", "d"] and alone(queue, "d") is None
    assert alone(queue) == "a" and not queue


def test_too_many_failures_in_a_row_end_the_work_sooner_while_nothing_succeeded(
    cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr("cluster.queue.MAX_FAILING_UNITS", 3)
    always = {str(unit): "raise always" for unit in range(1, 9)}
    for folder, trouble, attempts in (("never", {"0": "raise always"}, 6), ("once", {}, 8)):
        (tmp_path / folder).mkdir()
        with pytest.raises(
            TooManyFailures, match=rf"^{attempts} attempts in a row failed, .*poisoned"
        ):
            run(tmp_path / folder, always | trouble, units=9, workers=1, in_flight=1, attempts=2)


def test_what_no_unit_can_be_blamed_for_is_no_failure():
    queue = Queue([["a"], ["b"]], 9)
    assert queue.failed(["a"], counted=True) and queue.failed(["b"], counted=True)
    assert not queue.failed(["a"], counted=False)
    assert not queue.failed(["a", "b"], counted=True)
    assert queue.failures("a") == queue.failures("b") == 1


def test_a_unit_that_is_lost_with_its_node_repeatedly_is_blamed_in_the_end():
    queue, done, lost = Queue([["a"], ["b"], ["c"]], 3), [], 0
    while queue and lost < 20:
        units = [alone(queue)]
        units += filter(None, [alone(queue, *units)])
        if "b" in units:
            queue.failed(units, counted=False)
            lost += 1
        else:
            done += units
    assert done == ["a", "c"] and queue.failures("b") == 3
    assert lost == 10 + 1 + 3  # the eleventh time beside another
    assert not queue.failed([], counted=False)  # a node without any


def test_the_first_unit_may_take_longer_than_what_was_measured_by_another_driver(
    cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr("cluster.queue.HANG_FLOOR_SECONDS", 0.1)
    trouble = {"seconds": 1.5}
    attempts, _ = run(tmp_path, trouble, units=1, patience=Patience(None, 0.01, 60))
    assert attempts == {"0": 0}


def test_what_was_measured_by_another_driver_counts(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.queue.HANG_FLOOR_SECONDS", 0.1)
    attempts, _ = run(tmp_path, {"seconds": 1.5}, units=1, patience=Patience(None, 10.0, 0.1))
    assert attempts == {"0": 0}


def test_a_unit_without_work_does_not_shorten_the_time_of_others(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.queue.HANG_FLOOR_SECONDS", 0.1)
    work = {"0": 0.0, "1": 7.0}
    attempts, _ = run(
        tmp_path, {"0": "no work", "seconds": 3}, units=2, workers=1,
        patience=Patience(None, 0.0, 60, work.__getitem__),
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
        list(work_through(crew, "work", [["0"]]))


def test_a_place_that_others_hold_is_told_while_waiting_and_after(
    cluster, tmp_path, monkeypatch, heard
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
                rf"free now 0 CPU, busy {cpus} CPU {busy}: other work holds them",
            ),
        ):  # fmt: skip
            list(work_through(crew, "work", [["0"]]))
    said = rf"waiting for 1 x \({cpus} CPU\): 0 free, 1 busy {busy}, [1-6] of 6 s"
    assert re.search(said, heard.text)


def test_on_an_idle_cluster_nothing_is_waited_for(cluster, tmp_path, monkeypatch, heard):
    """The place of an actor that is starting counts as busy, but not with the work of others."""
    monkeypatch.setattr("cluster.places.FIRST_LINE_SECONDS", 0.0)
    cpus = int(ray.cluster_resources()["CPU"])
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != cpus and time.monotonic() < deadline:
        time.sleep(0.1)  # the last test's actors take a moment to go
    with Crew(
        Worker, 1, Bundle(cpus, 0), [str(tmp_path), {}], start_seconds=240, concurrency=1
    ) as crew:
        assert len(list(work_through(crew, "work", [["0"]]))) > 1
    assert "waiting for" not in heard.text


def test_an_interrupted_crew_leaves_nothing(cluster, tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        Crew(
            Worker, 2, Bundle(1, 0), [str(tmp_path), {"seconds": 0.2}], start_seconds=240, concurrency=3
        ) as crew,
    ):  # fmt: skip
        for event in work_through(crew, "work", [[str(unit)] for unit in range(9)], in_flight=2):
            if isinstance(event, UnitDone):
                assert leftovers()["actors"]
                raise KeyboardInterrupt


def commit(folder: str, trouble: dict[str, str], units: Sequence[str]) -> Iterator[Event]:
    """Writes a file with the units of every call; for a unit in `trouble` it dies once or always, raises, or hangs."""
    made = Path(folder, "calls")
    made.mkdir(exist_ok=True)
    (made / f"{len(list(made.iterdir()))} {' '.join(units)}").touch()
    for unit in units:
        kind, before = trouble.get(unit), Path(folder, f"tried-{unit}")
        if kind == "user":
            raise UserError("the source is gone")
        if kind == "silent":
            for _ in range(8):
                time.sleep(0.5)
                yield Tick()
            time.sleep(1000)
        if kind == "die always" or (kind == "die" and not before.exists()):
            before.touch()
            os._exit(1)
        yield UnitDone(Stage(folder).commit(unit, None, {}))
        while not Path(
            folder, f"heard-{unit}"
        ).exists():  # otherwise the next call might include it
            time.sleep(0.01)


def make(folder: Path, batches, trouble=None, cpus=1, start_seconds=240.0, **options):
    """Returns the units whose completion was reported."""
    function = partial(commit, str(folder), trouble or {})
    done: list[str] = []
    with Crew(
        UnitWorker, None, Bundle(cpus, 0), [function, Label("run", "curate")],
        start_seconds=start_seconds, kind="worker",
    ) as crew:  # fmt: skip
        for event in work_through(crew, "make", batches, **options):
            if isinstance(event, UnitDone):
                done.append(event.record.unit)
                (folder / f"heard-{event.record.unit}").touch()
    return sorted(done)


def calls(folder: Path) -> list[str]:
    """Returns the units of every call."""
    return sorted(path.name.split(" ", 1)[1] for path in (folder / "calls").iterdir())


def test_of_a_batch_that_is_lost_only_the_unit_in_work_is_blamed(cluster, tmp_path, heard):
    batches = [("a", "b", "c"), ("d",), ("e", "f")]
    made = make(tmp_path, batches, {"b": "die"})
    assert made == ["a", "b", "c", "d", "e", "f"] == sorted(Stage(str(tmp_path)).done())
    assert calls(tmp_path) == ["a b c", "b", "c", "d", "e f"]
    (loss,) = heard.losses
    assert (loss.kind, loss.units, loss.attempt) == ("worker", ("b",), 1)


def test_a_unit_of_a_batch_that_always_kills_is_set_aside_and_all_others_are_done(
    cluster, tmp_path, heard
):
    assert make(tmp_path, [("a", "b", "c")], {"b": "die always"}) == ["a", "c"]
    assert [loss.kind for loss in heard.losses] == ["worker"] * 3 + [SET_ASIDE]
    assert [loss.attempt for loss in heard.losses] == [1, 2, 3, 3]


def test_what_the_user_can_mend_ends_a_batch(cluster, tmp_path):
    with pytest.raises(UserError, match="the source is gone"):
        make(tmp_path, [("a", "b")], {"b": "user"})
    assert list(Stage(str(tmp_path)).done()) == ["a"]


def test_work_of_which_nothing_is_heard_any_more_ends(cluster, tmp_path):
    since = time.monotonic()
    with pytest.raises(TimeoutError, match=r"the work has been silent for 2 s"):
        make(tmp_path, [("a", "b", "c")], {"b": "silent"}, patience=Patience(2.5, final=True))
    assert list(Stage(str(tmp_path)).done()) == ["a"]
    assert time.monotonic() - since > 6  # it reported progress for four seconds


class Holder:
    """Does nothing but hold its resources."""


def test_workers_without_a_core_work_beside_others_that_hold_all(cluster, tmp_path):
    cpus = int(ray.cluster_resources()["CPU"])
    other = ray.remote(num_cpus=cpus)(Holder).remote()
    ray.get(other.__ray_ready__.remote())
    with pytest.raises(
        NoRoom, match=r"1 x \(1 CPU\) did not become free within 4 s; .*other work holds"
    ):
        make(tmp_path, [("a",)], start_seconds=4)
    assert make(tmp_path, [("a",), ("b", "c")], {"b": "die"}, cpus=0) == ["a", "b", "c"]
    ray.kill(other)
