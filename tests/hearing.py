"""Records the events of a process for its test."""

import logging

from calibprune.events import Event, EventHandler, Lost, event_of


class Hearing(EventHandler):
    """Keeps every event and every line."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if event_of(record) is not None:
            self.events.append(event_of(record))

    @property
    def losses(self) -> list[Lost]:
        return [event for event in self.events if isinstance(event, Lost)]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)
