"""Prunes a model layer by layer in one paused sweep: each layer is read, solved and written as the sweep passes it.

Every worker of a gang runs `prune_layers`, the core of the product, at the same time. A worker holds the layer at
work, the one that is read ahead, the one that is being written, its paused micro-batches and one group's statistics:
nothing grows with the number of layers. The result does not depend on the number of workers, bit for bit.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import Bool
from torch import Tensor

from calibprune.checkpoint import from_bytes
from calibprune.config.prune import PruneSettings
from calibprune.events import Event, LayerEntered, Tick, UnitDone, emit
from calibprune.failpoint import failpoint
from calibprune.gang import ALONE, Gang
from calibprune.layer_stream import LayerReader, paused_sweep
from calibprune.model import Skeleton
from calibprune.offload import Staging
from calibprune.process import yield_to_others
from calibprune.pruning.allocation import allocate, is_measured
from calibprune.pruning.export import ALLOCATION, REST, copy_rest
from calibprune.pruning.layer import Clock, LayerInWork, agreed_products, layer_unit
from calibprune.pruning.linears import chosen_linears
from calibprune.pruning.positions import Positions
from calibprune.pruning.snapshots import Snapshots
from calibprune.stage import Record, Stage
from calibprune.sweep import LayerStop


def units_of(skeleton: Skeleton, settings: PruneSettings) -> list[str]:
    """Lists the units that `prune_layers` commits with these settings."""
    measured = [ALLOCATION] if is_measured(settings) else []
    return [REST, *measured, *map(layer_unit, range(len(skeleton.layers)))]


def prune_layers(
    skeleton: Skeleton,
    pool: Tensor,
    settings: PruneSettings,
    stage: Stage,
    gang: Gang = ALONE,
    positions: Bool[Tensor, "sequences tokens"] | None = None,
) -> Iterator[Event]:
    """Prunes every layer that has no done record yet and commits it; every worker of the gang runs this.

    `pool` has token ids, [sequences, tokens], and each worker sweeps its share of the micro-batches. Statistics are
    taken from the `positions` that are True, or from all without it. Emits and yields LayerEntered, and UnitDone for
    every unit that this worker committed; yields Tick after every group of linears. Layers that are done are swept
    through with their committed weights, so that a resumed run sees the same inputs, bit for bit.
    Raises ValueError, naming layer and group, when a group cannot be solved (a Gram matrix that is not positive
    definite after damping, inputs or weights that are not finite), UserError when no position is True, and PeerLost
    when another worker is gone.
    """
    count = len(skeleton.layers)
    done = _agreed(gang, stage, [REST, ALLOCATION, *map(layer_unit, range(count))])
    missing = [index for index in range(count) if layer_unit(index) not in done]
    chosen = chosen_linears(skeleton, settings)
    batches = pool.split(settings.batch_sequences)
    counted = Positions(pool, positions, settings.batch_sequences, gang)
    targets = yield from allocate(skeleton, pool, settings, chosen, stage, gang, counted, done)
    bfloat16_products = agreed_products(skeleton, settings, gang, stage, done)
    snapshots = Snapshots(stage, gang, len(batches), settings.snapshot_layers)
    first = snapshots.latest(missing[0]) if missing else 0

    def committed(index: int) -> dict[str, Tensor] | None:
        if layer_unit(index) not in done or settings.inputs == "dense":
            return None
        return from_bytes(stage.read(stage.record(layer_unit(index))))

    with (
        torch.no_grad(),
        LayerReader(
            skeleton, gang, first=first, stop=missing[-1] + 1 if missing else 0, committed=committed
        ) as reader,
        Writer(stage) as writer,
    ):
        if gang.rank == 0 and REST not in done:
            reader.outer_held = skeleton.checkpoint.read(skeleton.rest_tensors())
            yield emit(UnitDone(copy_rest(reader.outer_held, stage)))
        if not missing:
            return
        sweep = paused_sweep(
            skeleton,
            batches,
            gang,
            reader,
            first=first,
            hidden=snapshots.reader(first, skeleton.device),
            offload=bool(settings.offload),
        )
        layer: LayerInWork | None = None
        clock = Clock()
        for stop in sweep:
            clock.lap("sweep")
            if isinstance(stop, LayerStop):
                yield from writer.submit(layer)
                layer = None
                full = stop.layer in missing
                yield emit(LayerEntered(stop.layer, count, "pruning", full=full))
                if stop.layer > missing[-1]:
                    break
                failpoint(f"enter-{stop.layer}-{gang.rank}")
                if stop.layer > first:
                    skeleton.evict(skeleton.layers[stop.layer - 1])
                    snapshots.write(stop.layer, stop.hidden)
                clock = Clock()
                loaded = reader.take(stop.layer)
                skeleton.place_layer(stop.layer, loaded.tensors)
                stop.pause_at_groups = full and bool(chosen[stop.layer])
                clock.lap("load")
                if full:
                    layer = LayerInWork(
                        skeleton, settings, gang, stop.layer, targets[stop.layer], counted, loaded, clock,
                        bfloat16_products,
                    )  # fmt: skip
                del loaded
            else:
                assert layer is not None
                layer.prune(stop)
                yield Tick()
            if stop.layer == missing[-1] and layer is not None and layer.complete:
                break
            clock.start()
        yield from writer.submit(layer, last=True)
        yield emit(LayerEntered(missing[-1] + 1, count, "pruning"))


class Writer:
    """Commits this worker's layers in the background, one at a time, while the next ones are swept.

    Its thread gets less of busy cores than computing does.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage, self._staging = stage, Staging()
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="write-behind", initializer=yield_to_others
        )
        self._under_way: Future[Record] | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=exception[0] is None)

    def submit(self, layer: LayerInWork | None, last: bool = False) -> Iterator[UnitDone]:
        """Begins to commit a layer if this worker owns it, once the one before is written; yields the units written,
        and after the last layer waits for them."""
        owned = layer if layer is not None and layer.gang.owns(layer.index) else None
        yield from self.written(wait=owned is not None)
        if owned is not None:
            self._under_way = self._pool.submit(owned.commit, self._stage, self._staging)
        if last:
            yield from self.written(wait=True)

    def written(self, wait: bool = False) -> Iterator[UnitDone]:
        """Yields the unit under way if it is written; with `wait`, waits for that."""
        if self._under_way is not None and (wait or self._under_way.done()):
            record, self._under_way = self._under_way.result(), None
            yield emit(UnitDone(record))


def _agreed(gang: Gang, stage: Stage, units: list[str]) -> set[str]:
    """Returns the units that are done, as the first worker sees them, so that all workers agree."""
    done = stage.done_units() if gang.rank == 0 else set()
    flags = gang.add(torch.tensor([unit in done for unit in units], device=gang.device).long())
    return {unit for unit, flag in zip(units, flags.tolist(), strict=True) if flag}
