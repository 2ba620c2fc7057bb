"""Runs a Ray of one node that requires a token, and a connection to it that can be cut."""

import os
import secrets
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

from cluster.jobs_api import Client
from tests.servers import PATIENT_RAY, free_ports

BIN = Path(sys.executable).parent


@dataclass
class Head:
    """A running head node."""

    folder: Path
    port: int
    dashboard: int
    agent: int
    token: str = field(repr=False)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a shell on a user's own machine: it has the token, and nothing else of this Ray."""
        mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        return _plain_environment() | mine

    def client(self, port: int | None = None) -> Client:
        headers = {"Authorization": f"Bearer {self.token}"}
        return Client(f"http://127.0.0.1:{port or self.dashboard}", headers=headers)

    def processes(self, *titles: str) -> list[psutil.Process]:
        """Lists the processes of this Ray whose command lines begin so."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                mine = process.environ().get("RAY_TMPDIR") == str(self.folder)
                if mine and " ".join(process.cmdline()).startswith(titles or ""):
                    found.append(process)
        return found

    def everything_written(self) -> Iterator[bytes]:
        """Returns the contents of all files of this Ray: logs, packages, and what was unpacked from them."""
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield path.read_bytes()


@contextmanager
def head_with_token(cpus: int = 2) -> Iterator[Head]:
    """Starts a head. Raises RuntimeError with Ray's message where it does not come up. Leaves other Rays running."""
    head, process = _start(cpus, tries=3)
    try:
        yield head
    finally:
        _end(head, process)


def _start(cpus: int, tries: int) -> tuple[Head, subprocess.Popen]:
    """Retries with other ports, because Ray cannot reserve those that it is given."""
    folder = Path(tempfile.mkdtemp(prefix="head-"))
    port, dashboard, agent, client = free_ports(4)
    head = Head(folder, port, dashboard, agent, secrets.token_hex(32))
    environment = head.environment | PATIENT_RAY | {"RAY_TMPDIR": str(folder)}
    command = [
        BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--num-cpus={cpus}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000",
    ]  # fmt: skip
    with (folder / "start.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(head, process)
    except BaseException as error:
        _end(head, process)
        if isinstance(error, RuntimeError) and tries > 1:
            return _start(cpus, tries - 1)
        raise
    return head, process


def _end(head: Head, process: subprocess.Popen) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    for left in head.processes():
        with suppress(psutil.Error):
            left.kill()
    shutil.rmtree(head.folder, ignore_errors=True)


class Line:
    """A port of this machine that forwards to another one while it is not cut."""

    def __init__(self, to: int) -> None:
        self._to, self._server = to, socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._is_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends the connections over it, and every later one until it is restored."""
        self._is_cut = True
        for one in [end for pair in self._pairs for end in pair]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def mend(self) -> None:
        self._is_cut = False

    def _accept(self) -> None:
        while True:
            here, _ = self._server.accept()
            if self._is_cut:
                here.close()
                continue
            there = socket.create_connection(("127.0.0.1", self._to))
            self._pairs.append((here, there))
            threading.Thread(target=_carry, args=(here, there), daemon=True).start()


def _carry(here: socket.socket, there: socket.socket) -> None:
    both = selectors.DefaultSelector()
    both.register(here, selectors.EVENT_READ, there)
    both.register(there, selectors.EVENT_READ, here)
    with suppress(OSError), here, there:
        while True:
            for key, _ in both.select():
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                if not data:
                    return
                key.data.sendall(data)


def _plain_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{BIN}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"PATH": path, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def _wait_for(head: Head, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    headers = {"Authorization": f"Bearer {head.token}"}
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError):
            if requests.get(f"{head.address}/api/jobs/", headers=headers, timeout=5).ok:
                with socket.create_connection(
                    ("127.0.0.1", head.agent)
                ):  # which runs what is submitted
                    return
        time.sleep(0.2)
    logs = [head.folder / "start.log", *head.folder.glob("session_2*/logs/gcs_server.*")]
    raise RuntimeError("\n".join(f"{log.name}:\n{log.read_text()[-5000:]}" for log in logs))
