"""Decides which of the workers lost at about the same time took the others with it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

CULPRIT_SECONDS = 30.0
"""Time in which a dead worker or node is looked for after a loss that may be another one's consequence. Ray notices
the death of a process at once, and that of a node after several missed answers."""


class WorkerLost(RuntimeError):
    """A worker of the gang died, hangs or failed; the message has its name, its layer and the cause."""

    def __init__(
        self, name: str, place: str, reason: str,
        host: str | None = None, layer: int | None = None, kind: str = "worker",
    ) -> None:  # fmt: skip
        super().__init__(f"{name}{place} was lost {reason}")
        self.name, self.reason, self.host, self.layer, self.kind = name, reason, host, layer, kind


@dataclass
class Suspects:
    """The workers of a gang that were lost within moments of one another.

    A worker that merely reports the loss of a peer is no culprit. A process that died may not be one either: NCCL ends
    the survivors' processes too, and the death of a node is noticed last.
    """

    deaths_spread: bool
    """Whether a death may be the consequence of the death of another node, which is not noticed yet."""
    dead_nodes: Callable[[], Collection[int]]
    """Returns the workers whose nodes are dead."""
    ended_at: Callable[[int], float]
    """Returns when a dead worker's process ended, as far as the cluster knows."""
    _since: float = 0.0
    _dead: dict[int, WorkerLost] = field(default_factory=dict)
    _bereft: dict[int, WorkerLost] = field(default_factory=dict)
    _out_of_reach: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self._dead or self._bereft)

    def add(
        self, rank: int, loss: WorkerLost, now: float, *, died: bool, out_of_reach: bool = False
    ) -> None:
        """Adds a worker whose process died, or that reports that it lost its peers; `out_of_reach` means that nobody
        knows yet whether it died."""
        self._since = self._since if self else now
        (self._dead if died else self._bereft)[rank] = loss
        self._out_of_reach |= {rank} if out_of_reach else set()

    def culprit(self, now: float, silent: int) -> int | None:
        """Returns the worker that took the others with it, while `silent` others report nothing; None while a better
        suspect may still be found."""
        if gone := self.dead_nodes():
            return min(gone)
        certain = self._dead.keys() - self._out_of_reach
        waiting = self.deaths_spread or not certain
        # without anyone left to report, only what is out of reach may still turn out to be a dead node
        nobody_left = not silent and not self._out_of_reach and not self.deaths_spread
        if waiting and not nobody_left and now - self._since <= CULPRIT_SECONDS:
            return None
        if self._dead:
            return min(certain or self._dead, key=lambda rank: (self.ended_at(rank), rank))
        return next(iter(self._bereft))

    def loss(self, rank: int) -> WorkerLost | None:
        """Returns the loss that was added of a worker."""
        return self._dead.get(rank) or self._bereft.get(rank)
