"""ALPS: a search for the weights that stay by ADMM, then an exact refit of those weights.

Meng et al. 2024 (NeurIPS, arXiv 2406.07831), algorithm 1. The minimiser of ||(W - W') X||^2 over sparse W' is sought
by alternating a ridge solution with the nearest sparse matrix, under a penalty rho that grows as the support settles.
Where the paper has one eigendecomposition in float64, every rho here has a Cholesky factorisation and an inverse in
float32: about 7/3 n^3 operations at full speed on a GPU, where the inverse is two triangular solves. A group of width
28672 with 8192 rows takes 55 TFLOP per rho, of three iterations, and 13 TFLOP per iteration, those shared by the
workers: on one H100 about 0.7 s an iteration, an estimate from its 45 TFLOP/s in float32, which leaves out that every
unstructured iteration also sorts each matrix as a whole.
"""

from functools import partial

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from calibprune.config.prune import ALPS
from calibprune.pruning.factor import NotPositiveDefinite
from calibprune.pruning.masks import Target, keep_in_matrices
from calibprune.pruning.rows import RowShares
from calibprune.pruning.statistics import Statistics, full_float32

ITERATIONS_PER_RHO = 3
SETTLED = 3e-4
"""Share of the weights that stay: fewer changes than this and the support counts as found, after FIRST_ITERATIONS."""
FIRST_ITERATIONS = 31
RESTARTS, MAX_RHO = 8, 1e6
TOLERANCE = 1e-5
"""Of the refit: what is left of a row's gradient."""


@torch.no_grad()
def prune(
    weights: list[Float[Tensor, "_ in"]],
    statistics: Statistics,
    targets: list[Target],
    settings: ALPS,
    shares: RowShares | None = None,
) -> list[Float[Tensor, "_ in"]]:
    """Removes the lowest weights over the whole matrix, of every row with `per_row`, or of every N:M group.

    Needs `gram`. The linears of a group share the penalty and its factorisations. Collective. Raises
    NotPositiveDefinite, and ValueError if the width does not fit the pattern.
    """
    if statistics.gram is None:
        raise ValueError("ALPS needs the Gram matrix of the inputs")
    shares = shares or RowShares.of(weights)
    normal, norms = normalised(statistics.gram, settings.damping)
    dense = [weight.to(torch.float32) * norms for weight in weights]
    with full_float32():
        search = Search(dense, statistics.gram, normal, targets, settings, shares)
        support = search.run()
        refitted = shares.by_parts(
            partial(refit, normal=normal, iterations=settings.refit_iterations),
            search.product,
            [found * keep for found, keep in zip(search.found, support, strict=True)],
            support,
        )
    return [
        (matrix / norms).masked_fill_(~keep, 0).to(weight.dtype)
        for matrix, keep, weight in zip(refitted, support, weights, strict=True)
    ]


