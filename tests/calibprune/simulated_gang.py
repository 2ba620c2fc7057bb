"""A gang in one process: its workers, a thread each, run in turn, each until the next exchange."""

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from calibprune.gang import Gang


class SimulatedGang(Gang):
    """One worker of a gang whose exchanges `simulate` carries out."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.given: SimpleQueue = SimpleQueue()
        self.taken: SimpleQueue = SimpleQueue()

    def _exchange(self, given: Any) -> list[Any]:
        """Returns what all workers gave, in order of rank."""
        self.given.put(given)
        taken = self.taken.get()
        if taken is None:
            raise RuntimeError("another worker failed")
        return taken

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


class Ended:
    """What a worker returned or raised."""

    result: Any = None
    error: BaseException | None = None


def simulate(size: int, work: Callable[[Gang], Any]) -> list[Any]:
    """Runs `work` on every worker of a gang; returns what each returned, or raises what one raised."""
    gangs = [SimulatedGang(rank, size) for rank in range(size)]

    def run(gang: SimulatedGang) -> None:
        ended = Ended()
        try:
            gang.taken.get()
            ended.result = work(gang)
        except BaseException as error:
            ended.error = error
        gang.given.put(ended)

    for gang in gangs:
        Thread(target=run, args=[gang], daemon=True).start()
    taken: Any = ()
    while True:
        given = []
        for gang in gangs:
            gang.taken.put(taken)
            given.append(gang.given.get())
        ended = [one for one in given if isinstance(one, Ended)]
        if error := next((one.error for one in ended if one.error), None):
            for gang in gangs:
                gang.taken.put(None)
            raise error
        if ended:
            assert len(ended) == size, "workers exchange different things"
            return [one.result for one in given]
        taken = given
