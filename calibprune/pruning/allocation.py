"""Allocates the sparsity to layers and linears; its mean over the parameters stays the requested one."""

import json
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calibprune import storage
from calibprune.config.prune import OWL, AlphaPruning, ListAllocation, PruneSettings
from calibprune.errors import UserError
from calibprune.events import Event, UnitDone, emit
from calibprune.gang import Gang
from calibprune.model import Skeleton
from calibprune.pruning.alphapruning import tail_exponents
from calibprune.pruning.export import ALLOCATION
from calibprune.pruning.masks import Target
from calibprune.pruning.owl import outlier_ratios
from calibprune.pruning.positions import Positions
from calibprune.pruning.rounding import round_to_whole
from calibprune.stage import Stage

Shapes = Sequence[Mapping[str, tuple[int, int]]]
"""For every layer, (out, in) of the linears to prune, by their path inside it."""
Scores = Sequence[Mapping[str, float]]
"""For every layer, a number for each of the same linears, by their path."""
Targets = list[dict[str, Target]]
MAX_MEAN_DEVIATION = 1e-4
"""Maximum deviation from the requested mean sparsity, caused by rounding, that is not reported."""


def is_measured(settings: PruneSettings) -> bool:
    """Returns whether the allocation is computed from measurements of the model, which are a unit of work."""
    return isinstance(settings.allocation, OWL | AlphaPruning)


def allocate(
    skeleton: Skeleton,
    pool: Tensor,
    settings: PruneSettings,
    chosen: Sequence[Sequence[str]],
    stage: Stage,
    gang: Gang,
    positions: Positions,
    done: set[str],
) -> Generator[Event, None, Targets]:
    """Computes the target of every linear: the generator's value, the same on every worker. Collective.

    Measures the model where the allocation needs it, unless the measurement is committed already; the first worker
    commits it. Yields LayerEntered and UnitDone. Raises UserError where a layer's sparsity would be outside 0 ... 1.
    """
    shapes = shapes_of(skeleton, chosen)
    if not is_measured(settings):
        return share_out(settings, shapes)
    if ALLOCATION in done:
        read = json.loads(stage.read(stage.record(ALLOCATION)))  # its keys are sorted by name
        ordered = [
            {path: by_path[path] for path in layer}
            for layer, by_path in zip(shapes, read, strict=True)
        ]
        return share_out(settings, shapes, ordered)
    if isinstance(settings.allocation, AlphaPruning):
        scores = yield from tail_exponents(skeleton, chosen, settings.allocation.per, gang)
    else:
        scores = yield from outlier_ratios(skeleton, pool, settings, chosen, gang, positions)
    try:
        targets = share_out(settings, shapes, scores)
    except UserError as error:
        raise UserError(
            f"{error}; change it and remove {stage.url}: nothing is pruned yet"
        ) from None
    read = gang.add(torch.tensor([skeleton.checkpoint.bytes_read], device=gang.device)).item()
    if gang.rank == 0:
        published = stage.put(ALLOCATION, storage.json_bytes(scores), "json", "data", "scores")
        facts = summary(targets, shapes) | {"bytes_read": read}
        yield emit(UnitDone(stage.commit(ALLOCATION, published, facts)))
    return targets


def shapes_of(skeleton: Skeleton, chosen: Sequence[Sequence[str]]) -> Shapes:
    """Returns the shapes of the chosen linears of every layer."""
    return [
        {path: (linears[path].out_features, linears[path].in_features) for path in paths}
        for paths, linears in zip(chosen, map(skeleton.linears, range(len(chosen))), strict=True)
    ]


def check_allocation(settings: PruneSettings, shapes: Shapes) -> None:
    """Raises UserError for a list of sparsities that does not fit and a pattern that cannot vary between layers."""
    allocation, n_of_m = settings.allocation, settings.n_of_m
    if is_measured(settings) and n_of_m and n_of_m[0] == 1:
        raise UserError(
            f'prune.pattern "{settings.pattern}" cannot vary between layers as {allocation.type} needs it: a layer '
            f"that is pruned more would keep less than 1 of {n_of_m[1]}; choose another pattern, or allocation uniform"
        )
    if not isinstance(allocation, ListAllocation):
        return
    if len(allocation.sparsities) != len(shapes):
        raise UserError(
            f"prune.allocation.sparsities has {len(allocation.sparsities)} entries, the model {len(shapes)} layers: "
            f"give one for each layer"
        )
    share_out(settings, shapes)
    if settings.sparsity is None and n_of_m is None:
        return
    mean = _mean(_of_layers(allocation.sparsities, shapes), shapes)
    if abs(mean - settings.target_sparsity) > MAX_MEAN_DEVIATION:
        raise UserError(
            f"prune.allocation.sparsities remove {mean:.4%} of all weights, prune.sparsity or prune.pattern says "
            f"{settings.target_sparsity:.4%}: leave prune.sparsity out, or make them agree"
        )


