"""status reads the state of a run from its folder alone, even a damaged one."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calibprune import storage
from calibprune.config import Config
from calibprune.events import SET_ASIDE, Lost, emit, listening
from calibprune.failures import MAX_FAILURES, FailureFiles, read_failures
from calibprune.lease import FILE, Lease
from calibprune.stage import Stage
from calibprune.text import pace
from jobs.status import describe, run_status, seconds_each
from tests.jobs.command import ENVIRONMENT, calibprune_here


def a_run(folder: Path, **settings) -> str:
    config = Config.model_validate(
        {"model": {"path": "model"}, "output": str(folder), "prune": settings}
    )
    unneeded = (
        dict.fromkeys(["generate", "curate"], "prune.pool is given") if "pool" in settings else {}
    )
    content = {
        "config": config.model_dump(mode="json"),
        "unneeded": unneeded,
        "opened_at": time.time() - 1000,
    }
    storage.write_json(str(folder / "run.json"), content)
    return str(folder)


def lose(stage_url: str, *losses: Lost) -> None:
    """Writes the losses of a stage, as its driver does."""
    with listening(FailureFiles(stage_url)):
        for loss in losses:
            emit(loss)


def commit(stage: Stage, count: int, *, units: int | None = None) -> Stage:
    names = [f"{unit:05d}" for unit in range(units or count)]
    stage.plan({"a": 1}, names)
    for unit in names[:count]:
        stage.commit(unit, None, {"rows": 1})
    if units is None:
        stage.finish({"seconds": 1.0})
    return stage


def finish(run: str) -> None:
    for name in ("generate", "curate", "prune", "evaluate"):
        if not Stage(f"{run}/{name}").finished:
            commit(Stage(f"{run}/{name}"), 3)
    storage.write(f"{run}/report/index.html", b"page")


def test_twenty_thousand_units_are_counted_by_name_without_reading_one(tmp_path):
    run, now = a_run(tmp_path / "run"), time.time()
    stage = Stage(f"{run}/generate")
    stage.plan({}, [f"{unit:05d}" for unit in range(20_000)])
    done = tmp_path / "run" / "generate" / "_done"
    done.mkdir()
    for unit in range(4_000):
        file = done / f"{unit:05d}.json"
        file.write_bytes(b"{")  # not a record: reading it raises
        at = now - 30 - (4_000 - unit) * 0.05
        os.utime(file, (at, at))
    (done / "stray.json").touch()
    started = time.process_time()
    status = run_status(run)
    assert time.process_time() - started < 10
    generate = status["stages"]["generate"]
    assert (generate["done"], generate["units"], generate["state"]) == (4_000, 20_000, "unfinished")
    assert generate["seconds_each"] == pytest.approx(0.05, rel=1e-3)
    assert generate["left_seconds"] == pytest.approx(800, rel=1e-3)
    assert 30 <= generate["since_last_seconds"] <= 31 + time.time() - now
    assert not status["finished"] and status["driver"] is None


def test_paces_are_plain_numbers():
    said = {143.2: "143 s each", 9.97: "10 s each", 2.44: "2.4 s each", 0.1: "0.1 s each"}
    said |= {0.05: "20 a second", 0.0071: "141 a second"}
    assert {each: pace(each) for each in said} == said


def test_a_pause_between_two_drivers_does_not_count():
    before = [1000.0 + 2 * step for step in range(40)]
    after = [before[-1] + 7200 + 4 * step for step in range(15)]
    opened = after[0] - 100
    assert seconds_each(before + after, opened) == pytest.approx(4)
    assert seconds_each(before + after) == pytest.approx(4)
    assert seconds_each([*before, after[0]], opened) == pytest.approx(
        2
    )  # the pace is unknown after one commit
    assert seconds_each([5.0]) is None and seconds_each([]) is None
    slow = [3600.0 * hour for hour in range(10)]
    assert seconds_each(slow, 0.0) == seconds_each(slow) == 3600


def test_the_pace_is_the_recent_one_and_silence_counts_while_a_driver_is_at_work():
    slow, fast = [100.0 * step for step in range(50)], [5000 + 0.5 * step for step in range(2000)]
    assert seconds_each(slow + fast, 0.0) == pytest.approx(0.5, rel=0.01)
    burst = [1000 + 0.01 * step for step in range(50)]
    assert seconds_each(burst, 900.0) == pytest.approx(0.01)
    assert seconds_each(burst, 900.0, now=1100.0) == pytest.approx(2)


def test_the_driver_is_told_by_its_lease(tmp_path):
    run = a_run(tmp_path / "run")
    commit(Stage(f"{run}/generate"), 2, units=4)
    with Lease(run, heartbeat_seconds=0.1):
        status = run_status(run)
        assert status["stages"]["generate"]["state"] == "running" and status["driver"]["alive"]
        assert f"process {os.getpid()} on" in "\n".join(describe(status))
        assert status["elapsed_seconds"] == pytest.approx(0, abs=5)
        lease = json.loads((tmp_path / "run" / FILE).read_text())
        assert lease["owner"] not in json.dumps(status)
    assert run_status(run)["driver"] is None
    lease |= {"host": "elsewhere", "boot": "another"}
    (tmp_path / "run" / FILE).write_text(json.dumps(lease))
    assert run_status(run)["driver"]["alive"]
    os.utime(tmp_path / "run" / FILE, (1, time.time() - 600))
    status = run_status(run)
    assert not status["driver"]["alive"] and status["stages"]["generate"]["state"] == "unfinished"
    assert any("gone: process" in line and "elsewhere" in line for line in describe(status))


def test_failures_and_units_set_aside_are_told_the_last_one_with_its_age(tmp_path):
    run = a_run(tmp_path / "run")
    stage = Stage(f"{run}/generate")
    commit(stage, 2, units=5)
    stage.commit("00003", None, {"set_aside": "poisoned", "rows_missing": [0, 4]})
    now, units = time.time(), ("00001", "00003", "00004")  # the first unit was made in the end
    lose(
        stage.url,
        Lost("engine", "it died", ("00001", "00002"), 1, "node-7", "engine 3", now - 300),
        *(Lost(SET_ASIDE, "poisoned", (unit,), 3, at=now - 200) for unit in units),
    )
    lose(f"{run}/prune", Lost("driver", "OSError: \x1b[2Jno space left", at=now - 50))
    status = run_status(run)
    generate = status["stages"]["generate"]
    assert generate["failures"] == 4 and generate["set_aside"] == ["00003", "00004"]
    assert generate["last_failure"]["units"] == ("00004",)
    text = "\n".join(describe(status))
    assert "4 failures, set aside: 00003 00004" in text
    assert re.search(r"last failure 5\d s ago: driver: OSError: \\x1b\[2Jno space left", text)
    assert status["stages"]["prune"]["state"] == "not started"
    count, (engine, *_) = read_failures(stage.url, 10)[0], read_failures(stage.url, 10)[1][::-1]
    assert (
        count == 4 and engine.in_words == "engine 3 with 00001, 00002 on node-7, attempt 1: it died"
    )


def test_the_journal_keeps_the_newest(tmp_path):
    folder = tmp_path / "stage" / "_failures"
    folder.mkdir(parents=True)
    for number in range(MAX_FAILURES + 5):
        (folder / f"{number:013d}-aaaaaa.json").write_text("{}")
    lose(str(tmp_path / "stage"), Lost("unit", "the newest"))
    count, (last,) = read_failures(str(tmp_path / "stage"))
    assert (count, last.message) == (MAX_FAILURES, "the newest")
    assert not (folder / "0000000000000-aaaaaa.json").exists()


def test_stages_that_are_not_needed_are_done_with(tmp_path, capsys):
    run = a_run(tmp_path / "run", pool="/a/pool")
    for name in ("prune", "evaluate"):
        commit(Stage(f"{run}/{name}"), 2)
    storage.write(f"{run}/report/index.html", b"page")
    status = run_status(run)
    assert (
        status["stages"]["generate"]["state"] == status["stages"]["curate"]["state"] == "not needed"
    )
    assert status["finished"]
    code, out, _ = calibprune_here(capsys, "status", run, "--json")
    assert code == 0 and json.loads(out)["finished"]


def test_a_damaged_or_half_written_folder_never_shows_a_traceback(tmp_path, capsys):
    run = a_run(tmp_path / "run")
    commit(Stage(f"{run}/generate"), 4)
    commit(Stage(f"{run}/curate"), 1, units=3)
    commit(Stage(f"{run}/curate/analysis"), 1, units=1)
    lose(f"{run}/curate", Lost(SET_ASIDE, "no", ("00000",)))
    (tmp_path / "run" / FILE).write_text('{"pid": 1, "host": "h", "owner": "o", "at": "then"}')
    damages = [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"units": 3, "config": [], "at": "x", "pid": "y"}',
        b"\xff\xfe\0",
        None,
    ]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 12
    for path in files:
        kept = path.read_bytes()
        for damage in damages:
            path.unlink() if damage is None else path.write_bytes(damage)
            for flag in ((), ("--json",)):
                code, out, errors = calibprune_here(capsys, "status", run, *flag)
                gone = damage is None and path.name == "run.json"
                assert code == (2 if gone else 0), (path, damage, errors)
                assert "Traceback" not in out + errors
        path.write_bytes(kept)
    (tmp_path / "run" / "curate" / "_plan.json").write_text("{")
    _, out, _ = calibprune_here(capsys, "status", run)
    assert (
        "curate    unreadable" in out and "_plan.json is damaged" in out and "done, 4 of 4" in out
    )


def watched(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "jobs", "status", *arguments, "--watch", "--every", "0.3"]
    return subprocess.Popen(
        command, env=ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "120"}, **options
    )


def test_watching_in_a_log_ends_with_the_run_and_with_ctrl_c(tmp_path):
    run = a_run(tmp_path / "run")
    commit(Stage(f"{run}/generate"), 1, units=3)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    stopped, ended = watched(run, **pipes), watched(run, "--json", **pipes)
    assert stopped.stdout is not None and ended.stdout is not None
    assert "1 of 3 units" in stopped.stdout.readline()
    stopped.send_signal(signal.SIGINT)
    assert json.loads(ended.stdout.readline())["stages"]["generate"]["done"] == 1
    finish(run)
    out, errors = ended.communicate(timeout=30)
    assert ended.returncode == 0, errors
    assert json.loads(out.splitlines()[-1])["finished"]
    out, errors = stopped.communicate(timeout=30)
    assert (stopped.returncode, errors) == (130, "")


def test_watching_on_a_terminal_shows_a_table_in_place(tmp_path):
    run = a_run(tmp_path / "run")
    commit(Stage(f"{run}/generate"), 1, units=3)
    lose(f"{run}/generate", Lost("worker", "was [red]lost"))
    ours, theirs = pty.openpty()
    process = watched(run, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
            if b"elapsed" in shown and process.poll() is None:
                finish(run)
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(timeout=30) == 0
    text = shown.decode()
    assert (
        "last commit" in text and "1 of 3" in text and "3 of 3" in text and "was [red]lost" in text
    )


def test_watching_waits_for_a_run_that_is_still_to_come(tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    waiting = watched(str(tmp_path / "run"), **pipes)
    assert waiting.stderr is not None
    assert f"there is no run at {tmp_path}/run yet, waiting for it" in waiting.stderr.readline()
    finish(a_run(tmp_path / "run"))
    out, errors = waiting.communicate(timeout=60)
    assert (waiting.returncode, errors) == (0, "") and "done, 3 of 3 units" in out
