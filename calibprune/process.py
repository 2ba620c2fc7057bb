"""This process: the machine it runs on, where it keeps compiled code, and how much memory it uses and gives back."""

import contextlib
import ctypes
import os
import resource
import socket
import threading
from pathlib import Path

BACKGROUND = 5
"""Steps of priority that threads whose work is not waited for stand back, so that they get a third of what computing
gets. With much less, other programs on the machine would hold them up until they are waited for after all."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of the options in glibc's malloc.h."""


def node() -> str:
    """Returns the name of this machine or container, which is recorded with the work done here."""
    return socket.gethostname()


def keep_compiled_code_private() -> None:
    """Makes PyTorch, here and in child processes, keep compiled code with the user's other caches.

    By default a part of PyTorch creates a folder for it on import, in the shared folder for temporary files, under a
    name that other users can guess, and never removes it. Changes nothing where the variable is set already, or where
    the user has no home folder.
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
    """Returns this process's memory in bytes: resident now (VmRSS), or at its peak so far (VmHWM).

    getrusage's maximum is only the fallback, since it starts from what the parent process held.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def keep_freed_memory() -> None:
    """Makes the C library reuse freed memory instead of returning it to the system, where it is glibc.

    By default every large tensor is fresh memory, of which the system clears each page at its first use: a fifth of
    the time of a forward on fast processors. Call `return_freed_memory` from time to time.
    """
    with contextlib.suppress(AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_MMAP_THRESHOLD, 1 << 30)
        set_option(M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Returns freed but scattered memory to the system, where the C library is glibc.

    Otherwise the process would grow from layer to layer, since buffers come and go on several threads, each with a
    heap of its own.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def yield_to_others() -> None:
    """Gives the calling thread less of busy cores than other threads get; without effect where the system does not know
    priorities of threads."""
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        before = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(19, before + BACKGROUND))
