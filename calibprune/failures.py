"""The losses of a stage, one small file each, `<stage>/_failures/<milliseconds>-<n>.json`, for users who watch a run.

They are separate files because object stores cannot append; their names sort by time. Only the driver writes them. A
run never depends on them, and never fails because of them.
"""

import time
import uuid
from dataclasses import asdict

from calibprune import storage
from calibprune.events import MAX_CHARACTERS, Event, EventHandler, Lost, note
from calibprune.redact import one_line

FOLDER = "_failures"
MAX_FAILURES = 2000
"""Maximum number of files kept for a stage; older ones are removed."""
PATIENCE_SECONDS = 5.0
"""Longest time in which one file is written."""
REST_SECONDS = 60.0
"""Pause after a store refused a file, in seconds; losses in the meantime are not written."""


class FailureFiles(EventHandler):
    """Writes a file for every Lost event. Raises nothing, and gives up within seconds."""

    def __init__(self, stage_url: str) -> None:
        super().__init__()
        self.url = storage.join(stage_url, FOLDER)
        self._rest_until, self._written = 0.0, 0
        self._names: list[str] | None = None

    def handle_event(self, event: Event) -> None:
        if not isinstance(event, Lost) or time.monotonic() < self._rest_until:
            return
        try:
            self._write(event)
        except Exception as error:  # a run must not fail because of this file
            self._rest_until = time.monotonic() + REST_SECONDS
            note(f"cannot write to {self.url}: {one_line(error, 200)}")

    def _write(self, lost: Lost) -> None:
        if self._names is None:
            self._names = storage.names(self.url, PATIENCE_SECONDS)
        while len(self._names) >= MAX_FAILURES:
            storage.remove(storage.join(self.url, self._names.pop(0)), PATIENCE_SECONDS)
        self._written += 1
        name = f"{int(1000 * lost.at):013d}-{self._written:05d}-{uuid.uuid4().hex[:4]}.json"
        content = asdict(lost) | {"message": one_line(lost.message, MAX_CHARACTERS)}
        data = storage.json_bytes(content)
        storage.write(storage.join(self.url, name), data, PATIENCE_SECONDS)
        self._names.append(name)


def read_failures(stage_url: str, last: int = 1) -> tuple[int, list[Lost]]:
    """Returns the number of losses, and the last ones of them, the latest first; a damaged file is skipped."""
    url = storage.join(stage_url, FOLDER)
    names = [name for name in storage.names(url) if name.endswith(".json")]
    wanted = names[: -last - 1 : -1]
    found = (_parsed(storage.join(url, name)) for name in wanted)
    return len(names), [lost for lost in found if lost is not None]


def _parsed(url: str) -> Lost | None:
    try:
        content = storage.read_json(url)
        attempt = content.get("attempt")
        return Lost(
            str(content["kind"]),
            str(content["message"]),
            tuple(map(str, content.get("units") or ())),
            attempt if isinstance(attempt, int) else None,
            str(content["node"]) if content.get("node") else None,
            str(content.get("name") or ""),
            float(content["at"]),
        )
    except (
        ValueError, TypeError, KeyError, AttributeError, FileNotFoundError, ArithmeticError, RecursionError
    ):  # fmt: skip
        return None
