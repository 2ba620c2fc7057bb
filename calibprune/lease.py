"""Keeps a run to one driver: a lease file, `<run>/_lease.json`, that its holder keeps rewriting.

A lease prevents work from being done twice and settings from being mixed; it does not protect the data, since units
commit safely without it. So it is enough that one of two drivers stops soon, even on stores that ignore conditional
writes. No clocks are compared: a holder whose count does not grow for `expire_seconds` by the watcher's own clock is
gone.
"""

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from calibprune import storage
from calibprune.errors import LeaseExpired, LeaseLost, UserError
from calibprune.events import note
from calibprune.redact import one_line

FILE = "_lease.json"
MAX_EXPIRE_SECONDS = 3600.0
"""Longest wait for a holder, whatever its lease asks for."""
LAST_READ_SECONDS = 5.0
"""Time for a last reading of the lease, when it was not renewed in time, to find its new holder."""


@dataclass(frozen=True)
class Holder:
    """The driver that a lease names, for display only: `alive` is an estimate, since it compares clocks."""

    host: str
    pid: int | None
    since: str
    """ISO time."""
    silent_seconds: float | None
    """Time since the last renewal, by the store's clock and this machine's; None where the store does not give it."""
    alive: bool


def read_holder(run_url: str) -> Holder | None:
    """Reads which driver holds a run; None where there is no lease. Changes nothing."""
    url = storage.join(run_url, FILE)
    try:
        holder, written = _parse(storage.read_bytes(url)), storage.written_at(url)
    except FileNotFoundError:
        return None
    silent = None if written is None else max(0.0, time.time() - written)
    pid, expire = holder.get("pid"), holder.get("expire_seconds")
    expire = expire if isinstance(expire, int | float) else 30.0
    pid = pid if isinstance(pid, int) else None
    alive = pid is not None and (silent or 0.0) < expire and not _is_dead_here(holder)
    return Holder(str(holder.get("host")), pid, str(holder.get("at")), silent, alive)


