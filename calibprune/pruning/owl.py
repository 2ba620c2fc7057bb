"""OWL's outlier ratios: the share of a layer's weights that stand out, measured in one sweep of the dense model.

Yin et al. 2024 (ICML, arXiv 2310.05175), section 3: A_ij = |W_ij| ||X_j||, and D = the percentage of a layer's A that
is more than M times their mean, over all its linears together.
"""

from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from calibprune.config.prune import OWL, PruneSettings
from calibprune.events import LayerEntered, emit
from calibprune.gang import Gang
from calibprune.layer_stream import LayerReader, paused_sweep
from calibprune.model import Skeleton
from calibprune.offload import Fetched
from calibprune.pruning import wanda
from calibprune.pruning.layer import Clock, gathered_statistics
from calibprune.pruning.linears import numbers_of_all
from calibprune.pruning.positions import Positions
from calibprune.sweep import GroupStop, LayerStop


def outlier_ratios(
    skeleton: Skeleton,
    pool: Tensor,
    settings: PruneSettings,
    chosen: Sequence[Sequence[str]],
    gang: Gang,
    positions: Positions,
) -> Generator[LayerEntered, None, list[dict[str, float]]]:
    """Returns the percentage of outliers for every layer and its linears to prune. Collective.

    With `per: layer` all linears of a layer get the layer's percentage. A layer is measured by its owner. Raises
    ValueError, naming layer and group, for inputs that are not finite.
    """
    allocation = settings.allocation
    assert isinstance(allocation, OWL)
    count, batches = len(skeleton.layers), pool.split(settings.batch_sequences)
    last = max(index for index in range(count) if chosen[index])
    mine: dict[tuple[int, str], float] = {}
    squares: dict[str, Tensor] = {}

    def leave(index: int) -> None:
        if gang.owns(index) and squares:
            weights = {path: skeleton.linears(index)[path].weight for path in chosen[index]}
            ratios = layer_outliers(weights, squares, allocation)
            mine.update({(index, path): ratio for path, ratio in ratios.items()})
        squares.clear()
        skeleton.evict(skeleton.layers[index])

    with torch.no_grad(), LayerReader(skeleton, gang, stop=last + 1) as reader:
        offload = bool(settings.offload)
        for stop in paused_sweep(skeleton, batches, gang, reader, offload=offload):
            if isinstance(stop, LayerStop):
                if stop.layer > 0:
                    leave(stop.layer - 1)
                yield emit(LayerEntered(stop.layer, count, "measuring the allocation", order=0))
                skeleton.place_layer(stop.layer, reader.take(stop.layer).tensors)
                stop.pause_at_groups = bool(chosen[stop.layer])
            elif isinstance(stop, GroupStop):
                paths = [path for path in stop.linears if path in chosen[stop.layer]]
                if paths:
                    inputs = positions.of(Fetched(stop.inputs, skeleton.device))
                    need = frozenset({"sum_squares"})
                    try:
                        found = gathered_statistics(inputs, need, gang, len(batches), Clock())
                    except ValueError as error:
                        group = ", ".join(paths)
                        raise ValueError(f"layer {stop.layer}, group {group}: {error}") from error
                    assert found.sum_squares is not None
                    squares.update(dict.fromkeys(paths, found.sum_squares))
                if stop.layer == last and squares.keys() == set(chosen[last]):
                    break
        leave(last)
    return numbers_of_all(chosen, mine, gang)


def layer_outliers(
    weights: Mapping[str, Tensor], squares: Mapping[str, Tensor], allocation: OWL
) -> dict[str, float]:
    """Computes the percentage of outliers for each linear: the layer's, or with `per: linear` its own.

    `weights` [out, in], and `squares` [in], the inputs' sums of squares, are given by the linears' paths.
    """
    sizes = {path: weight.numel() for path, weight in weights.items()}
    sums = {
        path: wanda.score(weight, squares[path]).sum(dtype=torch.float64).item()
        for path, weight in weights.items()
    }
    together = sum(sums.values()) / sum(sizes.values())
    outliers = {}
    for path, weight in weights.items():
        mean = together if allocation.per == "layer" else sums[path] / sizes[path]
        outliers[path] = int((wanda.score(weight, squares[path]) > allocation.m * mean).sum())
    if allocation.per == "linear":
        return {path: 100 * outliers[path] / sizes[path] for path in weights}
    return dict.fromkeys(weights, 100 * sum(outliers.values()) / sum(sizes.values()))
