"""Magnitude pruning removes the weights closest to zero. It needs no calibration data."""

import torch
from jaxtyping import Float
from torch import Tensor

from calibprune.config.prune import Magnitude
from calibprune.pruning.masks import Target, keep_in_matrices, zeroed
from calibprune.pruning.rows import RowShares
from calibprune.pruning.statistics import Statistics


@torch.no_grad()
def prune(
    weights: list[Float[Tensor, "_ in"]],
    statistics: Statistics,
    targets: list[Target],
    settings: Magnitude,
    shares: RowShares | None = None,
) -> list[Float[Tensor, "_ in"]]:
    """Zeroes each matrix's lowest |W|: over the whole matrix, or within every N:M group.

    Statistics are not used. Raises ValueError if the width does not fit the pattern. Collective.
    Han et al. 2015 (arXiv 1506.02626), section 3.
    """
    scores = [weight.to(torch.float32).abs() for weight in weights]
    keeps = keep_in_matrices(scores, targets, shares or RowShares.of(weights))
    return [zeroed(weight, keep) for weight, keep in zip(weights, keeps, strict=True)]
