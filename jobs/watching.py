"""What the driver of a stage tells about its units as they are committed or fail, for those who watch the run.

Every unit and every failure is one structured line of the log (jobs/log.py) and a step of the metrics; failures are
written down in the run's folder too, where `calibprune status` finds them.
"""

import time
from collections import Counter, deque
from dataclasses import replace
from typing import Any

from calibprune.failures import SET_ASIDE, Failure, Journal
from calibprune.stage import Record, Stage
from cluster.label import Label, label_of
from cluster.metrics import StageMetrics
from jobs import log
from jobs.progress import say

RECENT = 50
"""Commits from which the pace is taken."""


class Watch:
    """Of one stage by its driver, inside a session of Ray. Raises nothing that a run has to fear."""

    def __init__(self, stage: Stage, units: int, done: int, label: Label | None = None) -> None:
        self.label = label or label_of(stage.url)
        self._journal = Journal(stage.url, self._say)
        self._metrics = StageMetrics(self.label)
        self._units, self._done = units, done
        self._failures: Counter[str] = Counter()
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._metrics.record(done, units, None)

    def committed(self, record: Record, seconds: float | None = None) -> None:
        """`seconds` that the unit took, where its record does not say."""
        self._done += 1
        self._recent.append(time.monotonic())
        self._metrics.record(self._done, self._units, self._seconds_left())
        log.event(
            "unit",
            run=self.label.run, stage=self.label.stage, unit=record.unit,
            attempt=1 + self._failures[record.unit], node=record.node or None,
            seconds=_seconds(record.facts, seconds), done=self._done, units=self._units,
            bytes=record.bytes, **_figures(record.facts),
        )  # fmt: skip

    def failed(self, failure: Failure) -> None:
        if failure.kind != SET_ASIDE:
            self._failures.update(failure.units)
        self._journal.note(failure)
        self._metrics.failed(failure)
        log.failure(self.label.tags, failure)

    def lost(self, failure: Failure) -> None:
        """As `failed`, with a line of it."""
        self._say(f"lost {failure.in_words}")
        self.failed(failure)

    def failed_at(self, unit: str) -> Any:
        """As `failed`, of work that is all for one unit."""
        return lambda failure: self.failed(replace(failure, units=(unit,)))

    def _seconds_left(self) -> float | None:
        if len(self._recent) < 2:
            return None
        each = (self._recent[-1] - self._recent[0]) / (len(self._recent) - 1)
        return each * (self._units - self._done)

    def _say(self, line: str) -> None:
        say(f"{self.label.stage}: {line}")


def _seconds(facts: dict[str, Any], measured: float | None) -> float | None:
    """What the unit took by its own account, all kinds of work together, else by the driver's."""
    told = facts.get("seconds", measured)
    if isinstance(told, dict):
        told = sum(told.values())
    return None if told is None else round(told, 3)


def _figures(facts: dict[str, Any]) -> dict[str, Any]:
    """The plain numbers and words of a record; what is nested stays in the record."""
    return {
        key: value
        for key, value in facts.items()
        if isinstance(value, int | float | str) and key not in ("seconds", "run", "stage")
    }
