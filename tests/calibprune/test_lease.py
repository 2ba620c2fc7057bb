"""The lease on a run: real holder processes that are killed or stopped, on local disk and on two kinds of S3 server."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest

from calibprune import storage
from calibprune.errors import LeaseExpired, LeaseLost, UserError
from calibprune.lease import FILE, Lease
from tests.servers import s3_server, weak_s3_server

SHORT = {"heartbeat_seconds": 0.2, "expire_seconds": 20.0}
"""Lease that a holder can renew in time even on a busy machine."""
BRIEF = {"heartbeat_seconds": 0.2, "expire_seconds": 4.0}
"""Lease for tests that wait until it has expired."""
HOLDER = """
import sys, time
from calibprune.errors import LeaseLost
from calibprune.lease import Lease
with Lease(sys.argv[1], heartbeat_seconds=0.2, expire_seconds=float(sys.argv[2])) as lease:
    print("held", flush=True)
    try:
        while True:
            lease.check()
            time.sleep(0.05)
    except LeaseLost as error:
        print(error, flush=True)
"""


@pytest.fixture(scope="module")
def strong_bucket():
    with s3_server("leases") as url:
        yield url


@pytest.fixture(params=["local", "s3"])
def run_url(request, tmp_path):
    if request.param == "s3":
        return f"{request.getfixturevalue('strong_bucket')}/{uuid.uuid4().hex}"
    return str(tmp_path / "run")


def start_holder(run_url, expire_seconds=20.0):
    command = [sys.executable, "-c", HOLDER, run_url, str(expire_seconds)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    return holder


def content(run_url):
    return json.loads(storage.read_bytes(storage.join(run_url, FILE)))


def make_foreign(run_url, **changes):
    """Writes a lease as a driver on another machine would leave it."""
    with Lease(run_url, **SHORT):
        left = content(run_url) | {"owner": "foreign", "host": "elsewhere", "pid": 7} | changes
    storage.write_json(storage.join(run_url, FILE), left)


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_lease_is_renewed_and_removed(run_url):
    with Lease(run_url, **SHORT) as lease:
        first = content(run_url)
        wait_for(lambda: content(run_url)["count"] > first["count"] + 1)
        lease.check()
        assert content(run_url)["owner"] == first["owner"] and first["pid"] == os.getpid()
    assert not storage.exists(storage.join(run_url, FILE))
    with Lease(run_url, **SHORT):
        assert content(run_url)["owner"] != first["owner"]


def test_a_living_holder_is_named_and_kept(run_url):
    with start_holder(run_url) as holder:
        started = time.monotonic()
        with pytest.raises(UserError, match=f"process id {holder.pid} on .* refused") as refusal:
            Lease(run_url, **SHORT).__enter__()
        assert time.monotonic() - started < 10 and "\n" not in str(refusal.value)
        assert holder.poll() is None and content(run_url)["pid"] == holder.pid
        holder.kill()


def test_a_killed_holder_on_this_machine_is_replaced_at_once(run_url):
    with start_holder(run_url) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        wait_for(lambda: (holder.poll() or 0) < 0)
    started = time.monotonic()
    with Lease(run_url, **SHORT) as lease:
        assert time.monotonic() - started < 10
        lease.check()


def test_a_process_id_used_again_is_not_the_holder(tmp_path):
    make_foreign(str(tmp_path), host=os.uname().nodename, pid=os.getpid(), process_start="1")
    started = time.monotonic()
    with Lease(str(tmp_path), **SHORT):
        assert time.monotonic() - started < 10


def test_a_stopped_holder_is_replaced_and_stops_when_it_wakes(run_url, heard):
    with start_holder(run_url, BRIEF["expire_seconds"]) as holder:
        holder.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with Lease(run_url, **BRIEF) as lease:
            assert time.monotonic() - started >= 4.0 and str(holder.pid) in heard.lines[-1]
            holder.send_signal(signal.SIGCONT)
            answer, _ = holder.communicate(timeout=60)
            assert b"another driver took over" in answer and holder.returncode == 0
            time.sleep(0.6)
            lease.check()
            assert content(run_url)["pid"] == os.getpid()


def test_a_holder_elsewhere_is_given_its_own_time(tmp_path):
    make_foreign(str(tmp_path), expire_seconds=1.5)
    started = time.monotonic()
    with Lease(str(tmp_path), heartbeat_seconds=0.1, expire_seconds=0.3):
        assert time.monotonic() - started >= 1.5


def test_a_foreign_lease_ends_ours(tmp_path):
    lease = Lease(str(tmp_path), **SHORT)
    with lease:
        foreign = content(str(tmp_path)) | {"owner": "foreign"}
        # recreated just before ours was written
        wait_for(lambda: lease.lost or storage.write_json(lease.url, foreign))
        with pytest.raises(
            LeaseLost, match=r"took over .* driver with .* nothing committed is lost"
        ):
            lease.check()
    assert content(str(tmp_path))["owner"] == "foreign"


def test_a_late_write_of_the_superseded_holder_does_not_end_the_new_lease(tmp_path):
    make_foreign(str(tmp_path), host=os.uname().nodename, pid=os.getpid(), process_start="1")
    old = storage.read_bytes(storage.join(str(tmp_path), FILE))
    with Lease(str(tmp_path), **SHORT) as lease:
        storage.write(lease.url, old)
        wait_for(lambda: content(str(tmp_path))["owner"] != "foreign")
        lease.check()


def test_a_lease_that_cannot_be_written_is_lost(tmp_path):
    run = tmp_path / "run"

    def put_in_the_way():
        shutil.rmtree(run, ignore_errors=True)
        with contextlib.suppress(IsADirectoryError):  # the holder has just recreated it
            return run.write_text("in the way")

    with Lease(str(run), heartbeat_seconds=0.5, expire_seconds=4.0) as lease:
        wait_for(put_in_the_way)
        time.sleep(0.8)
        assert not lease.lost
        wait_for(lambda: lease.lost)
        with pytest.raises(
            LeaseExpired, match=r"not be renewed for 4 s: .*: this one stops"
        ) as end:
            lease.check()
    assert not isinstance(end.value, UserError) and "None" not in str(end.value)
    assert "took over" not in str(end.value)


def test_an_unreadable_lease_expires(tmp_path):
    storage.write(str(tmp_path / FILE), b"{half")
    started = time.monotonic()
    with Lease(str(tmp_path), heartbeat_seconds=0.1, expire_seconds=2.0) as lease:
        assert time.monotonic() - started >= 2.0
        lease.check()


def race(run_url, drivers):
    """Lets several processes ask at the same moment; returns the owners that still hold it after a few heartbeats."""
    barrier, leases, refused = threading.Barrier(drivers), [], []

    def ask():
        lease = Lease(run_url, **SHORT)
        barrier.wait()
        try:
            leases.append(lease.__enter__())
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(drivers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: sum(not lease.lost for lease in leases) == 1)
    time.sleep(2 * SHORT["heartbeat_seconds"])
    holding = [lease for lease in leases if not lease.lost]
    for lease in leases:
        lease.__exit__()
    return holding, refused


def test_of_several_that_ask_at_once_one_holds(run_url):
    holding, refused = race(run_url, 4)
    assert len(holding) == 1 and len(refused) == 3


def test_of_several_that_take_over_at_once_one_holds(tmp_path):
    make_foreign(str(tmp_path), host=os.uname().nodename, pid=os.getpid(), process_start="1")
    holding, _ = race(str(tmp_path), 4)
    assert len(holding) == 1


def test_on_a_store_without_conditional_writes(tmp_path, heard):
    with weak_s3_server("leases", tmp_path) as bucket:
        holding, _ = race(f"{bucket}/race", 4)
        assert len(holding) == 1
        test_a_living_holder_is_named_and_kept(f"{bucket}/alive")
        test_a_stopped_holder_is_replaced_and_stops_when_it_wakes(f"{bucket}/stopped", heard)


@pytest.mark.parametrize("content", [b"", b"{half", b"[]", b'{"owner": 3}', b"[" * 100_000])
def test_a_damaged_lease_is_written_again_by_its_holder(tmp_path, content):
    """This includes a holder that took over from another driver: only another driver's name ends a lease."""
    make_foreign(str(tmp_path), host=os.uname().nodename, pid=os.getpid(), process_start="1")
    with Lease(str(tmp_path), heartbeat_seconds=0.1, expire_seconds=10.0) as lease:
        owner = content_of(tmp_path)
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(UserError, match="is refused while it lives"):
            Lease(str(tmp_path), heartbeat_seconds=0.1, expire_seconds=10.0).__enter__()
        lease.check()
        assert content_of(tmp_path) == owner


