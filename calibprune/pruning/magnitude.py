"""Magnitude pruning: the weights closest to zero go. No calibration data."""

import torch
from jaxtyping import Float
from torch import Tensor

from calibprune.config import Magnitude
from calibprune.pruning.masks import keep_lowest_removed, keep_n_of_m
from calibprune.pruning.statistics import Statistics


@torch.no_grad()
def prune(
    weights: list[Float[Tensor, "_ in"]],
    statistics: Statistics,
    sparsities: list[float],
    n_of_m: tuple[int, int] | None,
    settings: Magnitude,
) -> list[Float[Tensor, "_ in"]]:
    """Zeroes each matrix's lowest |W|: over the whole matrix, or within every N:M group.

    Statistics are not used, nor sparsities where `n_of_m` is given. Raises ValueError if the width does
    not fit the pattern. Han et al. 2015 (arXiv 1506.02626), section 3.
    """
    pruned = []
    for weight, sparsity in zip(weights, sparsities, strict=True):
        scores = weight.to(torch.float32).abs()
        keep = (
            keep_n_of_m(scores, *n_of_m)
            if n_of_m
            else keep_lowest_removed(scores, sparsity, per="matrix")
        )
        pruned.append(weight.masked_fill(~keep, 0))
    return pruned
