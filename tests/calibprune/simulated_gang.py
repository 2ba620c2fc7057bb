"""A gang in one thread: its workers run in turn, each until the next exchange."""

from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from calibprune.gang import Gang


class SimulatedGang(Gang):
    """One worker of a gang whose exchanges `simulate` carries out."""

    def _exchange(self, given: Any) -> list[Any]:
        """Returns what all workers gave, in order of rank."""
        parent = getcurrent().parent
        assert parent is not None
        return parent.switch(given)

    def broadcast(self, pieces) -> None:
        mine = list(pieces)
        given = self._exchange([tensor.clone() if s == self.rank else None for tensor, s in mine])
        for place, (tensor, source) in enumerate(mine):
            tensor.copy_(given[source][place])

    def add(self, tensor: Tensor) -> Tensor:
        assert tensor.dtype == torch.int64
        return tensor.copy_(torch.stack(self._exchange(tensor.clone())).sum(0))

    def add_at(self, pieces) -> None:
        for tensor, worker in pieces:
            total = torch.stack(self._exchange(tensor.clone())).sum(0)
            tensor.copy_(total if worker == self.rank else torch.full_like(tensor, -1))

    def largest(self, value: float) -> float:
        return max(self._exchange(value))


def simulate(size: int, work: Callable[[Gang], Any]) -> list[Any]:
    """Runs `work` on every worker of a gang; returns what each returned."""
    workers = [greenlet(lambda gang: ("done", work(gang))) for _ in range(size)]
    given = [w.switch(SimulatedGang(rank, size)) for rank, w in enumerate(workers)]
    while not all(worker.dead for worker in workers):
        assert not any(worker.dead for worker in workers), "workers exchange different things"
        given = [worker.switch(given) for worker in workers]
    return [result for _, result in given]
