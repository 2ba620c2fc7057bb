"""The table of pruning methods: config type -> function and the statistics it needs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor

from calibprune import config
from calibprune.pruning import magnitude, sparsegpt, wanda
from calibprune.pruning.rows import RowShares
from calibprune.pruning.statistics import Need, Statistics


@dataclass(frozen=True)
class Method:
    """`prune(weights, statistics, sparsities, n_of_m, settings, shares)` and what it reads of the statistics."""

    prune: Callable[..., list[Tensor]]
    need: Need


METHODS: dict[type[BaseModel], Method] = {
    config.Magnitude: Method(magnitude.prune, "none"),
    config.Wanda: Method(wanda.prune, "sum_squares"),
    config.SparseGPT: Method(sparsegpt.prune, "gram"),
}


def prune_group(
    weights: list[Float[Tensor, "_ in"]],
    statistics: Statistics,
    sparsities: list[float],
    n_of_m: tuple[int, int] | None,
    settings: BaseModel,
    shares: RowShares | None = None,
) -> list[Float[Tensor, "_ in"]]:
    """Prunes this worker's rows of linears that share one input; returns new weights, each in its own dtype.

    `weights` are the linears' rows that `shares` gives to this worker, all of them where it is None; `sparsities`
    the fraction to remove, one per linear; `n_of_m` = (kept, group) takes its place. The arguments stay as they
    are, arithmetic is float32. Collective. Raises ValueError on weights that are not finite, and what the method
    raises.
    """
    for index, weight in enumerate(weights):
        if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
            raise ValueError(f"the weights of linear {index} of the group are not finite")
    method = METHODS[type(settings)]
    return method.prune(weights, statistics, sparsities, n_of_m, settings, shares)
