"""Generating while engines are killed, hang and die with their actors: every row exactly once, the same text."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibprune.stage import Stage
from tests.jobs.command import ENVIRONMENT, calibprune, done
from tests.tiny import write_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # engines start again and again

CONFIG = """
model: {{path: {model}}}
output: {output}
generate: {{engines: 1, samples: 120, max_tokens: 64, min_tokens: 64, shard_rows: 10, cpu_kvcache_gib: 1,
  shard_timeout_seconds: 25, attempts: 3}}
curate: {{sequences: 16, sequence_tokens: 64}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_tiny_llama(folder / "model", layers=2, hidden=128)
    return folder


def write_config(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.format(model=folder / "model", output=folder / name))
    return path


def samples(run: Path) -> pa.Table:
    stage = Stage(str(run / "generate"))
    files = [run / "generate" / record.file for record in stage.records() if record.file]
    return pa.concat_tables(pq.read_table(file) for file in files)


@pytest.fixture(scope="module")
def undisturbed(folder) -> pa.Table:
    result = calibprune("generate", write_config(folder, "undisturbed"))
    assert result.returncode == 0, result.stderr
    table = samples(folder / "undisturbed")
    assert table["row"].to_pylist() == list(range(120))
    return table


def engine_of(driver: subprocess.Popen) -> psutil.Process | None:
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "EngineCore" in " ".join(process.cmdline()) and process.status() != "zombie":
                return process
        except psutil.Error:
            continue
    return None


def test_rows_come_exactly_once_whatever_is_killed(folder, undisturbed):
    points = folder / "points"
    points.mkdir()
    for name in ("between-data-and-done-00001", "writing-part-00003"):  # here the actor dies
        (points / name).touch()
    run = folder / "disturbed"
    log = folder / "log"
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs", "generate", write_config(folder, "disturbed")],
        env=ENVIRONMENT | {"CALIBPRUNE_FAILPOINTS": str(points)}, stderr=log.open("w"),
    )  # fmt: skip
    for at_least, number in ((4, signal.SIGKILL), (7, signal.SIGSTOP)):
        while done(run, "generate") < at_least or (engine := engine_of(driver)) is None:
            assert driver.poll() is None, log.read_text()
            time.sleep(0.02)
        engine.send_signal(number)
    assert driver.wait(timeout=900) == 0, log.read_text()
    assert not list(points.iterdir())
    assert samples(run).equals(undisturbed)


@contextmanager
def deadly(points: Path, name: str) -> Iterator[None]:
    """Sets a failpoint that strikes every time."""
    stop = threading.Event()

    def lay() -> None:
        while not stop.wait(0.02):
            (points / name).touch()

    thread = threading.Thread(target=lay)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_shard_that_kills_its_engine_every_time_is_set_aside_and_named(folder, undisturbed):
    points = folder / "deadly"
    points.mkdir()
    config = write_config(folder, "poisoned")
    with deadly(points, "writing-part-00002"):
        result = calibprune("generate", config, timeout=900, CALIBPRUNE_FAILPOINTS=str(points))
        assert result.returncode == 1
        assert "1 of 12 shards failed 3 times each, the first is shard 00002 (rows 20 to 29)" in (
            result.stderr
        )
        assert done(folder / "poisoned", "generate") == 11
        result = calibprune(
            "generate",
            config,
            "generate.max_bad_shards=1",
            timeout=900,
            CALIBPRUNE_FAILPOINTS=str(points),
        )
    assert result.returncode == 0, result.stderr
    rows = [row for row in range(120) if not 20 <= row < 30]
    assert samples(folder / "poisoned").equals(undisturbed.take(rows))
    record = Stage(str(folder / "poisoned" / "generate")).record("00002")
    assert record.file is None and record.facts["rows_missing"] == [20, 30]
    result = calibprune("curate", config, "generate.max_bad_shards=1")
    assert result.returncode == 0, result.stderr
