"""Predicts the peak memory of a worker, part by part, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from calibprune.config.prune import PruneSettings
from calibprune.evaluation.perplexity import LOSS_ROWS
from calibprune.model import Skeleton
from calibprune.pruning.masks import GPU_SCORES_AT_ONCE
from calibprune.pruning.methods import METHODS, need_of

GPU_SHARE = 0.9
"""Share of a GPU's memory that is used; the rest is left to its libraries and to fragmentation."""

COUNTED_BYTES = 28
"""Bytes for every score whose digits a GPU counts at once."""

LIBRARY_BYTES = 100 << 20
"""Bytes that libraries take on a CPU once they compute (kernels, packing buffers, a heap per thread), as measured."""


@dataclass(frozen=True)
class WorkerMemory:
    """Peak bytes of one worker by their use. Not all parts peak at the same time, which `bytes` takes into account."""

    process: int
    """The interpreter and its libraries; 0 on a GPU."""
    layers: int
    """The layer at work, the one read ahead, the one being written and its serialised copies."""
    outside: int
    """Embeddings, norm and head, while they are copied at the start."""
    paused: int
    """Tensors that the paused forwards hold, at the stop where they hold most."""
    forward: int
    """Additional memory of a micro-batch while it runs."""
    solving: int
    """Statistics, factorisation and copies of the widest group's weights."""

    @property
    def bytes(self) -> int:
        """Peak bytes of the worker."""
        at_work = self.layers + self.paused + max(self.forward, self.solving)
        return self.process + max(at_work, self.outside)

    @property
    def largest(self) -> str:
        """Name of the part that holds most at the peak, the process left out."""
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
    """Predicts the memory of the first of `workers` workers, which also copies the tensors outside the layers.

    The pool has `sequences` sequences of `tokens` tokens. On a GPU (`skeleton.device`) only GPU memory is counted.
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
        process=0 if on_gpu else process_bytes + LIBRARY_BYTES,
        layers=layer * (2 if on_gpu else 5),
        outside=max(rest, default=0) if on_gpu else 3 * sum(rest),
        paused=mine * tokens * held_per_token * itemsize,
        forward=batch_tokens * 3 * max(linear.out_features for linear in linears) * itemsize,
        solving=gram + weights + (batch_tokens * widest * 4 if "gram" in need else 0),
    )


def evaluation_memory(
    skeleton: Skeleton, batches: Sequence[Sequence[int]], workers: int
) -> WorkerMemory:
    """Predicts the GPU memory of one of `workers` that measure perplexity.

    `batches` are (sequences, tokens) of the micro-batches, which are dealt to the workers in this order. A forward
    pauses at whole layers only, where it holds the layer's input and the model's; at its end, with the head in place,
    it makes the logits of one micro-batch.
    """
    stored, itemsize = skeleton.checkpoint.locations, skeleton.dtype.itemsize
    layer = max(
        sum(stored[name].bytes for name in skeleton.layer_tensors(index))
        for index in range(len(skeleton.layers))
    )
    outside = max((stored[name].bytes for name in skeleton.rest_tensors()), default=0)
    config = skeleton.model.config.get_text_config()
    paused = max(
        sum(sequences * tokens for sequences, tokens in batches[worker::workers])
        for worker in range(workers)
    )
    paused *= 2 * config.hidden_size * itemsize
    largest = max(sequences * tokens for sequences, tokens in batches)
    widest = max(linear.out_features for linear in skeleton.linears(0).values())
    logits = (largest * itemsize + LOSS_ROWS * 3 * 4) * config.vocab_size
    return WorkerMemory(
        process=0,
        layers=2 * layer,
        outside=outside + paused,
        paused=paused,
        forward=max(largest * 3 * widest * itemsize, outside + logits),
        solving=0,
    )


def offload_needed(device: torch.device, needed: WorkerMemory, wanted: bool | None) -> str | None:
    """Returns why what paused forwards hold has to move to host memory, in one line; None where it fits the GPU or is
    ruled out. `wanted` is the setting: None leaves the choice to the memory."""
    if device.type == "cpu" or wanted is False:
        return None
    available = torch.cuda.get_device_properties(device).total_memory
    if needed.bytes <= GPU_SHARE * available and not wanted:
        return None
    return (
        f"paused forwards keep their {needed.paused / 2**30:.1f} GiB in host memory: of {available / 2**30:.1f} GiB "
        f"of GPU memory a worker would need {needed.bytes / 2**30:.1f} GiB"
    )


def _held_per_token(hidden: int, widths: list[int]) -> int:
    """Returns how many numbers a paused forward holds per token at its widest stop.

    They are the inputs of the linears that come next and, as wide as the hidden states, the input of their block, the
    residual, the layer's input and the model's.
    """
    return 4 * hidden + max(widths)


def _weights_of_groups(skeleton: Skeleton) -> list[int]:
    """Counts the weights of the first layer's linears that may share an input: those of one block and one width."""
    groups: dict[tuple[str, int], int] = {}
    for name, linear in skeleton.linears(0).items():
        key = (name.rpartition(".")[0], linear.in_features)
        groups[key] = groups.get(key, 0) + linear.weight.numel()
    return list(groups.values())
