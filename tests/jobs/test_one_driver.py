"""A run has one driver: a living one is not disturbed; one that lost its run ends and keeps what is committed."""

import subprocess
import sys
import time

import pytest

from calibprune import storage
from calibprune.config import Config
from calibprune.config.model import ClusterSettings
from calibprune.errors import LeaseLost, UserError
from calibprune.events import UnitDone, emit
from calibprune.lease import FILE
from cluster.session import connect
from jobs import pipeline
from jobs.run import Run
from jobs.stages import Plan

HOLDER = """
import sys, time
from calibprune.lease import Lease
with Lease(sys.argv[1], heartbeat_seconds=0.2, expire_seconds=30.0):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def config(tmp_path, tiny_llama) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(tiny_llama)},
            "output": str(tmp_path / "run"),
            "generate": {"samples": 20, "max_tokens": 64},
            "curate": {"sequences": 4, "sequence_tokens": 64},
        }
    )


@pytest.fixture(scope="module")
def cluster():
    with connect(ClusterSettings()):
        yield


@pytest.fixture
def holder(config):
    """Runs another driver of the run."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, config.output], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


def test_a_run_with_a_living_driver_is_refused_before_anything_starts(config, holder, monkeypatch):
    monkeypatch.setattr(pipeline, "connect", None)  # joining a cluster raises
    with pytest.raises(UserError, match=f"process id {holder.pid} on .* refused"):
        pipeline.run_stages(config, ["generate", "curate"])
    assert storage.names(config.output) == [FILE]
    assert holder.poll() is None


class Slow:
    """A stage with many units that take a moment each."""

    NAME, PUBLISHED = "generate", {}

    def __init__(self) -> None:
        self.committed = 0

    def skip(self, run: Run) -> None:
        """Returns None, since the stage is needed."""

    def plan(self, run: Run) -> Plan:
        return Plan({}, [f"shard-{number:05d}" for number in range(10_000)])

    def work(self, run: Run, stage, missing):
        for unit in missing:
            record = stage.commit(unit, None, {})
            self.committed += 1
            time.sleep(0.02)
            if self.committed == 3:
                take_over(run.config.output)
            yield emit(UnitDone(record))


def test_a_driver_whose_run_another_took_over_ends_in_mid_stage(
    cluster, config, monkeypatch, heard
):
    first, second = Slow(), Slow()
    monkeypatch.setattr(pipeline, "modules", lambda commands: [first, second])
    with pytest.raises(LeaseLost, match=r"another driver took over .*: .*elsewhere"):
        pipeline.run_stages(config, ["generate", "curate"])
    assert 3 <= first.committed < 10_000 and not second.committed
    assert len(Run(config).stage("generate").done_units()) == first.committed
    assert b"foreign" in storage.read_bytes(storage.join(config.output, FILE))  # is not taken back
    assert [loss.kind for loss in heard.losses] == ["driver"]


def take_over(output: str) -> None:
    """Takes the run over as a driver on another machine would."""
    url = storage.join(output, FILE)
    mine = storage.read_json(url)
    storage.write_json(url, mine | {"owner": "foreign", "host": "elsewhere", "pid": 7})
