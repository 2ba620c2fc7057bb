"""The actor that holds a model's layers, a few at a time: prunes them, or sweeps through them to measure perplexity.

Single-threaded, since a paused sweep belongs to the thread that made it. All work is in the library.
"""

import logging
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor

from calibprune.calibration.pool import read_pool
from calibprune.config import ModelSettings, PruneSettings
from calibprune.evaluation.perplexity import Perplexity, sweep_perplexity
from calibprune.model import build_skeleton
from calibprune.pruning.export import REST, copy_rest
from calibprune.pruning.layerwise import prune_layers
from calibprune.run import Record, Stage


class LayerWorker:
    def __init__(self, cpus: int) -> None:
        torch.set_num_threads(cpus)
        torch.backends.cuda.matmul.allow_tf32 = False
        transformers.utils.logging.set_verbosity(logging.ERROR)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def prune(
        self, model: ModelSettings, settings: PruneSettings, pool_url: str, stage_url: str
    ) -> Iterator[Record]:
        """Commits every layer that is missing; yields each done record. Rows and weights stay here."""
        skeleton = build_skeleton(model, self._device)
        stage = Stage(stage_url)
        if REST not in stage.done_units():
            yield copy_rest(skeleton, stage)
        yield from prune_layers(skeleton, read_pool(pool_url), settings, stage)

    def evaluate(
        self,
        model: ModelSettings,
        windows: dict[str, Tensor],
        batch_sequences: int,
        hashes: dict[str, str] | None,
    ) -> Iterator[int | dict[str, Perplexity]]:
        """Yields the number of layers swept so far, and last the perplexity of every text."""
        skeleton = build_skeleton(model, self._device, hashes)
        yield from sweep_perplexity(skeleton, windows, batch_sequences)