def normalised(
    gram: Float32[Tensor, "in in"], damping: float
) -> tuple[Float32[Tensor, "in in"], Float32[Tensor, "in"]]:
    """The damped Gram matrix scaled to a diagonal of ones, and the norms that it was scaled by."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    norms = damped.diagonal().sqrt().clamp_(min=torch.finfo(torch.float32).tiny)
    damped /= norms
    damped /= norms[:, None]
    damped.diagonal().fill_(1)
    return damped, norms


class Search:
    """ADMM for the support, on weights scaled by the norms of their inputs; one matrix [out, in] per linear."""

    def __init__(
        self,
        dense: list[Float32[Tensor, "_ in"]],
        gram: Float32[Tensor, "in in"],
        normal: Float32[Tensor, "in in"],
        targets: list[Target],
        settings: ALPS,
        shares: RowShares,
    ) -> None:
        self._dense, self._gram, self._normal, self._targets = dense, gram, normal, targets
        self._settings, self._shares = settings, shares
        self.product = shares.by_parts(lambda rows: torch.mm(rows, normal), dense)
        """W (scaled) times the Gram matrix (scaled)."""
        self.found = dense
        """The ridge solutions, of which the support is the largest weights."""

    def run(self) -> list[Bool[Tensor, "_ in"]]:
        """The weights that stay."""
        rho, restarts, growing = self._settings.rho, 0, False
        support = start = self._largest(self._dense)
        kept = self._count(support)
        self._reset(start)
        for iteration in range(1, self._settings.max_iterations + 1):
            if (iteration - 1) % ITERATIONS_PER_RHO == 0:
                inverse = None  # room for the next
                before, inverse = support, self._ridge_inverse(min(rho, MAX_RHO))
            support = self._iterate(min(rho, MAX_RHO), inverse)
            if iteration % ITERATIONS_PER_RHO:
                continue
            changed = [new ^ old for new, old in zip(support, before, strict=True)]
            change = self._count(changed) / max(1, kept)
            if iteration >= FIRST_ITERATIONS and change < SETTLED:
                break
            if change > 0.005:
                rho, growing = rho * (1.3 if change > 0.1 else 1.2), True
            elif growing:
                if change == 0:
                    break
                rho *= 1.1
            elif restarts < RESTARTS:  # so strong a penalty holds on to the first support
                rho, restarts = rho / 5, restarts + 1
                self._reset(start)
            else:
                break
        return self._largest(self.found)

    def _reset(self, start: list[Bool[Tensor, "_ in"]]) -> None:
        self._sparse = [w * keep for w, keep in zip(self._dense, start, strict=True)]
        self._dual = [torch.zeros_like(w) for w in self._dense]

    def _iterate(self, rho: float, inverse: Float32[Tensor, "in in"]) -> list[Bool[Tensor, "_ in"]]:
        """One round of ADMM (equation 4); returns the support."""

        def ridge(product: Tensor, dual: Tensor, sparse: Tensor) -> Tensor:
            return torch.mm(product - dual + rho * sparse, inverse)

        self.found = self._shares.by_parts(ridge, self.product, self._dual, self._sparse)
        moved = [found + dual / rho for found, dual in zip(self.found, self._dual, strict=True)]
        support = self._largest(moved)
        self._sparse = [m.mul_(keep) for m, keep in zip(moved, support, strict=True)]
        for dual, found, sparse in zip(self._dual, self.found, self._sparse, strict=True):
            dual.add_(found - sparse, alpha=rho)
        return support

    def _largest(self, matrices: list[Float32[Tensor, "_ in"]]) -> list[Bool[Tensor, "_ in"]]:
        scores = [matrix.square() for matrix in matrices]
        return keep_in_matrices(scores, self._targets, self._shares, self._settings.per_row)

    def _count(self, masks: list[Bool[Tensor, "_ in"]]) -> int:
        """Of all workers."""
        return int(self._shares.gang.add(torch.stack([mask.sum() for mask in masks]).sum()))

    def _ridge_inverse(self, rho: float) -> Float32[Tensor, "in in"]:
        factor = _ridge_factor(self._normal, rho)
        if factor is None:
            raise NotPositiveDefinite(self._settings.damping)
        return torch.cholesky_inverse(factor)


def _ridge_factor(normal: Float32[Tensor, "in in"], rho: float) -> Float32[Tensor, "in in"] | None:
    """Lower Cholesky factor of G + rho I, None if it has none."""
    ridge = normal.clone()
    ridge.diagonal().add_(rho)
    factor, failed = torch.linalg.cholesky_ex(ridge)
    return None if failed.item() else factor


def refit(
    product: Float32[Tensor, "out in"],
    start: Float32[Tensor, "out in"],
    keep: Bool[Tensor, "out in"],
    normal: Float32[Tensor, "in in"],
    iterations: int,
) -> Float32[Tensor, "out in"]:
    """Every row's least squares on its support, by conjugate gradients on all rows at once.

    `product` is W G and `start` where the search ended, zero outside `keep`. Solves w' G = W G on the support.
    """

    def dot(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(1, keepdim=True)

    solution = start
    residual = (product - torch.mm(solution, normal)) * keep
    direction, size = residual.clone(), dot(residual, residual)
    enough = TOLERANCE**2 * dot(product * keep, product * keep)
    for _ in range(iterations):
        if (size <= enough).all():
            break
        ahead = torch.mm(direction, normal) * keep
        step = size / dot(direction, ahead).clamp(min=torch.finfo(torch.float32).tiny)
        solution = solution + step * direction
        residual = residual - step * ahead
        before, size = size, dot(residual, residual)
        direction = residual + size / before.clamp(min=torch.finfo(torch.float32).tiny) * direction
    return solution
