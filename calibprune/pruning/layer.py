"""Prunes one decoder layer: its groups are solved one after another and measured, then its owner commits it."""

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from calibprune.checkpoint import to_bytes
from calibprune.config.prune import PruneSettings
from calibprune.errors import UserError
from calibprune.events import note
from calibprune.failpoint import failpoint
from calibprune.gang import Gang
from calibprune.layer_stream import Loaded
from calibprune.model import Skeleton
from calibprune.offload import Fetched, Staging, to_host
from calibprune.process import host_memory
from calibprune.pruning.factor import NotPositiveDefinite
from calibprune.pruning.masks import Target
from calibprune.pruning.methods import need_of, prune_group, refine_group
from calibprune.pruning.positions import Positions, shapes_of
from calibprune.pruning.products import have_bfloat16_products
from calibprune.pruning.rows import RowShares
from calibprune.pruning.statistics import (
    Need,
    Statistics,
    column_squares,
    finish,
    magnitude_bound,
    observe,
    output_error,
)
from calibprune.stage import Record, Stage
from calibprune.sweep import GroupStop

ERROR_TOKENS = 256
"""Number of tokens, spread over all micro-batches, on which a linear's relative output error is measured."""

MAX_RAISES = 8
"""How often the damping of a group is raised tenfold before it is given up."""


def layer_unit(index: int) -> str:
    return f"layer-{index:05d}"


