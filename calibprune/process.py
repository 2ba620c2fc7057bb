"""This process: where it runs, how much memory it has, and how to give that back."""

import ctypes
import resource
import socket
from pathlib import Path


def node() -> str:
    """The name of this machine, or of its container: what the records of the work done here say."""
    return socket.gethostname()


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
