"""How the rows of linears that share one input are dealt to a gang for solving.

Cut at fixed places, so that no matrix product's shape depends on the number of workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from calibprune.gang import ALONE, Gang

ROW_CHUNK = {"cpu": 128}
GPU_ROW_CHUNKS = 256, 4096
"""The fewest and the most rows that a GPU multiplies at once."""
CHUNKS = 32
"""Parts into which a group's rows are cut where they can be: as many workers have a share of almost the same size."""


def row_chunk(device: torch.device, rows: int) -> int:
    """Returns how many rows of a group's linears, `rows` in all, are multiplied at once: on GPUs a power of two."""
    lowest, highest = GPU_ROW_CHUNKS
    power_of_two = (1 << (rows // CHUNKS).bit_length()) >> 1
    return ROW_CHUNK.get(device.type, min(max(power_of_two, lowest), highest))


def row_slices(rows: Sequence[int], most: int) -> list[slice]:
    """Slices of at most `most` of the stacked rows of several matrices, none across two of them."""
    slices, begun = [], 0
    for count in rows:
        end = begun + count
        slices += [slice(start, min(start + most, end)) for start in range(begun, end, most)]
        begun = end
    return slices


@dataclass(frozen=True)
class RowShares:
    """Every worker has one run of the stacked rows, in order of rank, cut at multiples of `chunk` of a linear."""

    rows: tuple[int, ...]
    """Number of rows of every whole linear."""
    chunk: int
    gang: Gang = ALONE

    @classmethod
    def of(cls, weights: Sequence[Tensor], gang: Gang = ALONE) -> "RowShares":
        """The shares of whole weights [out, in]."""
        rows = tuple(len(w) for w in weights)
        return cls(rows, row_chunk(weights[0].device, sum(rows)), gang)

    @cached_property
    def _cuts(self) -> list[int]:
        """Where the stacked rows may be cut."""
        return [*(part.start for part in row_slices(self.rows, self.chunk)), sum(self.rows)]

    def run(self, rank: int) -> slice:
        """The worker's run of the stacked rows."""
        total = sum(self.rows)
        first, last = (
            min(self._cuts, key=lambda cut: abs(cut - total * edge / self.gang.size))
            for edge in (rank, rank + 1)
        )
        return slice(first, last)

    def ranges(self, rank: int) -> list[slice]:
        """The worker's rows of every linear; empty slices where it has none."""
        run, ranges, begun = self.run(rank), [], 0
        for rows in self.rows:
            start, stop = (min(max(edge - begun, 0), rows) for edge in (run.start, run.stop))
            ranges.append(slice(start, stop))
            begun += rows
        return ranges

    def by_parts(self, work: Callable[..., Tensor], *matrices: Sequence[Tensor]) -> list[Tensor]:
        """What `work` makes of this worker's rows of every linear, a part of fixed size at a time.

        Each of `matrices` has one tensor [rows, ...] per linear; `work` gets the part's rows of all of them, in memory
        of their own: nothing that it computes can depend on how rows are dealt.
        """
        results = []
        for tensors in zip(*matrices, strict=True):
            parts = row_slices([len(tensors[0])], self.chunk) or [slice(0, 0)]
            results.append(torch.cat([work(*(t[part].clone() for t in tensors)) for part in parts]))
        return results

    def sums(self, mine: Sequence[Tensor]) -> list[Tensor]:
        """The sum over all rows of every whole matrix, [in] each, in float64, from this worker's rows; to the bit the
        same for any number of workers. Collective."""
        cuts, own = row_slices(self.rows, self.chunk), self.run(self.gang.rank)
        places = [place for place, cut in enumerate(cuts) if own.start <= cut.start < own.stop]
        partial = torch.zeros(len(cuts), mine[0].shape[1], dtype=torch.float64)
        of_parts = self.by_parts(
            lambda rows: rows.sum(0, keepdim=True, dtype=torch.float64),
            [rows for rows in mine if len(rows)],
        )
        if places:
            partial[places] = torch.cat(of_parts).cpu()
        counts = [len(row_slices([rows], self.chunk)) for rows in self.rows]
        whole = self.gang.collect(partial, places).split(counts)
        return [parts.sum(0).to(mine[0].device) for parts in whole]

    def mine(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """This worker's rows of whole weights, as views."""
        ranges = self.ranges(self.gang.rank)
        return [weight[part] for weight, part in zip(weights, ranges, strict=True)]

    def pieces(self, weights: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        """Every worker's rows of whole weights, as views with the worker's rank: what to broadcast."""
        return [
            (weight[part], rank)
            for rank in range(self.gang.size)
            for weight, part in zip(weights, self.ranges(rank), strict=True)
        ]
