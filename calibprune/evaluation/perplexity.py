"""Measures the perplexity of held-out texts in a streamed sweep, for models larger than memory too."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from calibprune.errors import UserError
from calibprune.events import LayerEntered, emit
from calibprune.gang import ALONE, Gang
from calibprune.layer_stream import LayerReader
from calibprune.model import Skeleton
from calibprune.offload import Parking
from calibprune.sweep import LayerStop, Sweep

LOSS_ROWS = 256
"""Number of positions whose logits are held in float32 at a time: with a vocabulary of 128k each takes 0.5 MB."""


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text: exp of the mean negative log-likelihood over all predicted tokens, equally weighted."""

    perplexity: float
    predicted_tokens: int
    sequences: int
    sequence_tokens: int


def cut_windows(
    token_ids: list[int], sequence_tokens: int, sequences: int | None, name: str
) -> Int[Tensor, "sequences tokens"]:
    """Cuts a text into consecutive windows without overlap; the rest at the end is left out.

    Raises UserError when the text is too short for `sequences` windows, or for one.
    """
    available = len(token_ids) // sequence_tokens
    wanted = available if sequences is None else sequences
    if available < max(1, wanted):
        raise UserError(
            f"held-out text {name} has {len(token_ids)} tokens, too few for {max(1, wanted)} windows of "
            f"{sequence_tokens}: lower evaluate.sequences or evaluate.sequence_tokens"
        )
    return torch.tensor(token_ids[: wanted * sequence_tokens]).view(wanted, sequence_tokens)


def sweep_perplexity(
    skeleton: Skeleton,
    windows: Mapping[str, Int[Tensor, "_ tokens"]],
    batch_sequences: int,
    gang: Gang = ALONE,
    work: str = "",
    offload: bool = False,
) -> Generator[LayerEntered, None, dict[str, Perplexity]]:
    """Measures the perplexity of every text in one pass over the model's layers, made by all workers of the gang.

    The generator's value is the same on every worker, and for any number of workers. `work` names the purpose of the
    pass in the events; with `offload`, what paused forwards hold on a GPU is kept in host memory. Raises PeerLost when
    another worker is gone.
    """
    names = [name for name, texts in windows.items() for _ in texts.split(batch_sequences)]
    batches = [batch for texts in windows.values() for batch in texts.split(batch_sequences)]

    def summed(logits: Tensor, targets: Tensor) -> float:
        return summed_nll(logits.flatten(0, 1), targets.flatten())

    results = yield from sweep_logits(skeleton, batches, summed, gang, work, offload)
    mine = gang.dealt(range(len(batches)))
    nlls = torch.zeros(len(batches), dtype=torch.float64)
    nlls[mine] = torch.tensor(results, dtype=torch.float64)
    nlls = gang.collect(nlls, mine).tolist()
    return {
        name: _perplexity(
            [nll for of, nll in zip(names, nlls, strict=True) if of == name], sequences
        )
        for name, sequences in windows.items()
    }


def sweep_logits(
    skeleton: Skeleton,
    batches: Sequence[Int[Tensor, "_ _"]],
    measure: Callable[[Tensor, Tensor], Any],
    gang: Gang = ALONE,
    work: str = "",
    offload: bool = False,
) -> Generator[LayerEntered, None, list[Any]]:
    """Passes all batches of token ids once through the model's layers, which need not fit memory together. Collective.

    `measure(logits [sequences, tokens - 1, vocabulary], targets [sequences, tokens - 1])` is called for each of this
    worker's batches; the generator's value is the list of its results. Raises ValueError for fewer batches than
    workers.
    """
    if len(batches) < gang.size:
        raise ValueError(f"{gang.size} workers, but only {len(batches)} batches of windows")

    def measured(batch: Tensor) -> Any:
        tokens = batch.to(skeleton.device)
        logits = skeleton.model(input_ids=tokens, use_cache=False).logits
        return measure(logits[:, :-1], tokens[:, 1:])

    with torch.no_grad(), LayerReader(skeleton, gang) as reader:
        sweep = Sweep(
            measured,
            skeleton.layers,
            gang.dealt(batches),
            outer_modules=skeleton.outer_modules,
            enter_outer=reader.place_outer,
            leave_outer=lambda name: skeleton.evict(skeleton.outer_modules[name]),
            parking=Parking(skeleton.device) if offload and skeleton.device.type != "cpu" else None,
        )
        for stop in sweep:
            assert isinstance(stop, LayerStop)
            stop.pause_at_groups = False
            if stop.layer > 0:
                skeleton.evict(skeleton.layers[stop.layer - 1])
            yield emit(LayerEntered(stop.layer, len(skeleton.layers), work))
            skeleton.place_layer(stop.layer, reader.take(stop.layer).tensors)
    yield emit(LayerEntered(len(skeleton.layers), len(skeleton.layers), work))
    return sweep.results


def summed_nll(logits: Tensor, targets: Tensor) -> float:
    """Sums the negative log-likelihood of the targets in float32, a few rows of logits at a time."""
    total = 0.0
    for rows, wanted in zip(logits.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True):
        total += F.cross_entropy(rows.float(), wanted, reduction="sum").item()
    return total


def _perplexity(nlls: list[float], windows: Tensor) -> Perplexity:
    sequences, tokens = windows.shape
    predicted = sequences * (tokens - 1)
    return Perplexity(math.exp(math.fsum(nlls) / predicted), predicted, sequences, tokens)
