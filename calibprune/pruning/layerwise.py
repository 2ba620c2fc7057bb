"""Pruning a model layer by layer in one paused sweep: layers stream in, are solved and stream out.

The flow of the whole product's heart is `prune_layers`. What is at hand at any time: two layers of weights, the
paused micro-batches and one group's statistics; nothing grows with the number of layers.
"""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calibprune.checkpoint import from_bytes, to_bytes
from calibprune.config import PruneSettings
from calibprune.model import Skeleton
from calibprune.pruning.methods import METHODS, prune_group
from calibprune.pruning.statistics import (
    Statistics,
    finish,
    magnitude_bound,
    observe,
    relative_output_error,
)
from calibprune.run import Record, Stage
from calibprune.sweep import GroupStop, LayerStop, Sweep

ERROR_TOKENS = 1024
"""Tokens of the first micro-batch that a linear's relative output error is measured on."""


def layer_unit(index: int) -> str:
    return f"layer-{index:05d}"


def prune_layers(
    skeleton: Skeleton, pool: Tensor, settings: PruneSettings, stage: Stage
) -> Iterator[Record]:
    """Prunes every layer that has no done record yet and commits it; yields the records as they are committed.

    `pool` is [sequences, tokens] of token ids. Layers that are done are swept through with the weights they were
    committed with, so that a resumed run sees the same inputs, bit for bit.
    Raises ValueError, naming layer and group, when a group cannot be solved: a Gram matrix that is not positive
    definite after damping, inputs or weights that are not finite.
    """
    done = stage.done()
    missing = [i for i in range(len(skeleton.layers)) if layer_unit(i) not in done]
    if not missing:
        return
    stored = StoredLayers(skeleton, stage, done if settings.inputs == "pruned" else {})
    sweep = Sweep(
        lambda tokens: skeleton.model(input_ids=tokens, use_cache=False, logits_to_keep=1),
        skeleton.layers,
        pool.to(skeleton.device).split(settings.batch_sequences),
        outer_modules=skeleton.outer_modules,
        enter_outer=skeleton.place_outer,
        leave_outer=lambda name: skeleton.evict(skeleton.outer_modules[name]),
    )
    with torch.no_grad(), ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        read = reader.submit(stored.read, 0)
        written: Future[Record] | None = None
        layer: LayerInWork | None = None
        clock = Clock()
        for stop in sweep:
            clock.lap("sweep")
            if isinstance(stop, LayerStop):
                if layer is not None:
                    if written is not None:
                        yield written.result()
                    written = writer.submit(layer.commit, stage)
                    layer = None
                if stop.layer > missing[-1]:
                    break
                if stop.layer > 0:
                    skeleton.evict(skeleton.layers[stop.layer - 1])
                tensors, facts = read.result()
                read = reader.submit(stored.read, stop.layer + 1)
                skeleton.place(
                    skeleton.layers[stop.layer], skeleton.layer_prefix(stop.layer), tensors
                )
                stop.pause_at_groups = stop.layer in missing
                clock = Clock()
                if stop.pause_at_groups:
                    layer = LayerInWork(skeleton, settings, stop.layer, tensors, clock, facts)
                    _reset_peak_memory(skeleton.device)
            else:
                assert layer is not None
                layer.prune(stop)
                last = stop.layer == missing[-1] and layer.complete
                del stop  # the inputs must not outlive the stop
                if last:
                    break
            clock.start()
        if layer is not None:
            if written is not None:
                yield written.result()
            written = writer.submit(layer.commit, stage)
        if written is not None:
            yield written.result()


