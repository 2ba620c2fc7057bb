"""Perplexity of held-out texts by the streamed sweep: works for models larger than memory."""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from calibprune.errors import UserError
from calibprune.model import Skeleton
from calibprune.sweep import LayerStop, Sweep

LOSS_ROWS = 256
"""Positions whose logits are held in float32 at a time: a 128k vocabulary takes 0.5 MB a position."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over every predicted token, all weighted alike."""

    perplexity: float
    predicted_tokens: int
    sequences: int
    sequence_tokens: int


def cut_windows(
    token_ids: list[int], sequence_tokens: int, sequences: int | None, name: str
) -> Int[Tensor, "sequences tokens"]:
    """Consecutive windows without overlap; the rest at the end is left out.

    Raises UserError when the text is shorter than one window, or than the windows asked for.
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
    skeleton: Skeleton, windows: Mapping[str, Int[Tensor, "_ tokens"]], batch_sequences: int
) -> Iterator[int | dict[str, Perplexity]]:
    """Perplexity of every text in one pass over the model's layers.

    Yields the number of layers done after each, and last the perplexity of every text.
    """
    batches: list[tuple[str, Tensor]] = []
    for name, sequences in windows.items():
        batches += [(name, batch) for batch in sequences.split(batch_sequences)]

    def forward(batch: tuple[str, Tensor]) -> tuple[str, float]:
        name, tokens = batch[0], batch[1].to(skeleton.device)
        logits = skeleton.model(input_ids=tokens, use_cache=False).logits
        return name, summed_nll(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    sweep = Sweep(
        forward,
        skeleton.layers,
        batches,
        outer_modules=skeleton.outer_modules,
        enter_outer=skeleton.place_outer,
        leave_outer=lambda name: skeleton.evict(skeleton.outer_modules[name]),
    )
    read = partial(_read_layer, skeleton)
    with torch.no_grad(), ThreadPoolExecutor(1) as reader:
        prefetched = reader.submit(read, 0)
        for stop in sweep:
            assert isinstance(stop, LayerStop)
            stop.pause_at_groups = False
            if stop.layer > 0:
                skeleton.evict(skeleton.layers[stop.layer - 1])
                yield stop.layer
            layer = skeleton.layers[stop.layer]
            skeleton.place(layer, skeleton.layer_prefix(stop.layer), prefetched.result())
            prefetched = reader.submit(read, stop.layer + 1)
    yield len(skeleton.layers)
    yield {
        name: _perplexity([nll for of, nll in sweep.results if of == name], sequences)
        for name, sequences in windows.items()
    }


def summed_nll(logits: Tensor, targets: Tensor) -> float:
    """Summed negative log-likelihood of the targets, in float32, a few rows of logits at a time."""
    total = 0.0
    for rows, wanted in zip(logits.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True):
        total += F.cross_entropy(rows.float(), wanted, reduction="sum").item()
    return total


def _perplexity(nlls: list[float], windows: Tensor) -> Perplexity:
    sequences, tokens = windows.shape
    predicted = sequences * (tokens - 1)
    return Perplexity(math.exp(math.fsum(nlls) / predicted), predicted, sequences, tokens)


def _read_layer(skeleton: Skeleton, index: int) -> dict[str, Any]:
    if index >= len(skeleton.layers):
        return {}
    return skeleton.checkpoint.read(skeleton.layer_tensors(index))
