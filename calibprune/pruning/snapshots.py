"""Saves the hidden states before a layer at intervals, so that a resumed sweep need not begin at the first layer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from calibprune import storage
from calibprune.checkpoint import from_bytes, to_bytes
from calibprune.gang import Gang
from calibprune.stage import Stage

FOLDER = "snapshots"


class Snapshots:
    """Snapshots of the hidden states every `interval` layers, a file for each micro-batch; None for no snapshots.

    A snapshot is valid once all its micro-batches are committed. The last two are kept.
    """

    def __init__(self, stage: Stage, gang: Gang, micro_batches: int, interval: int | None) -> None:
        self._stage, self._gang, self._interval = stage, gang, interval
        self._units = [f"batch-{index:05d}" for index in range(micro_batches)]

    def latest(self, before: int) -> int:
        """Returns the last layer, at most `before`, that can be entered from a snapshot; 0 if none can. Collective."""
        if self._interval is None:
            return 0
        found = 0
        if self._gang.rank == 0:
            for layer in range(self._interval, before + 1, self._interval):
                if set(self._units) <= self._at(layer).done_units():
                    found = layer
        return int(self._gang.largest(found))

    def reader(self, layer: int, device: torch.device) -> Callable[[int], Tensor] | None:
        """Returns a function that reads the hidden states, [sequences, tokens, hidden], of this worker's micro-batch
        with a number; None for layer 0."""
        stage = self._at(layer)

        def read(mine: int) -> Tensor:
            unit = self._gang.dealt(self._units)[mine]
            return from_bytes(stage.read(stage.record(unit)))["hidden"].to(device)

        return read if layer else None

    def write(self, layer: int, hidden: Sequence[Tensor]) -> None:
        """Commits this worker's micro-batches if a snapshot is due; removes the snapshot before the previous one."""
        if self._interval is None or layer % self._interval:
            return
        stage = self._at(layer)
        for unit, states in zip(self._gang.dealt(self._units), hidden, strict=True):
            data = to_bytes({"hidden": states.cpu()})
            stage.commit(unit, stage.put(unit, data, "safetensors", "data", "hidden"), {})
        if self._gang.rank == 0 and layer > 2 * self._interval:
            storage.remove_folder(self._at(layer - 2 * self._interval).url)

    def _at(self, layer: int) -> Stage:
        return Stage(storage.join(self._stage.url, FOLDER, f"{layer:05d}"))
