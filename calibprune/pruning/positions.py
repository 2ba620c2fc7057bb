"""Selects the positions of the calibration pool that statistics are taken from, in the inputs of a group.

The forwards themselves run over every position, since a position that does not count is still context for others.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from calibprune.errors import UserError
from calibprune.gang import Gang
from calibprune.offload import Fetched


class Positions:
    """The positions that count of a pool [sequences, tokens]: those that are True in `counted`, or all."""

    def __init__(
        self,
        pool: Tensor,
        counted: Bool[Tensor, "sequences tokens"] | None,
        batch_sequences: int,
        gang: Gang,
    ) -> None:
        """Raises ValueError for fewer micro-batches than workers and where `counted` has another shape than the pool,
        UserError where no position counts.
        """
        sizes = [batch.numel() for batch in pool.split(batch_sequences)]
        if len(sizes) < gang.size:
            raise ValueError(f"{gang.size} workers, but only {len(sizes)} micro-batches to sweep")
        if counted is None:
            self._mine = None
            self.tokens = sizes
            return
        if counted.shape != pool.shape or counted.dtype != torch.bool:
            raise ValueError(
                f"positions are {counted.dtype} of shape {tuple(counted.shape)}, for a pool of {tuple(pool.shape)}"
            )
        if not counted.any():
            raise UserError(
                "no position of the calibration pool is marked as generated: set curate.positions to all"
            )
        batches = counted.split(batch_sequences)
        self._mine = gang.dealt(batches)
        self.tokens = [int(batch.sum()) for batch in batches]
        """Number of positions that count in each micro-batch of the whole gang."""

    def of(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Selects the positions that count from this worker's micro-batches."""
        return inputs if self._mine is None else Counted(inputs, self._mine)


class Counted(Sequence[Tensor]):
    """Micro-batches [sequences, tokens, in] or [sequences * tokens, in] at the positions that count: [counted, in].

    A micro-batch is selected when it is read, so that only one selection is in memory at a time.
    """

    def __init__(
        self, inputs: Sequence[Tensor], counted: Sequence[Bool[Tensor, "_ tokens"]]
    ) -> None:
        self._inputs, self._counted = inputs, counted

    @property
    def shapes(self) -> list[torch.Size]:
        return [
            torch.Size([int(counted.sum()), shape[-1]])
            for counted, shape in zip(self._counted, shapes_of(self._inputs), strict=True)
        ]

    @property
    def sequences(self) -> int:
        """Number of sequences with a position that counts; a batch without a sequence dimension is one sequence."""
        return sum(
            int(counted.any(1).sum() if len(shape) > 2 else counted.any())
            for counted, shape in zip(self._counted, shapes_of(self._inputs), strict=True)
        )

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return _selected(self._inputs[index], self._counted[index])

    def __len__(self) -> int:
        return len(self._inputs)

    def __iter__(self) -> Iterator[Tensor]:
        return map(_selected, self._inputs, self._counted)


def shapes_of(inputs: Sequence[Tensor]) -> list[torch.Size]:
    """Returns the shapes of micro-batches without fetching those in host memory."""
    if isinstance(inputs, Fetched | Counted):
        return inputs.shapes
    return [batch.shape for batch in inputs]


def sequences_of(inputs: Sequence[Tensor]) -> int:
    """Counts the sequences that the tokens of all micro-batches come from."""
    if isinstance(inputs, Counted):
        return inputs.sequences
    return sum(math.prod(shape[:-2]) for shape in shapes_of(inputs))


def _selected(batch: Tensor, counted: Tensor) -> Tensor:
    rows = batch.reshape(-1, batch.shape[-1])
    if len(rows) != counted.numel():
        raise ValueError(
            f"inputs of {len(rows)} rows for {counted.numel()} positions: not one row a token"
        )
    if counted.all():
        return rows
    return rows[counted.flatten().nonzero().squeeze(1).to(rows.device)]
