"""Units made by real Ray tasks that die, raise and wait for a core."""

import os
import re
import time
import uuid
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayTaskError

from calibprune.config.model import ClusterSettings
from calibprune.errors import UserError
from calibprune.failures import nobody
from calibprune.stage import Record, Stage
from cluster.label import Label
from cluster.places import Bundle, NoRoom
from cluster.session import connect
from cluster.tasks import TaskLost, run_tasks


@pytest.fixture(scope="module")
def cluster():
    with connect(ClusterSettings()):
        yield


def commit(folder: str, trouble: dict[str, str], units: tuple[str, ...]):
    """A file for every call names its units; a unit in `trouble` dies the first time, dies always, or raises."""
    made = Path(folder, "calls")
    made.mkdir(exist_ok=True)
    (made / f"{uuid.uuid4().hex} {' '.join(units)}").touch()
    for unit in units:
        kind, before = trouble.get(unit), Path(folder, f"tried-{unit}")
        if kind == "raise":
            raise UserError("the source is gone")
        if kind == "die always" or (kind == "die" and not before.exists()):
            before.touch()
            while not all(
                Path(folder, f"told-{one}").exists() for one in units[: units.index(unit)]
            ):
                time.sleep(0.01)  # what was not yet on its way would be lost too
            os._exit(1)
        yield Stage(folder).commit(unit, None, {})


def run(folder: Path, batches, trouble=None, start_seconds=240.0, failed=nobody, cpus=1):
    done: list[Record] = []
    for one in run_tasks(
        commit, (str(folder), trouble or {}), batches, Bundle(cpus, 0),
        start_seconds=start_seconds, label=Label("run", "curate"), failed=failed,
    ):  # fmt: skip
        if one is not None:
            assert 0 <= one.seconds < 60
            done.append(one.record)
            (folder / f"told-{one.record.unit}").touch()
    return sorted(record.unit for record in done)


def calls(folder: Path) -> list[str]:
    """The units that every call was made for."""
    return sorted(path.name.split(" ", 1)[1] for path in (folder / "calls").iterdir())


def test_a_lost_call_is_made_again_for_what_is_missing(cluster, tmp_path):
    failures = []
    batches = [("a", "b", "c"), ("d",), ("e", "f")]
    made = run(tmp_path, batches, {"b": "die"}, failed=failures.append)
    assert made == ["a", "b", "c", "d", "e", "f"] == sorted(Stage(str(tmp_path)).done())
    assert calls(tmp_path) == ["a b c", "b c", "d", "e f"]
    (failure,) = failures
    assert (failure.kind, failure.units, failure.attempt) == ("task", ("b", "c"), 1)


def test_what_kills_its_process_again_and_again_ends_the_work_and_is_named(cluster, tmp_path):
    failures = []
    with pytest.raises(TaskLost, match=r"the task of b, c was lost 3 times: .+"):
        run(tmp_path, [("a", "b", "c")], {"b": "die always"}, failed=failures.append)
    assert [failure.attempt for failure in failures] == [1, 2, 3]
    assert list(Stage(str(tmp_path)).done()) == ["a"]


def test_what_a_task_raises_ends_the_work(cluster, tmp_path):
    with pytest.raises(RayTaskError) as caught:
        run(tmp_path, [("a", "b")], {"b": "raise"})
    assert isinstance(caught.value.cause, UserError)
    assert list(Stage(str(tmp_path)).done()) == ["a"]


def fall_silent(units: tuple[str, ...]):
    yield Record(units[0], None, 0, None, {})
    for _ in range(8):
        time.sleep(0.5)
        yield None
    time.sleep(1000)


def test_a_task_of_which_nothing_is_heard_any_more_ends_the_work(cluster):
    work = run_tasks(
        fall_silent, (), [("a", "b", "c")], Bundle(0, 0),
        start_seconds=60, label=Label("run", "generate"), silent_seconds=2.5,
    )  # fmt: skip
    assert next(filter(None, work)).record.unit == "a"
    since = time.monotonic()
    with pytest.raises(TaskLost, match=r"the task of b, c gave nothing for 2.5 s"):
        list(work)
    assert time.monotonic() - since > 6  # it was heard of for four seconds


class Holder:
    """Holds what it was given."""


def test_a_core_that_others_hold_is_told_waited_for_and_given_up(
    cluster, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("cluster.places.FIRST_LINE_SECONDS", 0.5)
    cpus = int(ray.cluster_resources()["CPU"])
    other = ray.remote(num_cpus=cpus)(Holder).remote()
    ray.get(other.__ray_ready__.remote())
    with pytest.raises(
        NoRoom, match=r"1 x \(1 CPU\) did not become free within 6 s; .*others hold"
    ):
        run(tmp_path, [("a",)], start_seconds=6)
    assert re.search(r"waiting for 1 x \(1 CPU\): 0 free, .* busy", capfd.readouterr().err)
    none = tmp_path / "none"
    none.mkdir()
    assert run(none, [("a",), ("b", "c")], {"b": "die"}, cpus=0) == ["a", "b", "c"]
    ray.kill(other)
    assert run(tmp_path, [("a",), ("b",)]) == ["a", "b"]
    assert calls(tmp_path) == ["a", "b"]  # the one that was given up has not run after all