def share_out(settings: PruneSettings, shapes: Shapes, scores: Scores | None = None) -> Targets:
    """Computes the target of every linear. `scores` are the measurements of OWL or AlphaPruning.

    Raises UserError, naming the layer and the largest setting that would fit, where a sparsity would be outside
    0 ... 1.
    """
    allocation, sparsity = settings.allocation, settings.target_sparsity
    highest = 1 - 1 / settings.n_of_m[1] if settings.n_of_m else 1.0
    match allocation:
        case OWL():
            assert scores is not None
            wanted = owl(scores, shapes, sparsity, allocation.lam, highest)
        case AlphaPruning():
            assert scores is not None
            wanted = alpha_pruning(scores, shapes, sparsity, allocation.epsilon, highest)
        case ListAllocation():
            wanted = _of_layers(allocation.sparsities, shapes)
        case _:
            wanted = [dict.fromkeys(layer, sparsity) for layer in shapes]
    if settings.n_of_m:
        return round_to_groups(wanted, shapes, settings.n_of_m[1])
    return round_to_weights(wanted, shapes)


def owl(
    ratios: Scores, shapes: Shapes, sparsity: float, lam: float, highest: float = 1.0
) -> list[dict[str, float]]:
    """Computes sparsities that fall by 2 * lam from the lowest to the highest outlier ratio.

    Yin et al. 2024 (arXiv 2310.05175), section 3. Their mean over parameters is `sparsity`; the published code takes
    the mean over layers, which is the same for layers of equal size. Raises UserError where a sparsity would be outside
    0 ... `highest`.
    """
    scaled = _scaled(ratios)
    mean = _mean(scaled, shapes)
    away = [{path: 2 * (mean - x) for path, x in layer.items()} for layer in scaled]
    wanted = [{path: sparsity + lam * x for path, x in layer.items()} for layer in away]
    fits = min(
        ((highest - sparsity if x > 0 else sparsity) / abs(x) for layer in away for x in layer.values() if x),
        default=math.inf,
    )  # fmt: skip
    _check_range(
        wanted, highest, f"prune.allocation.lam is {lam:g}, at most {_floored(fits):g} would fit"
    )
    return wanted


def alpha_pruning(
    exponents: Scores, shapes: Shapes, sparsity: float, epsilon: float, highest: float = 1.0
) -> list[dict[str, float]]:
    """Computes sparsities that rise with the exponent from 1 - epsilon to 1 + epsilon, scaled to the mean `sparsity`.

    Lu et al. 2024 (NeurIPS, "AlphaPruning"), section 3.3. Raises UserError where a sparsity would be above `highest`.
    """
    scaled = _scaled(exponents)
    ratios = [
        {path: 1 - epsilon + 2 * epsilon * x for path, x in layer.items()} for layer in scaled
    ]
    factor = sparsity / _mean(ratios, shapes)
    wanted = [{path: factor * x for path, x in layer.items()} for layer in ratios]
    slope = highest + sparsity - 2 * highest * _mean(scaled, shapes)
    fits = (highest - sparsity) / slope if slope > 0 else math.inf
    _check_range(
        wanted,
        highest,
        f"prune.allocation.epsilon is {epsilon:g}, at most {_floored(fits):g} would fit",
    )
    return wanted


def round_to_weights(wanted: Scores, shapes: Shapes) -> Targets:
    """Rounds sparsities so that every row of a linear loses the same whole number of weights.

    The rounding error of each linear is carried over to the next one, so that the mean over all parameters stays.
    """
    targets: Targets = []
    carried = 0.0
    for layer, sizes in zip(wanted, shapes, strict=True):
        targets.append({})
        for path, sparsity in layer.items():
            rows, width = sizes[path]
            exact = width * sparsity
            count = _rounded(exact + carried / rows, exact)
            carried += rows * (exact - count)
            targets[-1][path] = Target(count / width, None, path)
    return targets


def round_to_groups(wanted: Scores, shapes: Shapes, group: int) -> Targets:
    """Rounds sparsities to N:M patterns with the fixed M; linears of a layer with equal sparsities get the same N.

    Rounds by largest remainders, so that the mean over all parameters stays within MAX_MEAN_DEVIATION wherever whole Ns
    allow it; of two layers of equal size the one with the higher sparsity never keeps more. Raises UserError where less
    than 1 of M would be kept.
    """
    pruned_equally = [
        (index, sparsity)
        for index, layer in enumerate(wanted)
        for sparsity in dict.fromkeys(layer.values())
    ]
    for index, sparsity in pruned_equally:
        if group * (1 - sparsity) < 1 - 1e-6:
            raise UserError(
                f"layer {index} would get a sparsity of {sparsity:.3f}: less than 1 of {group} would stay, "
                f"at most {1 - 1 / group:g} would fit"
            )
    sizes = [
        sum(math.prod(shapes[index][path]) for path, s in wanted[index].items() if s == sparsity)
        for index, sparsity in pruned_equally
    ]
    exact = [group * (1 - sparsity) for _, sparsity in pruned_equally]
    whole = round_to_whole(exact, sizes, MAX_MEAN_DEVIATION * group * sum(sizes))
    kept = dict(zip(pruned_equally, whole, strict=True))
    return [
        {
            path: Target(1 - kept[index, s] / group, (kept[index, s], group), path)
            for path, s in layer.items()
        }
        for index, layer in enumerate(wanted)
    ]


