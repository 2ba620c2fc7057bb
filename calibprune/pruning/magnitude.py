"""Magnitude pruning: the weights closest to zero go. No calibration data."""

import torch
from jaxtyping import Float
from torch import Tensor

from calibprune.config import Magnitude
from calibprune.pruning.masks import keep_all_but_lowest, keep_n_of_m
from calibprune.pruning.rows import RowShares
from calibprune.pruning.statistics import Statistics


@torch.no_grad()
def prune(
    weights: list[Float[Tensor, "_ in"]],
    statistics: Statistics,
    sparsities: list[float],
    n_of_m: tuple[int, int] | None,
    settings: Magnitude,
    shares: RowShares | None = None,
) -> list[Float[Tensor, "_ in"]]:
    """Zeroes each matrix's lowest |W|: over the whole matrix, or within every N:M group.

    Statistics are not used, nor sparsities where `n_of_m` is given. Raises ValueError if the width does
    not fit the pattern. Han et al. 2015 (arXiv 1506.02626), section 3.
    """
    shares = shares or RowShares.of(weights)
    scores = [weight.to(torch.float32).abs() for weight in weights]
    if n_of_m:
        keeps = [keep_n_of_m(part, *n_of_m) for part in scores]
    else:
        whole = shares.gather(torch.cat(scores)).split(shares.rows)
        keeps = shares.mine(
            [
                keep_all_but_lowest(part, int(part.numel() * sparsity))
                for part, sparsity in zip(whole, sparsities, strict=True)
            ]
        )
    return [weight.masked_fill(~keep, 0) for weight, keep in zip(weights, keeps, strict=True)]
