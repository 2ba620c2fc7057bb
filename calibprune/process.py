"""This process: where it runs, where it keeps compiled code, how much memory it has, and how to give that back."""

import contextlib
import ctypes
import os
import resource
import socket
from pathlib import Path


def node() -> str:
    """The name of this machine, or of its container: what the records of the work done here say."""
    return socket.gethostname()


def keep_compiled_code_private() -> None:
    """Has PyTorch, and what this process starts, keep compiled code with the user's other caches.

    A part of it makes a folder for that as soon as it is imported, by itself in the one for temporary files: under a
    name that everybody knows, and for good. Nothing is changed where a folder was chosen, or where the user has none.
    """
    name = "TORCHINDUCTOR_CACHE_DIR"
    if name in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if caches.parent.is_dir():
            folder = caches / "calibprune" / "torchinductor"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.environ[name] = str(folder)


def host_memory(field: str = "VmRSS") -> int:
    """Bytes of this process: resident now (VmRSS), or at most since it began (VmHWM).

    Not getrusage's maximum where that can be helped: it starts from what the parent process held.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def return_free_memory() -> None:
    """Gives what is freed but scattered back to the system, where the C library is glibc.

    Else it would grow from layer to layer: buffers come and go on several threads, each with a heap of its own.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
