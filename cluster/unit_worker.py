"""The actor that makes units of a stage one after another, with the function that it is given."""

from collections.abc import Callable, Iterator, Sequence

from calibprune.events import Event, listening
from calibprune.process import keep_compiled_code_private, node
from cluster.label import Label
from cluster.metrics import WorkMetrics


class UnitWorker:
    """Runs `function(units)`, a generator of events that commits the units in the order given."""

    def __init__(self, function: Callable[[Sequence[str]], Iterator[Event]], label: Label) -> None:
        self._function, self._label = function, label

    def start(self) -> str:
        """Returns the name of this machine."""
        keep_compiled_code_private()
        return node()

    def make(self, units: Sequence[str]) -> Iterator[Event]:
        """Yields UnitDone for every unit, and Tick from time to time while a unit takes long."""
        with listening(WorkMetrics(self._label)):
            yield from self._function(units)
