"""How much memory a pruning worker will need at most, part by part, before anything is loaded."""

from dataclasses import dataclass, fields

import torch

from calibprune.config.prune import PruneSettings
from calibprune.model import Skeleton
from calibprune.pruning.masks import GPU_SCORES_AT_ONCE
from calibprune.pruning.methods import METHODS, need_of

GPU_SHARE = 0.9
"""Of a GPU's memory; the rest is left to its libraries and to fragments."""

COUNTED_BYTES = 28
"""Bytes for every score whose digits a GPU counts at once."""

LIBRARIES_AT_WORK = 100 << 20
"""What libraries take on a CPU once they compute: compiled kernels, packing buffers, one heap per thread. Measured."""


@dataclass(frozen=True)
class WorkerMemory:
    """Peak bytes of one worker by what holds them. Parts peak at different times; `bytes` knows which together."""

    process: int
    """The interpreter and its libraries; nothing on a GPU."""
    layers: int
    """The layer at work, the one read ahead, the one being written and its serialised copies."""
    outside: int
    """Embeddings and head, while they are copied at the start."""
    paused: int
    """What the paused forwards hold at the stop where they hold most."""
    forward: int
    """What one micro-batch takes more while it runs."""
    solving: int
    """Statistics, factorisation and copies of the widest group's weights."""

    @property
    def bytes(self) -> int:
        at_work = self.layers + self.paused + max(self.forward, self.solving)
        return self.process + max(at_work, self.outside)

    @property
    def largest(self) -> str:
        """The name of the part that holds most at the peak, the process left out."""
        at_work = {"layers": self.layers, "paused": self.paused}
        running = "forward" if self.forward > self.solving else "solving"
        at_work[running] = getattr(self, running)
        if self.outside > sum(at_work.values()):
            return "outside"
        return max(at_work, key=lambda name: at_work[name])

    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def worker_memory(
    skeleton: Skeleton,
    settings: PruneSettings,
    sequences: int,
    tokens: int,
    workers: int,
    process_bytes: int = 0,
) -> WorkerMemory:
    """The prediction for the first worker of `workers`, which also copies what lies outside the layers.

    `sequences` of `tokens` tokens make the pool. On a GPU (`skeleton.device`) only what lies there is counted.
    """
    on_gpu = skeleton.device.type == "cuda"
    stored = skeleton.checkpoint.locations
    layer = max(
        sum(stored[name].bytes for name in skeleton.layer_tensors(index))
        for index in range(len(skeleton.layers))
    )
    linears = skeleton.linears(0).values()
    rest = [stored[name].bytes for name in skeleton.rest_tensors()]
    batches = -(-sequences // settings.batch_sequences)
    mine = min(sequences, -(-batches // workers) * settings.batch_sequences)
    hidden = skeleton.model.config.get_text_config().hidden_size
    held_per_token = _held_per_token(hidden, [linear.in_features for linear in linears])
    itemsize = skeleton.dtype.itemsize
    batch_tokens = min(settings.batch_sequences, sequences) * tokens
    widest = max(linear.in_features for linear in linears)
    need = need_of(settings)
    method, most = METHODS[type(settings.method)], max(_weights_of_groups(skeleton))
    gram = method.gram_bytes * widest**2 if "gram" in need else 0
    weights = (method.weight_bytes + (8 if settings.refine else 0)) * most // workers
    if on_gpu and settings.n_of_m is None:
        weights += COUNTED_BYTES * min(most // workers, GPU_SCORES_AT_ONCE)
    return WorkerMemory(
        process=0 if on_gpu else process_bytes + LIBRARIES_AT_WORK,
        layers=layer * (2 if on_gpu else 5),
        outside=max(rest, default=0) if on_gpu else 3 * sum(rest),
        paused=mine * tokens * held_per_token * itemsize,
        forward=batch_tokens * 3 * max(linear.out_features for linear in linears) * itemsize,
        solving=gram + weights + (batch_tokens * widest * 4 if "gram" in need else 0),
    )


def offload_needed(
    skeleton: Skeleton, settings: PruneSettings, sequences: int, tokens: int, workers: int
) -> str | None:
    """Why what paused forwards hold has to move to host memory, in one line; None where it fits or is ruled out."""
    if skeleton.device.type == "cpu" or settings.offload is False:
        return None
    needed = worker_memory(skeleton, settings, sequences, tokens, workers)
    available = torch.cuda.get_device_properties(skeleton.device).total_memory
    if needed.bytes <= GPU_SHARE * available and not settings.offload:
        return None
    return (
        f"paused forwards keep their {needed.paused / 2**30:.1f} GiB in host memory: of {available / 2**30:.1f} GiB "
        f"of GPU memory a worker would need {needed.bytes / 2**30:.1f} GiB"
    )


def _held_per_token(hidden: int, widths: list[int]) -> int:
    """Numbers that a paused forward holds per token at its widest stop: what is about to enter the linears and, as
    wide as the hidden states, what entered their block before, the residual, the layer's input and the model's."""
    return 4 * hidden + max(widths)


def _weights_of_groups(skeleton: Skeleton) -> list[int]:
    """Weights of the linears of the first layer that may share an input: those of one block and one width."""
    groups: dict[tuple[str, int], int] = {}
    for name, linear in skeleton.linears(0).items():
        key = (name.rpartition(".")[0], linear.in_features)
        groups[key] = groups.get(key, 0) + linear.weight.numel()
    return list(groups.values())
