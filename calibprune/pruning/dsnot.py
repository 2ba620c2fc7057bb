"""DSnoT exchanges pruned weights for kept ones of the same row until the row's expected output error is near zero.

Zhang et al. 2024 (arXiv 2310.08915), algorithm 1. No weight is updated.
"""

from functools import partial

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from calibprune.config.prune import DSnoT
from calibprune.pruning import wanda
from calibprune.pruning.masks import Target, keep_in_rows, zeroed
from calibprune.pruning.rows import RowShares
from calibprune.pruning.statistics import Statistics


@torch.no_grad()
def prune(
    weights: list[Float[Tensor, "_ in"]],
    statistics: Statistics,
    targets: list[Target],
    settings: DSnoT,
    shares: RowShares | None = None,
) -> list[Float[Tensor, "_ in"]]:
    """Starts from Wanda's mask, or from that of row-wise magnitudes, and exchanges weights within rows or N:M groups.

    Needs `sum_squares`, `sums` and the `variance` that comes with them. Raises ValueError if the width does not fit
    the pattern.
    """
    squares, sums, variance = statistics.sum_squares, statistics.sums, statistics.variance
    if squares is None or sums is None or variance is None:
        raise ValueError("DSnoT needs the inputs' sums and sums of squares")
    shares = shares or RowShares.of(weights)
    spread = variance.clamp(min=torch.finfo(torch.float32).tiny) ** settings.variance_power
    # the published code sums over a sequence's tokens, and its threshold is in those units
    expected = sums / (statistics.sequences if settings.faithful else statistics.tokens)

    def mask(weight: Float[Tensor, "out in"], target: Target) -> Bool[Tensor, "out in"]:
        weight = weight.to(torch.float32)
        importance = wanda.score(weight, squares)
        initial = importance if settings.initial == "wanda" else weight.abs()
        keep = keep_in_rows(initial, target)
        if settings.faithful and target.path.startswith(
            "mlp."
        ):  # the published code leaves these at the initial mask
            return keep
        group = target.n_of_m[1] if target.n_of_m else None
        scores = initial if group else importance
        return exchange(keep, weight * expected, spread, scores, settings, group)

    pruned = []
    for weight, target in zip(weights, targets, strict=True):
        (keep,) = shares.by_parts(partial(mask, target=target), [weight])
        pruned.append(zeroed(weight, keep))
    return pruned


def exchange(
    keep: Bool[Tensor, "out in"],
    contribution: Float32[Tensor, "out in"],
    spread: Float32[Tensor, "in"],
    scores: Float32[Tensor, "out in"],
    settings: DSnoT,
    group: int | None,
) -> Bool[Tensor, "out in"]:
    """Exchanges weights within the rows of a mask, each weight at most once; changes `keep` and returns it.

    `contribution` W_ij * E[x_j] is what a weight adds to the expected output; the sum over a row's pruned weights is
    the row's error. Each exchange restores the pruned weight whose contribution has the error's sign and is largest
    relative to `spread`, a power of the input's variance. In return it removes the kept weight with the lowest score
    whose contribution has the other sign or, in a pattern, that is in the same group. A row is finished when an
    exchange would not lower its error or, with `faithful`, when its error is below the threshold.
    """
    rows, gain = torch.arange(len(keep), device=keep.device), contribution / spread
    fresh = torch.ones_like(keep)
    error = contribution.masked_fill(keep, 0).sum(1)
    begun = error.sign()
    alive = torch.ones_like(rows, dtype=torch.bool)
    for _ in range(settings.max_swaps):
        sign = torch.where(error > 0, 1.0, -1.0)
        may_grow = ~keep & fresh & (gain * sign[:, None] > 0)
        grown = (gain * sign[:, None]).masked_fill(~may_grow, -torch.inf).argmax(1)
        may_go = keep & fresh
        if group is None:
            may_go &= contribution * sign[:, None] < 0
        else:
            columns = torch.arange(keep.shape[1], device=keep.device)
            may_go &= columns // group == (grown // group)[:, None]
        gone = scores.masked_fill(~may_go, torch.inf).argmin(1)
        after = error + contribution[rows, gone] - contribution[rows, grown]
        if settings.faithful:
            wanted = error.abs() > settings.threshold
            if group is not None:
                wanted &= after.sign() == begun
        else:
            wanted = after.abs() < error.abs()
        alive &= may_grow[rows, grown] & may_go[rows, gone] & wanted
        if not alive.any():
            break
        here = rows[alive]
        keep[here, grown[alive]], keep[here, gone[alive]] = True, False
        fresh[here, grown[alive]] = fresh[here, gone[alive]] = False
        error = torch.where(alive, after, error)
    return keep
