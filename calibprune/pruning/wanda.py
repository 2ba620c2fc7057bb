"""Wanda scores weights by their size times the norm of their input, and updates no weight."""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from calibprune.config.prune import Wanda
from calibprune.pruning.masks import Target, keep_in_rows, zeroed
from calibprune.pruning.rows import RowShares
from calibprune.pruning.statistics import Statistics


@torch.no_grad()
def prune(
    weights: list[Float[Tensor, "_ in"]],
    statistics: Statistics,
    targets: list[Target],
    settings: Wanda,
    shares: RowShares | None = None,
) -> list[Float[Tensor, "_ in"]]:
    """Zeroes the lowest scores of every output row, or of every N:M group.

    Weights are compared within their row, so that any worker can prune any row. Needs `sum_squares`. Raises ValueError
    if the width does not fit the pattern. Sun et al. 2023 (arXiv 2306.11695), equation 1.
    """
    if statistics.sum_squares is None:
        raise ValueError("Wanda needs the inputs' sums of squares")
    pruned = []
    for weight, target in zip(weights, targets, strict=True):
        keep = keep_in_rows(score(weight, statistics.sum_squares), target)
        pruned.append(zeroed(weight, keep))
    return pruned


def score(
    weight: Float[Tensor, "out in"], sum_squares: Float32[Tensor, "in"]
) -> Float32[Tensor, "out in"]:
    """Computes S_ij = |W_ij| * ||X_j|| with the norm over all calibration tokens (arXiv 2306.11695, equation 1)."""
    return weight.to(torch.float32).abs() * sum_squares.sqrt()
