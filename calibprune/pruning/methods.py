"""The table of pruning methods, by their settings class, and the functions that call one on a group of linears."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor

from calibprune.config import prune as config
from calibprune.pruning import alps, dsnot, magnitude, ria, sparsegpt, swaps, wanda
from calibprune.pruning.masks import Target
from calibprune.pruning.rows import RowShares
from calibprune.pruning.statistics import Need, Statistics


@dataclass(frozen=True)
class Method:
    """A pruning method: its function `prune(weights, statistics, targets, settings, shares)`, and what that needs."""

    prune: Callable[..., list[Tensor]]
    need: Need
    """Sums that the function reads of the statistics."""
    updates: bool = False
    """Whether the method changes the weights that it keeps."""
    weight_bytes: int = 9
    """Bytes for every weight of a worker's share while it is solved: scores or updated weights and a copy, both in
    float32, and the mask."""
    gram_bytes: int = 13
    """Bytes for every entry of the Gram matrix, if it is needed: int64 and float32 sums, then float32 sums, factor and
    its inverse, and columns of them."""


METHODS: dict[type[BaseModel], Method] = {
    config.Magnitude: Method(magnitude.prune, frozenset()),
    config.Wanda: Method(wanda.prune, frozenset({"sum_squares"})),
    config.RIA: Method(ria.prune, frozenset({"sum_squares"})),
    config.DSnoT: Method(dsnot.prune, frozenset({"sum_squares", "sums"})),
    config.SparseGPT: Method(sparsegpt.prune, frozenset({"gram"}), updates=True),
    config.ALPS: Method(
        alps.prune,
        frozenset({"gram"}),
        updates=True,
        weight_bytes=40,
        gram_bytes=24,
    ),
}


def need_of(settings: config.PruneSettings) -> Need:
    """Returns the sums that the method and its refinement read."""
    refinement = frozenset({"gram"}) if settings.refine else frozenset()
    return METHODS[type(settings.method)].need | refinement


def prune_group(
    weights: list[Float[Tensor, "_ in"]],
    statistics: Statistics,
    targets: list[Target],
    settings: BaseModel,
    shares: RowShares | None = None,
) -> list[Float[Tensor, "_ in"]]:
    """Prunes this worker's rows of linears that share one input; returns new weights, each in its own dtype.

    `weights` are the rows that `shares` gives to this worker, all rows where it is None; `targets` has one target per
    linear. Does not change its arguments; computes in float32. Collective. Raises ValueError for weights that are not
    finite, before or after pruning, and what the method raises.
    """
    _check_finite(weights, targets, "weights")
    method, shares = METHODS[type(settings)], shares or RowShares.of(weights)
    pruned = method.prune(weights, statistics, targets, settings, shares)
    _check_finite(pruned, targets, "pruned weights")
    return pruned


def refine_group(
    weights: list[Float[Tensor, "_ in"]],
    pruned: list[Float[Tensor, "_ in"]],
    statistics: Statistics,
    targets: list[Target],
    settings: BaseModel,
    refine: config.Swaps,
    shares: RowShares | None = None,
) -> list[Float[Tensor, "_ in"]]:
    """Improves `pruned`, the result of the method with these `settings` for `weights`; otherwise like `prune_group`."""
    damping = getattr(settings, "damping", 0.0) if METHODS[type(settings)].updates else None
    shares = shares or RowShares.of(weights)
    refined = swaps.refine(weights, pruned, statistics, targets, refine, shares, damping)
    _check_finite(refined, targets, "refined weights")
    return refined


def _check_finite(weights: list[Float[Tensor, "_ in"]], targets: list[Target], name: str) -> None:
    for index, (weight, target) in enumerate(zip(weights, targets, strict=True)):
        if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
            linear = target.path or f"linear {index} of the group"
            raise ValueError(f"the {name} of {linear} are not finite in {weight.dtype}")