class Lease:
    """A context manager: inside, this process is the run's only driver, for as long as `check()` raises nothing.

    A daemon thread renews the lease. It needs the interpreter from time to time: after `expire_seconds` in a stopped
    process, or in C code that holds the GIL, another driver may take the lease; `check()` then raises. The thread does
    not survive a fork: the child must not use the lease.
    """

    def __init__(
        self,
        run_url: str,
        *,
        heartbeat_seconds: float = 5.0,
        expire_seconds: float = 30.0,
    ) -> None:
        self.url = storage.join(run_url, FILE)
        self._run_url = run_url
        self._heartbeat, self._expire = heartbeat_seconds, expire_seconds
        self._settle = min(1.0, heartbeat_seconds / 4)
        self._mine = _this_process() | {
            "owner": uuid.uuid4().hex,
            "count": 0,
            "expire_seconds": expire_seconds,
        }
        self._superseded: str | None = None
        self._successor: dict[str, Any] | None = None
        self._trouble = ""
        self._alive_at = 0.0
        self._lost, self._leaving = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Self:
        """Takes the lease; waits `expire_seconds` for a holder that may be gone. Raises UserError where it is alive."""
        self._acquire()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._thread.join(self._expire)
        if not self.lost:
            # a lease that cannot be removed expires by itself
            with contextlib.suppress(OSError, UserError):
                if _owner(self._read()) == self._mine["owner"]:
                    storage.remove(self.url, self._expire)

    @property
    def lost(self) -> bool:
        """Whether another driver holds the run, or may, since the lease was not renewed for `expire_seconds`."""
        if not self._leaving.is_set() and time.monotonic() - self._alive_at > self._expire:
            self._lost.set()
        return self._lost.is_set()

    def check(self) -> None:
        """Raises LeaseLost when another driver took over, LeaseExpired when one may because the lease ran out."""
        if not self.lost:
            return
        self._thread.join(self._heartbeat + LAST_READ_SECONDS)
        if self._successor is not None:
            raise LeaseLost(
                f"another driver took over {self._run_url}: {_described(self._successor)} holds it now; this one "
                f"stops, nothing committed is lost"
            )
        raise LeaseExpired(
            f"the lease {self.url} could not be renewed for {self._expire:.0f} s{self._trouble}, so that another "
            f"driver may take over: this one stops, nothing committed is lost"
        )

    def _acquire(self) -> None:
        while True:
            found = self._read()
            if found is None:
                if not self._create():
                    continue
            else:
                if not _is_dead_here(_parse(found)):
                    found = self._watch(found)
                    if found is None:
                        continue
                if self._read() != found:  # another driver was quicker
                    continue
                self._superseded = _owner(found)
                self._write()
            if not storage.is_local(self.url) or self._superseded:
                time.sleep(self._settle)
            winner = self._read()
            if _owner(winner) == self._mine["owner"]:
                return
            if winner is not None:
                raise self._refusal(_parse(winner))

    def _watch(self, found: bytes) -> bytes | None:
        """Waits until a lease has expired; None if it is removed meanwhile. Raises UserError if it is renewed."""
        holder = _parse(found)
        expire = min(max(self._expire, _number(holder, "expire_seconds")), MAX_EXPIRE_SECONDS)
        note(
            f"{_described(holder)} holds {self._run_url}: taking over unless it shows signs of life within "
            f"{expire:.0f} s"
        )
        waited_since = time.monotonic()
        while time.monotonic() - waited_since < expire:
            time.sleep(min(1.0, expire / 20))
            now = self._read()
            if now is None:
                return None
            if now != found:
                raise self._refusal(_parse(now))
        return found

    def _keep(self) -> None:
        """Renews the lease at every heartbeat. Reads before it writes, so that a holder that slept does not overwrite
        its successor."""
        while not self._leaving.wait(self._heartbeat):
            expired = self.lost  # then this is the last reading, to find who took over
            try:
                found = self._read()
                owner = _owner(found)
                if owner not in (self._mine["owner"], self._superseded, None):
                    self._successor = _parse(found or b"")
                    self._lost.set()
                elif expired:
                    pass
                elif owner == self._mine["owner"]:
                    self._write()
                elif found is None:
                    self._create()
                else:
                    # the superseded holder woke up between its read and its write; or the file is damaged
                    self._write()
            except (OSError, UserError) as error:  # retried at the next heartbeat, until it expires
                self._trouble = f": {one_line(getattr(error, 'strerror', None) or error)}"
            if expired or self._successor:
                return

    def _write(self) -> None:
        started = time.monotonic()
        self._mine["count"] += 1
        storage.write(self.url, storage.json_bytes(self._mine), self._expire / 3)
        self._renewed(started)

    def _create(self) -> bool:
        started = time.monotonic()
        self._mine["count"] += 1
        made = storage.create(self.url, storage.json_bytes(self._mine), self._expire / 3)
        if made:
            self._renewed(started)
        return made

    def _renewed(self, started: float) -> None:
        """Records a renewal as of `started`, before the write: a watcher saw the file change later, never earlier."""
        if self._alive_at and time.monotonic() - self._alive_at > self._expire:
            self._lost.set()
        self._alive_at, self._trouble = started, ""

    def _read(self) -> bytes | None:
        try:
            return storage.read_bytes(self.url, self._expire / 3)
        except FileNotFoundError:
            return None

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        return UserError(
            f"{_described(holder)} is working on {self._run_url}: a second run on the same output is refused while it "
            f"lives; wait for it, stop it, or choose another output"
        )


def _this_process() -> dict[str, Any]:
    """Returns what identifies this process as a holder, so that its machine or container can check that it lives."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": (_state_and_start(os.getpid()) or ("", ""))[1],
        "boot": _boot(),
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _boot() -> str | None:
    """Returns the boot and the process namespace in which a process id is valid; None where they cannot be found."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _state_and_start(pid: int) -> tuple[str, str] | None:
    """Returns a process's state and its start in ticks since boot (proc(5), stat); None if there is no process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Returns whether the holder ran on this machine since its last boot, and no longer does."""
    here = _this_process()
    if not here["boot"] or (holder.get("host"), holder.get("boot")) != (here["host"], here["boot"]):
        return False
    found = _state_and_start(int(_number(holder, "pid")))
    return found is None or found[0] in "ZX" or found[1] != holder.get("process_start")


def _parse(data: bytes) -> dict[str, Any]:
    """Parses a lease. An unreadable one has no holder: it is watched by its bytes."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    readable = isinstance(found, dict) and isinstance(found.get("owner"), str)
    return found if readable else {}


def _owner(data: bytes | None) -> str | None:
    return None if data is None else _parse(data).get("owner")


def _number(holder: dict[str, Any], key: str) -> float:
    """Returns a value that is a finite number of zero or more; 0 for anything else."""
    value = holder.get(key)
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 << 53 else 0.0


def _described(holder: dict[str, Any]) -> str:
    if not holder.keys() >= {"owner", "pid", "host", "at"}:
        return "another driver"
    return f"the driver with process id {holder['pid']} on {holder['host']}, at it since {holder['at']},"
