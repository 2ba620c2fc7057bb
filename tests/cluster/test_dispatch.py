"""Units of work over real Ray actors that die, fail and hang."""

import os
import time
from pathlib import Path

import pytest
import ray

from calibprune.config import ClusterSettings
from calibprune.errors import UserError
from calibprune.run import Record
from cluster.dispatch import UnitFailed, dispatch
from cluster.session import Actors, Bundle, connect


@pytest.fixture(scope="module")
def cluster():
    with connect(ClusterSettings()):
        yield


class Worker:
    """Commits units; misbehaves once, or always, for the units it is told to."""

    def __init__(self, folder: str, trouble: dict[str, str]) -> None:
        self._folder, self._trouble = Path(folder), trouble

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
        return Record(unit, None, 0, None, {"attempt": attempt})


def run(folder, trouble, *, units=6, workers=2, timeout_seconds=None):
    with Actors(
        Worker, workers, Bundle(1, 0), [str(folder), trouble], timeout_seconds=60
    ) as actors:
        records = dispatch(
            actors, "work", [str(u) for u in range(units)],
            in_flight=2, attempts=3, timeout_seconds=timeout_seconds, start_timeout_seconds=60,
        )  # fmt: skip
        return {record.unit: record.facts["attempt"] for record in records if record is not None}


def test_every_unit_is_done_once(cluster, tmp_path):
    assert run(tmp_path, {}) == {str(unit): 0 for unit in range(6)}
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("trouble", ["die", "raise"])
def test_a_unit_that_fails_once_is_done_again(cluster, tmp_path, trouble):
    attempts = run(tmp_path, {"2": trouble, "5": trouble})
    assert attempts.keys() == {str(unit) for unit in range(6)}
    assert attempts["2"] >= 1 and attempts["5"] >= 1


def test_a_hanging_actor_is_treated_like_a_dead_one(cluster, tmp_path):
    attempts = run(tmp_path, {"1": "hang"}, timeout_seconds=8)
    assert attempts.keys() == {str(unit) for unit in range(6)} and attempts["1"] == 1


@pytest.mark.parametrize(("trouble", "cause"), [("raise always", "poisoned"), ("die always", "")])
def test_attempts_are_capped_and_the_unit_is_named(cluster, tmp_path, trouble, cause):
    with pytest.raises(UnitFailed, match=f"unit 3 failed 3 times.*{cause}"):
        run(tmp_path, {"3": trouble}, workers=1, units=4)
    assert 3 <= len(list(tmp_path.glob("3.*"))) <= 4  # once more where it died beside another


def test_what_the_user_can_mend_ends_the_stage_at_once(cluster, tmp_path):
    with pytest.raises(UserError, match="the prefix source is gone"):
        run(tmp_path, {"0": "user"})
    assert len(list(tmp_path.glob("0.*"))) == 1


def test_actors_that_do_not_fit_say_what_was_asked_and_what_is_there(cluster):
    with pytest.raises(
        UserError, match=r"2 x \(1000 CPU\) were asked for, the cluster has \d+ CPU"
    ):
        Actors(Worker, 2, Bundle(1000, 0), [], timeout_seconds=5)


def test_places_are_free_again_afterwards(cluster, tmp_path):
    run(tmp_path, {})
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
