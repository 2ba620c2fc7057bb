"""The next engine removes what killed engines left behind, but not what living ones hold."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from calibprune.calibration import engine_folder
from calibprune.calibration.engine_folder import EngineFolder, remove_leftovers

HOLDER = """
import multiprocessing, sys, time
from calibprune.calibration.engine_folder import SHARED_MEMORY, EngineFolder

def hold(said):
    lock = multiprocessing.get_context("spawn").Lock()
    said.send(lock._semlock.name)
    time.sleep(100)

if __name__ == "__main__":
    folder = EngineFolder()
    with folder.as_tmpdir():
        here, there = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=hold, args=(there,))
        process.start()
        name = here.recv().removeprefix("/")
        if "killed" in sys.argv:
            while not (noted := folder.path / SHARED_MEMORY).exists() or name not in noted.read_text():
                time.sleep(0.1)
            process.kill()
            process.join()
    print(folder.path, name, flush=True)
    time.sleep(100)
"""


@pytest.fixture(params=["", "killed"])
def holder(tmp_path, monkeypatch, request):
    """Runs a process group that holds a folder and a semaphore; yields the paths of both and a function that ends it.

    With `killed`, the process that made the semaphore was killed while the engine started.
    """
    monkeypatch.setattr(engine_folder, "YOUNG_SECONDS", -1.0)
    # a folder of its own, since other tests remove their leftovers themselves
    own = tempfile.mkdtemp(prefix="own-", dir="/tmp")
    monkeypatch.setattr(tempfile, "tempdir", own)
    monkeypatch.setenv("TMPDIR", own)
    script = tmp_path / "holder.py"
    script.write_text(HOLDER)
    process = subprocess.Popen(
        [sys.executable, script, request.param],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    folder, name = process.stdout.readline().split()

    def kill() -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    yield Path(folder), Path("/dev/shm", f"sem.{name}"), kill
    if process.poll() is None:
        kill()
    shutil.rmtree(own, ignore_errors=True)


def test_what_a_killed_engine_left_goes_with_the_next_and_not_before(holder):
    folder, semaphore, kill = holder
    assert folder.stat().st_mode & 0o777 == 0o700
    remove_leftovers()
    assert folder.exists() and semaphore.exists()
    kill()
    time.sleep(0.2)
    assert folder.exists() and semaphore.exists()
    EngineFolder().remove()
    assert not folder.exists() and not semaphore.exists()


def test_names_that_lead_elsewhere_are_left_alone(tmp_path, holder):
    folder, _, kill = holder
    kill()
    other = tmp_path / "other"
    other.touch()
    (folder / engine_folder.SHARED_MEMORY).write_text(f"../..{other} {other}")
    remove_leftovers()
    assert not folder.exists() and other.exists()


ENGINE = """
import subprocess, sys, time
from calibprune.calibration.engine_folder import PROCESSES, EngineFolder

other = subprocess.Popen(["sleep", "100"], start_new_session=True)
folder = EngineFolder()
with folder.as_tmpdir():
    engine = subprocess.Popen(["sleep", "100"], start_new_session=True)
print(folder.path, other.pid, engine.pid, flush=True)
time.sleep(100)
"""


@pytest.fixture
def orphan(tmp_path, monkeypatch):
    """A killed process's folder, a process that it started before, and the one that its engine started."""
    monkeypatch.setattr(engine_folder, "YOUNG_SECONDS", -1.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command = [sys.executable, "-c", ENGINE]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        folder, other, engine = process.stdout.readline().split()
        process.kill()
    yield Path(folder), int(other), int(engine)
    for left in (int(other), int(engine)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_orphaned_engine_is_ended_and_nothing_else(orphan):
    folder, other, engine = orphan
    assert alive(engine)
    remove_leftovers()
    assert not alive(engine) and alive(other)
    assert not folder.exists()


def test_a_process_with_the_number_of_a_dead_one_is_left_alone(orphan):
    folder, other, engine = orphan
    notes = folder / engine_folder.PROCESSES
    number, started, boot = notes.read_text().split()
    assert number == str(engine)
    notes.write_text(
        f"{other} {started[:-1]} {boot}\n{engine} {started} another-boot\n\n-1 {started}"
    )
    remove_leftovers()
    assert alive(engine) and alive(other) and not folder.exists()


def test_the_first_of_several_errors_is_the_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = EngineFolder()
    assert folder.first_error() is None
    code = """
import json, logging.config, sys
logging.config.dictConfig(json.load(open(sys.argv[1])))
log = logging.getLogger("vllm.core")
for message in ("no room for it", "a process failed"):
    try:
        raise ValueError(message)
    except ValueError:
        log.exception("not started")
"""
    subprocess.run([sys.executable, "-c", code, folder.logging_file()], check=True)
    assert folder.first_error() == "no room for it"
    folder.remove()
