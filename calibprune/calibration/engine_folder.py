"""A private folder for an engine's sockets and temporary files, and for the names of the shared memory that it holds.

vLLM creates all of these in places shared by all processes, and a killed process removes nothing. Here the folder is
removed with its engine, and every engine that starts or stops also removes what dead engines left on the same machine;
a lock shows which engines are alive.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "calibprune-engine-"
LOCK, SHARED_MEMORY = "lock", "shared-memory"
YOUNG_SECONDS = 5.0
"""Age below which a folder may not be locked yet."""
LONGEST_ROOT = 40
"""Maximum characters of the folder for temporary files with which the names of sockets stay within Linux's limit."""
RECORD_SECONDS = 0.5
"""Pause between two records of the shared memory that starting processes hold."""
SHM = Path("/dev/shm")
_NAME = re.compile(r"(?:sem\.mp-|psm_)\w+")
_MAPPED = re.compile(rf"(\d+)\s+{SHM}/")
"""Inode of a mapping. The path behind it is of no use: a semaphore's is a name that it had only for a moment."""


class EngineFolder:
    """The folder of one engine: made before the engine starts, removed after it has ended."""

    def __init__(self) -> None:
        remove_leftovers()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_root()))
        self._lock = (self.path / LOCK).open("ab")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._held: set[str] = set()

    @contextlib.contextmanager
    def as_tmpdir(self) -> Iterator[None]:
        """Makes processes started inside the block use the folder for temporary files, and records the shared memory
        that they hold."""
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = os.environ["VLLM_RPC_BASE_PATH"] = str(self.path)
        done = threading.Event()

        def record() -> None:
            while not done.wait(RECORD_SECONDS):
                self._record()

        thread = threading.Thread(target=record, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._record()
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before

    def remove(self) -> None:
        """Removes the folder and the shared memory, and what dead engines left."""
        _remove(self.path)
        self._lock.close()
        remove_leftovers()

    def _record(self) -> None:
        """Writes the names of the shared memory that this process's descendants hold or held."""
        inodes = {inode for process in _descendants(os.getpid()) for inode in _mapped(process)}
        # names are only added, since a process that held one may have been killed
        self._held |= {entry.name for entry in os.scandir(SHM) if str(entry.inode()) in inodes}
        (self.path / SHARED_MEMORY).write_text("\n".join(sorted(self._held)))


def remove_leftovers() -> None:
    """Removes the folders and shared memory of this user's engines that were killed."""
    for folder in Path(_root()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # its engine is alive, or another process is removing it
            status = folder.lstat()
            young = time.time() - status.st_mtime < YOUNG_SECONDS
            if status.st_uid != os.getuid() or young:
                continue
            with (folder / LOCK).open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)


def _root() -> str:
    """Returns the folder for temporary files, unless its path would make sockets' names longer than Linux allows."""
    root = tempfile.gettempdir()
    return root if len(root) <= LONGEST_ROOT else "/tmp"


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for name in (folder / SHARED_MEMORY).read_text().split():
            if _NAME.fullmatch(name):
                (SHM / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _descendants(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _mapped(process: int) -> list[str]:
    with contextlib.suppress(OSError):
        return _MAPPED.findall(Path(f"/proc/{process}/maps").read_text())
    return []
