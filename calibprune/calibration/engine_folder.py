"""A private folder for an engine's sockets and temporary files, and for notes of its processes and shared memory.

vLLM creates all of these in places shared by all processes, and a killed process removes nothing: its children live on
and hold their GPUs. Here the folder is removed with its engine, and everything that starts on a GPU also ends and
removes what dead engines left on the same machine; a lock shows which engines are alive.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path

PREFIX = "calibprune-engine-"
LOCK, SHARED_MEMORY, PROCESSES, ERRORS = "lock", "shared-memory", "processes", "errors"
YOUNG_SECONDS = 5.0
"""Age below which a folder may not be locked yet."""
LONGEST_ROOT = 40
"""Maximum characters of the folder for temporary files with which the names of sockets stay within Linux's limit."""
RECORD_SECONDS = 0.5
"""Pause between two records of the processes that start, and of the shared memory that they hold."""
END_SECONDS = 20.0
"""Longest wait for killed processes to be gone: only then is the memory of their GPUs free."""
SHM = Path("/dev/shm")
_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception): (.+)$", re.MULTILINE)
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
        self._processes: set[str] = set()

    @contextlib.contextmanager
    def as_tmpdir(self) -> Iterator[None]:
        """Makes processes started inside the block use the folder for temporary files, and records these processes and
        the shared memory that they hold."""
        before, others = os.environ.get("TMPDIR"), set(_descendants(os.getpid()))
        os.environ["TMPDIR"] = os.environ["VLLM_RPC_BASE_PATH"] = str(self.path)
        done = threading.Event()

        def record() -> None:
            while not done.wait(RECORD_SECONDS):
                self._record(others)

        thread = threading.Thread(target=record, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._record(others)
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before

    def logging_file(self) -> str:
        """Returns the path of a configuration of Python's logging with which vLLM logs errors to the folder too."""
        level = os.environ.get("VLLM_LOGGING_LEVEL", "INFO")
        stderr = {"class": "logging.StreamHandler", "level": level}
        file = {
            "class": "logging.FileHandler", "level": "ERROR", "delay": True,
            "filename": str(self.path / ERRORS),
        }  # fmt: skip
        wanted = {
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": {"stderr": stderr, "file": file},
            "loggers": {
                "vllm": {"handlers": ["stderr", "file"], "level": level, "propagate": False}
            },
        }
        path = self.path / "logging.json"
        path.write_text(json.dumps(wanted))
        return str(path)

    def first_error(self) -> str | None:
        """Returns the first error that the engine's processes logged, without its traceback; later ones follow from it.
        None where there is none."""
        with contextlib.suppress(OSError):
            if found := _ERROR.search((self.path / ERRORS).read_text(errors="replace")):
                return found[1].strip()
        return None

    def remove(self) -> None:
        """Removes the folder and the shared memory, and what dead engines left."""
        _remove(self.path)
        self._lock.close()
        remove_leftovers()

    def _record(self, others: Collection[int]) -> None:
        """Notes this process's descendants but `others`, and the names of the shared memory that they hold or held."""
        started = [process for process in _descendants(os.getpid()) if process not in others]
        inodes = {inode for process in started for inode in _mapped(process)}
        # only added to, since a process that held something may have been killed
        self._held |= {entry.name for entry in os.scandir(SHM) if str(entry.inode()) in inodes}
        self._processes |= {note for process in started if (note := _identity(process))}
        _replace(self.path / SHARED_MEMORY, self._held)
        _replace(self.path / PROCESSES, self._processes)


def remove_leftovers() -> None:
    """Ends the processes of this user's engines that were killed, and removes their folders and shared memory."""
    for folder in Path(_root()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # its engine is alive, or another process is removing it
            if folder.lstat().st_uid != os.getuid():
                continue
            lock = (
                folder / LOCK
            )  # written once, while the folder changes as long as its engine starts
            made = (lock if lock.exists() else folder).stat().st_mtime
            if time.time() - made < YOUNG_SECONDS:
                continue
            with lock.open("ab") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _end(folder)
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


def _end(folder: Path) -> None:
    """Kills the noted processes that still live, and waits until they are gone."""
    notes = (folder / PROCESSES).read_text().splitlines() if (folder / PROCESSES).exists() else []
    deadline = time.monotonic() + END_SECONDS
    while alive := [int(note.split()[0]) for note in notes if _is_alive(note)]:
        for process in alive:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _is_alive(note: str) -> bool:
    process = note.partition(" ")[0]
    return process.isdecimal() and _identity(int(process)) == note


def _identity(process: int) -> str | None:
    """Returns a process's number, start time and boot of the machine, which no other process ever has; None where it
    has ended."""
    with contextlib.suppress(OSError):
        # the name, in parentheses, may hold anything
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if state in "ZX" else f"{process} {fields[18]} {boot}"
    return None


def _replace(file: Path, lines: Collection[str]) -> None:
    """Writes a file whole: a process that is killed meanwhile leaves the old one."""
    file.with_suffix(".new").write_text("\n".join(sorted(lines)))
    file.with_suffix(".new").replace(file)


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
