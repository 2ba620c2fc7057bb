"""What went wrong in a stage, one small file a failure, `<stage>/_failures/<milliseconds>-<n>.json`: for who watches.

Object stores cannot append, hence the files; names sort by time. Only the driver writes them. A run never depends on
them and never fails over them.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from calibprune import storage
from calibprune.redact import one_line

FOLDER = "_failures"
MOST = 2000
"""Failures kept of a stage: then the oldest go."""
PATIENCE_SECONDS = 5.0
REST_SECONDS = 60.0
"""After a store refused to take one: what fails then is not written down."""
MOST_CHARACTERS = 500
SET_ASIDE = "set aside"


@dataclass(frozen=True)
class Failure:
    """Something was lost that is made again, or not: an engine, a worker, a node, a task, a unit, the driver."""

    kind: str
    """What was lost: unit, engine, worker, node, task, driver; or `set aside`, of a unit that failed too often."""
    message: str
    units: tuple[str, ...] = ()
    """The units that were under way there."""
    attempt: int | None = None
    node: str | None = None
    at: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    @property
    def in_words(self) -> str:
        """One line without credentials; a node's name stands in the message of a worker's loss already."""
        alone = self.kind in ("unit", SET_ASIDE)
        units = f"{'' if alone else ' with'} {', '.join(self.units)}" if self.units else ""
        place = f" on {self.node}" if self.node and self.node not in self.message else ""
        attempt = f", attempt {self.attempt}" if self.attempt else ""
        return one_line(f"{self.kind}{units}{place}{attempt}: {self.message}", 2 * MOST_CHARACTERS)


def nobody(failure: Failure) -> None:
    """Tells nobody of a failure."""


class Journal:
    """Writes a stage's failures down. `tell` gets a line when the store does not take one."""

    def __init__(self, stage_url: str, tell: Callable[[str], None] = lambda line: None) -> None:
        self.url = storage.join(stage_url, FOLDER)
        self._tell, self._rest_until, self._written = tell, 0.0, 0
        self._names: list[str] | None = None

    def note(self, failure: Failure) -> None:
        """Raises nothing, and gives up within seconds."""
        if time.monotonic() < self._rest_until:
            return
        try:
            if self._names is None:
                self._names = storage.names(self.url, PATIENCE_SECONDS)
            while len(self._names) >= MOST:
                storage.remove(storage.join(self.url, self._names.pop(0)), PATIENCE_SECONDS)
            self._written += 1
            name = f"{int(1000 * failure.at):013d}-{self._written:05d}-{uuid.uuid4().hex[:4]}.json"
            content = asdict(failure) | {"message": one_line(failure.message, MOST_CHARACTERS)}
            storage.write(
                storage.join(self.url, name), storage.json_bytes(content), PATIENCE_SECONDS
            )
            self._names.append(name)
        except Exception as error:  # whatever it is, the run is worth more than its journal
            self._rest_until = time.monotonic() + REST_SECONDS
            self._tell(f"cannot write to {self.url}: {one_line(error, 200)}")


def read_failures(stage_url: str, last: int = 1) -> tuple[int, list[Failure]]:
    """How many there are, and the last ones, the latest first; a damaged file is passed over."""
    url = storage.join(stage_url, FOLDER)
    names = [name for name in storage.names(url) if name.endswith(".json")]
    found = []
    for name in names[: -last - 1 : -1]:
        try:
            content = storage.read_json(storage.join(url, name))
            found.append(
                Failure(
                    str(content["kind"]),
                    str(content["message"]),
                    tuple(map(str, content.get("units") or ())),
                    attempt if isinstance(attempt := content.get("attempt"), int) else None,
                    str(content["node"]) if content.get("node") else None,
                    float(content["at"]),
                )
            )
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            FileNotFoundError,
            ArithmeticError,
            RecursionError,
        ):
            continue
    return len(names), found
