"""Progress with rate and time left: a live bar on a terminal, a plain line now and then in a log."""

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from calibprune.redact import plain
from jobs import log

LOG_SECONDS = 15.0
stop_asked = False
"""Set when a signal asks to stop: an exception raised from a signal handler may be lost inside a library's callback."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


def nobody_else() -> None:
    """There is no other driver to look out for."""


still_ours: Callable[[], None] = nobody_else
"""Raises where another driver has taken over the run."""


def tick() -> None:
    """Now and then while work goes on. Raises KeyboardInterrupt if the user asked to stop, and as `still_ours`."""
    if stop_asked:
        raise KeyboardInterrupt
    still_ours()


def say(text: str) -> None:
    """A line; what files, servers or models have named in it cannot steer the terminal, nor tell a secret."""
    if log.is_json():
        log.line(text)
        return
    console.print(plain(text), markup=False)


class Notes(logging.Handler):
    """Prints events and warnings as lines for people, until there is a terminal handler for all kinds of them."""

    def emit(self, record: logging.LogRecord) -> None:
        shown = hasattr(record, "event") or record.levelno >= logging.WARNING
        if shown and not log.is_json():
            console.print(plain(record.getMessage()), markup=False)


class Steps:
    """Counts a stage's steps on the terminal or in the log."""

    def __init__(self, stage: str, unit: str, total: int, done: int = 0) -> None:
        self._stage, self._unit, self._total, self._done = stage, unit, total, done
        self._begun_with, self._begun_at = done, time.monotonic()
        self._said_at = self._begun_at
        self._bar: Progress | None = None
        if console.is_terminal and not log.is_json():
            self._bar = Progress(
                TextColumn("{task.description:<9}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(stage, total=total, completed=done, detail="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        elif self._done:
            say(f"{self._stage}: {self._done} of {self._total} {self._unit} done already")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def to(self, done: int, detail: str = "") -> None:
        """`done` steps are done now. Raises as `tick` does."""
        tick()
        ended = done == self._total != self._done
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, detail=escape(plain(detail)))
        elif time.monotonic() - self._said_at >= LOG_SECONDS or ended:
            self._said_at = time.monotonic()
            details = f", {detail}" if detail else ""
            say(f"{self._stage}: {done} of {self._total} {self._unit}{self._pace()}{details}")

    def add(self, detail: str = "") -> None:
        self.to(self._done + 1, detail)

    def still(self, detail: str) -> None:
        """No further step is done. Raises as `tick` does."""
        self.to(self._done, detail)

    def _pace(self) -> str:
        made, seconds = self._done - self._begun_with, time.monotonic() - self._begun_at
        if not made:
            return ""
        left = (self._total - self._done) * seconds / made
        return f", {pace(seconds / made)}, {duration(left)} left"


def pace(each: float) -> str:
    """Seconds for each of many alike things in words: `143 s each`, `2.4 s each`, `250 a second`."""
    if each < 0.1:
        return f"{1 / max(each, 1e-9):.0f} a second"
    return f"{each:.{0 if each >= 9.95 else 1}f} s each"


def duration(seconds: float) -> str:
    """Seconds in words short enough for a log line."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