def summary(targets: Targets, shapes: Shapes) -> dict[str, Any]:
    """Summarises an allocation: every layer's sparsity, and the mean over all parameters."""
    sparsities = [{path: target.sparsity for path, target in layer.items()} for layer in targets]
    return {
        "sparsity": _mean(sparsities, shapes),
        "layers": [
            _mean([layer], [sizes]) if layer else None
            for layer, sizes in zip(sparsities, shapes, strict=True)
        ],
    }


def predicted_summary(settings: PruneSettings, shapes: Shapes) -> dict[str, Any]:
    """Summarises the allocation before anything is measured; without layers if it depends on measurements."""
    if is_measured(settings):
        return {"sparsity": settings.target_sparsity, "layers": []}
    return summary(share_out(settings, shapes), shapes)


def describe_summary(summary: Mapping[str, Any]) -> str:
    """Describes a summary, as in `60.00% of the weights, from 45.2% in layer 3 to 71.0% in layer 20`."""
    layers = {index: value for index, value in enumerate(summary["layers"]) if value is not None}
    if not layers:
        return f"{summary['sparsity']:.2%} of the weights"
    low, high = (pick(layers, key=layers.__getitem__) for pick in (min, max))
    spread = ""
    if layers[high] - layers[low] > 1e-3:
        spread = f", from {layers[low]:.1%} in layer {low} to {layers[high]:.1%} in layer {high}"
    return f"{summary['sparsity']:.2%} of the weights{spread}"


def deviation_message(settings: PruneSettings, summary: Mapping[str, Any]) -> str | None:
    """Returns one line where rounding made the mean miss the requested sparsity, else None."""
    if (
        settings.sparsity is None
        and settings.n_of_m is None
        and isinstance(settings.allocation, ListAllocation)
    ):
        return None  # the list itself is the request
    if abs(summary["sparsity"] - settings.target_sparsity) <= MAX_MEAN_DEVIATION:
        return None
    counts = "whole Ns" if settings.n_of_m else "whole weights of every row"
    return (
        f"{summary['sparsity']:.3%} of the weights are removed, not the requested {settings.target_sparsity:.3%}: with "
        f"layers of these sizes {counts} come no nearer"
    )


def _of_layers(values: Sequence[float], shapes: Shapes) -> list[dict[str, float]]:
    return [dict.fromkeys(layer, value) for value, layer in zip(values, shapes, strict=True)]


def _scaled(scores: Scores) -> list[dict[str, float]]:
    """Scales the scores linearly to 0 ... 1; all become zero where all are equal."""
    values = [value for layer in scores for value in layer.values()]
    low, span = min(values), max(values) - min(values)
    return [{p: (x - low) / span if span else 0.0 for p, x in layer.items()} for layer in scores]


def _mean(values: Scores, shapes: Shapes) -> float:
    """Returns the mean of the linears' values, weighted by their parameters."""
    sizes = [
        [math.prod(layer[path]) for path in by_path]
        for by_path, layer in zip(values, shapes, strict=True)
    ]
    total = sum(map(sum, sizes))
    weighted = (
        size * value
        for by_path, layer in zip(values, sizes, strict=True)
        for size, value in zip(layer, by_path.values(), strict=True)
    )
    return math.fsum(weighted) / total


def _check_range(wanted: Scores, highest: float, advice: str) -> None:
    for index, layer in enumerate(wanted):
        for path, sparsity in layer.items():
            if not -1e-9 <= sparsity <= highest + 1e-9:
                raise UserError(
                    f"layer {index}, {path} would get a sparsity of {sparsity:.3f}: {advice}"
                )


def _rounded(value: float, exact: float) -> int:
    """Rounds `value` to a whole number, limited to the two neighbours of `exact`."""
    low, high = math.floor(exact + 1e-6), math.ceil(exact - 1e-6)
    return min(max(round(value), low), high)


def _floored(value: float) -> float:
    """Rounds down to three digits, so that the setting that a message proposes does fit."""
    if not math.isfinite(value) or value <= 0:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.floor(value / unit) * unit
