"""RIA scores weights by their share of their row and of their column, times a power of the norm of their input."""

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from calibprune.config.prune import RIA
from calibprune.pruning.masks import Target, keep_in_matrices, zeroed
from calibprune.pruning.rows import RowShares
from calibprune.pruning.statistics import Statistics


@torch.no_grad()
def prune(
    weights: list[Float[Tensor, "_ in"]],
    statistics: Statistics,
    targets: list[Target],
    settings: RIA,
    shares: RowShares | None = None,
) -> list[Float[Tensor, "_ in"]]:
    """Zeroes the lowest scores of every matrix, of every row with `per_row`, or of every N:M group.

    Needs `sum_squares`. Raises ValueError if the width does not fit the pattern. Collective.
    Zhang et al. 2024 (ICLR, "Plug-and-play"), equations 3 and 4; without its permutation of channels.
    """
    if statistics.sum_squares is None:
        raise ValueError("RIA needs the inputs' sums of squares")
    shares = shares or RowShares.of(weights)
    sizes = [weight.to(torch.float32).abs() for weight in weights]
    of_columns = shares.sums(sizes)
    of_rows = shares.by_parts(lambda part: part.sum(1, dtype=torch.float64), sizes)
    norms = statistics.sum_squares.sqrt() ** settings.power
    scores = [score(*args, norms) for args in zip(sizes, of_columns, of_rows, strict=True)]
    keeps = keep_in_matrices(scores, targets, shares, settings.per_row)
    return [zeroed(weight, keep) for weight, keep in zip(weights, keeps, strict=True)]


def score(
    size: Float32[Tensor, "out in"],
    of_columns: Float64[Tensor, "in"],
    of_rows: Float64[Tensor, " out"],
    norms: Float32[Tensor, "in"],
) -> Float32[Tensor, "out in"]:
    """Computes S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||^a from |W|, its sums and the norms."""
    tiny = torch.finfo(torch.float32).tiny  # gives rows and columns of zeros the score zero
    by_column, by_row = (sums.to(torch.float32).clamp(min=tiny) for sums in (of_columns, of_rows))
    return (size / by_column + size / by_row[:, None]) * norms