class Clock:
    """Adds up seconds by kind of work, lap by lap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.start()

    def start(self) -> None:
        self._since = time.perf_counter()

    def lap(self, kind: str) -> None:
        if torch.cuda.is_initialized():  # torch.cuda.is_available() would initialise it
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[kind] += now - self._since
        self._since = now


@dataclass
class LayerInWork:
    """One layer, from the moment its weights are in place until it is committed."""

    skeleton: Skeleton
    settings: PruneSettings
    gang: Gang
    index: int
    targets: Mapping[str, Target]
    """Targets of the linears to prune, by their path inside the layer; the others stay dense."""
    positions: Positions
    """Positions that statistics are taken from and errors are measured at."""
    loaded: Loaded
    """Everything stored under the layer; pruned weights replace theirs here."""
    clock: Clock
    bfloat16_products: bool = False
    """Whether Gram matrices are of products in bfloat16, as `agreed_products` says."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.facts.keys() == set(self.targets)

    def prune(self, stop: GroupStop) -> None:
        """Prunes the linears of one group; unless `prune.inputs` is dense, the forwards go on through the result.

        Collective. Raises ValueError, naming layer and group, where the group cannot be solved.
        """
        paths = [path for path in stop.linears if path in self.targets]
        if not paths:
            return
        names = [self._stored_name(path) for path in paths]
        weights = [self.loaded.tensors[name] for name in names]
        shares = RowShares.of(weights, self.gang)
        mine = shares.mine(weights)
        inputs = self.positions.of(Fetched(stop.inputs, self.skeleton.device))
        try:
            failpoint(f"reduce-{self.index}-{self.gang.rank}")
            statistics = gathered_statistics(
                inputs, need_of(self.settings), self.gang, len(self.positions.tokens), self.clock,
                self.bfloat16_products,
            )  # fmt: skip
            failpoint(f"solve-{self.index}-{self.gang.rank}")
            made, raised = self._solved(paths, mine, statistics, shares)
        except ValueError as error:
            group = ", ".join(paths)
            raise ValueError(f"layer {self.index}, group {group}: {error}") from error
        self.clock.lap("solve")
        self._measure(paths, shares, mine, made, inputs)
        if raised is not None:
            for path in paths:
                self.facts[path]["damping"] = raised
        self.clock.lap("measure")
        if self.settings.inputs == "dense":
            # the forwards need the old weights, so the result gets memory of its own
            weights = [torch.empty_like(weight) for weight in weights]
            self.loaded.tensors.update(zip(names, weights, strict=True))
        for target, part in zip(shares.mine(weights), made[-1], strict=True):
            target.copy_(part)
        self.gang.broadcast(shares.pieces(weights))
        if self.settings.inputs == "pruned":
            self._put_in_place(paths, weights)
        self.clock.lap("gather")

    def _solved(
        self, paths: list[str], mine: list[Tensor], statistics: Statistics, shares: RowShares
    ) -> tuple[list[list[Tensor]], float | None]:
        """Returns the pruned rows of this worker, before and after a refinement, and the damping if it was raised.

        The damping grows tenfold until the Gram matrix can be factorised, on all workers alike.
        """
        settings, targets = self.settings, [self.targets[path] for path in paths]
        method, refused = settings.method, list[float]()
        while True:
            try:
                made = [prune_group(mine, statistics, targets, method, shares)]
                break
            except NotPositiveDefinite as error:
                refused.append(error.damping)
                if len(refused) > MAX_RAISES:
                    raise
                method = method.model_copy(update={"damping": error.damping * 10})
        raised = refused[-1] * 10 if refused else None
        if raised is not None and self.gang.rank == 0:
            note(
                f"layer {self.index}, group {', '.join(paths)}: the Gram matrix of the inputs is not positive definite "
                f"with damping {refused[0]:g}; pruned with {raised:g}"
            )
        if settings.refine:
            made.append(
                refine_group(mine, made[0], statistics, targets, method, settings.refine, shares)
            )
        return made, raised

    def _measure(
        self,
        paths: list[str],
        shares: RowShares,
        before: list[Tensor],
        made: list[list[Tensor]],
        inputs: Sequence[Tensor],
    ) -> None:
        """Records every linear's zeros and relative output error; each worker measures its own rows.

        `made` holds the method's result for `before` and, if there is a refinement, the refined result.
        """
        tokens = self._sample(inputs)
        measured = [
            torch.stack([output_error(b, a, tokens) for b, a in zip(before, after, strict=True)])
            for after in made
        ]
        values = torch.zeros(self.gang.size, len(made), len(paths), 3, dtype=torch.float64)
        values[self.gang.rank] = torch.stack(measured).cpu()
        values = self.gang.collect(values, [self.gang.rank])
        for path, rows, dense, of_path in zip(
            paths, shares.rows, before, values.unbind(2), strict=True
        ):
            errors, sizes, zeros = (_summed(column) for column in of_path.unbind(-1))
            relative = [_relative(*each) for each in zip(errors, sizes, strict=True)]
            unrefined = {"unrefined_error": relative[0]} if len(made) > 1 else {}
            self.facts[path] = {
                "parameters": rows * dense.shape[1],
                "zeros": int(zeros[-1]),
                "relative_error": relative[-1],
                **unrefined,
                **self._asked(path),
            }

    def _asked(self, path: str) -> dict[str, Any]:
        target = self.targets[path]
        pattern = {"pattern": f"{target.n_of_m[0]}:{target.n_of_m[1]}"} if target.n_of_m else {}
        return {"asked": target.sparsity, **pattern}

    def _sample(self, inputs: Sequence[Tensor]) -> Tensor:
        """Returns a few tokens of every micro-batch of all workers, [tokens, in], the same on every worker."""
        available = self.positions.tokens
        each = math.ceil(ERROR_TOKENS / sum(map(bool, available)))
        sizes = [min(each, count) for count in available]
        first = inputs[0]
        tokens = first.new_empty(sum(sizes), first.shape[-1])
        parts = tokens.split(sizes)
        for index, batch in zip(self.gang.dealt(range(len(parts))), inputs, strict=True):
            rows, size = batch.flatten(0, -2), sizes[index]
            if size:
                parts[index].copy_(rows[:: len(rows) // size][:size])
        self.gang.broadcast([(part, index % self.gang.size) for index, part in enumerate(parts)])
        return tokens

    def _put_in_place(self, paths: list[str], weights: list[Tensor]) -> None:
        linears = self.skeleton.linears(self.index)
        for path, weight in zip(paths, weights, strict=True):
            if linears[path].weight.data_ptr() != weight.data_ptr():  # stored in another dtype
                placed = weight.to(self.skeleton.dtype)
                linears[path].weight = nn.Parameter(placed, requires_grad=False)

    def commit(self, stage: Stage, staging: Staging | None = None) -> Record:
        """Writes the layer's shard and its done record, which only the layer's owner does.

        What is on a GPU passes through the buffer of `staging`, on a stream of its own, so that nothing computed
        meanwhile waits for it.
        """
        started = time.perf_counter()
        tensors = to_host(self.loaded.tensors, staging or Staging())
        data = to_bytes(tensors)
        published = stage.put(layer_unit(self.index), data, "safetensors", "checkpoint", "model")
        facts = {
            "layer": self.index,
            "worker": self.gang.rank,
            "workers": self.gang.size,
            "seconds": {**self.clock.seconds, "write": time.perf_counter() - started},
            "bytes_read": self.loaded.bytes_read,
            "bytes_written": len(data),
            "bfloat16_products": self.bfloat16_products,
            **_peak_memory(self.skeleton.device),
            "tensors": {name: tensor.nbytes for name, tensor in sorted(tensors.items())},
            "linears": {path: self.facts[path] for path in self.targets},
            "kept_dense": sorted(self._matrices() - set(self.targets)),
        }
        return stage.commit(layer_unit(self.index), published, facts)

    def _matrices(self) -> set[str]:
        """Returns the paths of all matrices that might be pruned: the layer's linears and its fused experts."""
        return {*self.skeleton.linears(self.index), *self.skeleton.fused(self.index)}

    def _stored_name(self, path: str) -> str:
        prefix = self.skeleton.layer_prefix(self.index)
        return self.skeleton.stored_name(f"{prefix}{path}.weight")


def _summed(of_workers: Float64[Tensor, "workers made"]) -> list[float]:
    """Sums over the workers; the result does not depend on their order."""
    return [math.fsum(column) for column in of_workers.T.tolist()]


def _relative(error: float, size: float) -> float:
    """Computes a linear's relative output error from sums of squares, to five digits, since the others are noise."""
    relative = math.sqrt(error / size) if size else 0.0 if error == 0 else math.inf
    return float(f"{relative:.5g}")


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Returns the peak bytes since the process started: of the GPU, where those reserved include the gaps between
    allocations, or of the process itself."""
    if device.type == "cuda":
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    return {"peak_memory_bytes": host_memory("VmHWM")}


def agreed_products(
    skeleton: Skeleton, settings: PruneSettings, gang: Gang, stage: Stage, done: Set[str]
) -> bool:
    """Returns whether Gram matrices are of bfloat16 inputs as they are: on CPUs, where all processors are fast at it.

    A layer of the stage that is already committed decides: all are computed in the same way. Collective. Raises
    UserError where a processor cannot do what was begun.
    """
    if skeleton.device.type != "cpu" or skeleton.dtype != torch.bfloat16:
        return False
    if "gram" not in need_of(settings):
        return False
    layers = [layer_unit(index) for index in range(len(skeleton.layers))]
    begun = next(filter(done.__contains__, layers), None) if gang.rank == 0 else None
    way = stage.record(begun).facts.get("bfloat16_products", False) if begun else None
    facts = [have_bfloat16_products(), way is True, way is False]
    able, wanted, ruled_out = gang.add(torch.tensor(facts).long()).tolist()
    if wanted and able < gang.size:
        raise UserError(
            "the layers that are done were computed by processors with bfloat16 instructions (amx_bf16 or "
            "avx512_bf16), which not all workers have now: use such machines, or another output"
        )
    return able == gang.size and not ruled_out


def gathered_statistics(
    inputs: Sequence[Tensor],
    need: Need,
    gang: Gang,
    micro_batches: int,
    clock: Clock,
    bfloat16_products: bool = False,
) -> Statistics:
    """Sums the statistics of all workers' micro-batches, `micro_batches` in total. Collective.

    The result is the same on every worker.
    """
    squares = column_squares(inputs, need)
    bound = gang.largest(magnitude_bound(squares, gang.dealt(range(micro_batches))))
    most = max(math.prod(shape[:-1]) for shape in shapes_of(inputs))
    most = int(gang.largest(most)) if "sums" in need else 0
    sums = observe(inputs, squares, need, bound, micro_batches, most, bfloat16_products)
    clock.lap("statistics")
    statistics = finish(sums, gang)
    clock.lap("reduce")
    return statistics