def content_of(folder):
    return content(str(folder))["owner"]


def test_a_removed_lease_is_made_again_by_its_holder(tmp_path):
    with Lease(str(tmp_path), heartbeat_seconds=0.1, expire_seconds=10.0) as lease:
        owner = content_of(tmp_path)
        (tmp_path / FILE).unlink()
        wait_for((tmp_path / FILE).exists)
        lease.check()
        assert content_of(tmp_path) == owner


def test_a_clock_that_jumps_ends_no_lease(tmp_path, monkeypatch):
    with Lease(str(tmp_path), **SHORT) as lease:
        for jump in (1e9, -1e9):
            now = time.time()
            monkeypatch.setattr(time, "time", lambda now=now, jump=jump: now + jump)
            os.utime(tmp_path / FILE, (1, 1))
            time.sleep(0.5)
            lease.check()
            with pytest.raises(UserError, match="is refused while it lives"):
                Lease(str(tmp_path), **SHORT).__enter__()


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": "x"}, {"pid": [1]}, {"pid": -1}, {"pid": 10**30}, {"pid": None}, {"expire_seconds": "soon"},
        {"expire_seconds": -5}, {"expire_seconds": [1]}, {"host": None}, {"boot": {}}, {"process_start": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_lease_of_nonsense_is_waited_for_and_then_taken(tmp_path, changes):
    make_foreign(str(tmp_path), **{"expire_seconds": 0.3} | changes)
    started = time.monotonic()
    with Lease(str(tmp_path), heartbeat_seconds=0.05, expire_seconds=0.3):
        assert time.monotonic() - started >= 0.3
        assert content(str(tmp_path))["pid"] == os.getpid()


@pytest.mark.parametrize("seconds", [1e300, 10**40, "Infinity", "NaN"])
def test_nobody_waits_for_ever(tmp_path, monkeypatch, seconds):
    monkeypatch.setattr("calibprune.lease.MAX_EXPIRE_SECONDS", 0.5)
    make_foreign(str(tmp_path))
    text = (
        (tmp_path / FILE)
        .read_text()
        .replace('"expire_seconds": 20.0', f'"expire_seconds": {seconds}')
    )
    (tmp_path / FILE).write_text(text)
    started = time.monotonic()
    with Lease(str(tmp_path), heartbeat_seconds=0.05, expire_seconds=0.2):
        assert 0.2 <= time.monotonic() - started < 60