class StoredLayers:
    """Reads a layer's tensors: those committed where it is done, else those of the input checkpoint."""

    def __init__(self, skeleton: Skeleton, stage: Stage, done: Mapping[str, Record]) -> None:
        self._skeleton = skeleton
        self._stage = stage
        self._done = done

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(tensors by checkpoint name, facts: seconds and bytes). Empty beyond the last layer."""
        if index >= len(self._skeleton.layers):
            return {}, {}
        started = time.perf_counter()
        record = self._done.get(layer_unit(index))
        if record is not None:
            tensors = from_bytes(self._stage.read(record))
        else:
            tensors = self._skeleton.checkpoint.read(self._skeleton.layer_tensors(index))
        size = sum(tensor.nbytes for tensor in tensors.values())
        return tensors, {"seconds": time.perf_counter() - started, "bytes": size}


@dataclass
class LayerInWork:
    """One layer between being put in place and being committed."""

    skeleton: Skeleton
    settings: PruneSettings
    index: int
    tensors: dict[str, Tensor]
    """Everything stored under the layer, by checkpoint name; pruned weights replace theirs here."""
    clock: "Clock"
    read_facts: dict[str, float]
    linear_facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.linear_facts.keys() == self.skeleton.linears(self.index).keys()

    def prune(self, stop: GroupStop) -> None:
        """Prunes the linears of one group and, unless the forwards are to stay dense, puts them in place."""
        linears = self.skeleton.linears(self.index)
        method = METHODS[type(self.settings.method)]
        bound = magnitude_bound(stop.inputs, method.need)
        statistics = finish(observe(stop.inputs, method.need, bound, len(stop.inputs)))
        self.clock.lap("statistics")
        names = [self._stored_name(name) for name in stop.linears]
        weights = [self.tensors[name].to(self.skeleton.device) for name in names]
        pruned = self._solve(stop, weights, statistics)
        self.clock.lap("solve")
        tokens = stop.inputs[0].flatten(0, -2)
        tokens = tokens[:: max(1, -(-len(tokens) // ERROR_TOKENS))]
        for path, name, before, after in zip(stop.linears, names, weights, pruned, strict=True):
            self.linear_facts[path] = {
                "parameters": after.numel(),
                "zeros": int(after.numel() - after.count_nonzero()),
                "relative_error": relative_output_error(before, after, tokens),
            }
            self.tensors[name] = after.cpu()
            if self.settings.inputs == "pruned":
                linears[path].weight = nn.Parameter(
                    after.to(self.skeleton.dtype), requires_grad=False
                )
        self.clock.lap("measure")

    def _solve(
        self, stop: GroupStop, weights: list[Tensor], statistics: Statistics
    ) -> list[Tensor]:
        sparsities = [self.settings.target_sparsity] * len(weights)
        try:
            return prune_group(
                weights, statistics, sparsities, self.settings.n_of_m, self.settings.method
            )
        except ValueError as error:
            group = ", ".join(stop.linears)
            raise ValueError(f"layer {self.index}, group {group}: {error}") from error

    def commit(self, stage: Stage) -> Record:
        """Publishes the layer's shard and its done record."""
        started = time.perf_counter()
        data = to_bytes(self.tensors)
        published = stage.put(layer_unit(self.index), data, "safetensors", "checkpoint", "model")
        write_seconds = time.perf_counter() - started
        facts = {
            "layer": self.index,
            "seconds": {
                "read": self.read_facts["seconds"],
                **self.clock.seconds,
                "write": write_seconds,
            },
            "bytes_read": self.read_facts["bytes"],
            "bytes_written": len(data),
            "peak_memory_bytes": _peak_memory(self.skeleton.device),
            "tensors": {name: tensor.nbytes for name, tensor in sorted(self.tensors.items())},
            "linears": self.linear_facts,
        }
        return stage.commit(layer_unit(self.index), published, facts)

    def _stored_name(self, path: str) -> str:
        prefix = self.skeleton.layer_prefix(self.index)
        return self.skeleton.stored_name(f"{prefix}{path}.weight")


class Clock:
    """Seconds by kind of work, lap by lap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.start()

    def start(self) -> None:
        self._since = time.perf_counter()

    def lap(self, kind: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[kind] += now - self._since
        self._since = now


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: of the GPU since the layer began, or of the process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
