"""A private folder for an engine's sockets and temporary files, and the names of the shared memory that it holds: gone
when the engine is.

vLLM makes all of that in places that all share, and a process that is killed removes nothing. Here every engine that
starts or stops also removes what dead ones of the same machine left; a lock tells the living from the dead.
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
"""A folder so new may not be locked yet."""
LONGEST_ROOT = 40
"""Characters."""
NOTE_SECONDS = 0.5
SHM = Path("/dev/shm")
_NAME = re.compile(r"(?:sem\.mp-|psm_)\w+")
_MAPPED = re.compile(rf"(\d+)\s+{SHM}/")
"""The inode, before the path: what a semaphore's mapping calls itself is a name that it had for a moment only."""


class EngineFolder:
    """Made before the engine starts, removed after it has ended."""

    def __init__(self) -> None:
        remove_leftovers()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_root()))
        self._lock = (self.path / LOCK).open("ab")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._held: set[str] = set()

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """While this process starts others: they take the folder for temporary files, and the shared memory that they
        come to hold is written down."""
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = os.environ["VLLM_RPC_BASE_PATH"] = str(self.path)
        over = threading.Event()

        def note() -> None:
            while not over.wait(NOTE_SECONDS):
                self._note()

        thread = threading.Thread(target=note, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._note()
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before

    def remove(self) -> None:
        _remove(self.path)
        self._lock.close()
        remove_leftovers()

    def _note(self) -> None:
        inodes = {inode for process in _descendants(os.getpid()) for inode in _mapped(process)}
        # also what a process held that was killed since
        self._held |= {entry.name for entry in os.scandir(SHM) if str(entry.inode()) in inodes}
        (self.path / SHARED_MEMORY).write_text("\n".join(sorted(self._held)))


def remove_leftovers() -> None:
    """Of engines of this user that were killed."""
    for folder in Path(_root()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # of a living engine, or being removed by another
            status = folder.lstat()
            young = time.time() - status.st_mtime < YOUNG_SECONDS
            if status.st_uid != os.getuid() or young:
                continue
            with (folder / LOCK).open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)


def _root() -> str:
    """The folder for temporary files, unless sockets in it had names longer than Linux allows."""
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
