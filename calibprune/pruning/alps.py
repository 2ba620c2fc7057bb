"""ALPS: a search for the weights that stay by ADMM, then an exact refit of those weights.

Meng et al. 2024 (NeurIPS, arXiv 2406.07831), algorithm 1. The minimiser of ||(W - W') X||^2 over sparse W' is sought
by alternating a ridge solution with the nearest sparse matrix, under a penalty rho that grows as the support settles.
Where the paper has one eigendecomposition in float64, every rho here has a factorisation and an inverse in float32:
about 2 n^3 operations at full speed on a GPU, where eigenvalues take many times as long, and shared by the workers. A
group of width 28672 with 8192 rows takes 47 TFLOP per rho, of three iterations, and 13 TFLOP per iteration: on one
H100 about 0.4 s an iteration, an estimate from its 45 TFLOP/s in float32 and 300 in TF32.

The sparse solution D and the scaled dual variable V / rho are two parts of one matrix, D + V / rho: the weights of the
support and the others.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from calibprune.config.prune import ALPS
from calibprune.events import show_life
from calibprune.pruning.factor import NotPositiveDefinite, inverse_factor, inverse_of_factor
from calibprune.pruning.masks import Target, keep_in_matrices, on_threads, runs_compiled
from calibprune.pruning.rows import RowShares, row_slices
from calibprune.pruning.statistics import Statistics, full_float32

ITERATIONS_PER_RHO = 3
SETTLED = 3e-4
"""Share of the weights that stay: fewer changes than this and the support counts as found, after FIRST_ITERATIONS."""
FIRST_ITERATIONS = 31
RESTARTS, MAX_RHO = 8, 1e6
MIN_GAIN = 3e-6
"""Share of the output error that a step of the refit takes away: it ends with the first that takes less."""


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
        search = Search(dense, normal, targets, settings, shares)
        found, support = search.run()
        refitted = _by_parts(
            shares,
            partial(refit, normal=normal, iterations=settings.refit_iterations),
            dense,
            search.product,
            [solution * keep for solution, keep in zip(found, support, strict=True)],
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


@dataclass(frozen=True)
class Ridge:
    """One round of ADMM (equation 4) of some rows, in the penalty rho."""

    inverse: Float32[Tensor, "in in"]
    """(G + rho I)^-1."""
    rho: float
    dual_scale: float
    """The last rho over this one: of the dual variable V, `moved` has V over the last rho."""

    def solution(
        self,
        product: Float32[Tensor, "out in"],
        moved: Float32[Tensor, "out in"],
        support: Bool[Tensor, "out in"],
    ) -> Float32[Tensor, "out in"]:
        """Returns (W G - V + rho D) (G + rho I)^-1."""
        show_life()
        if runs_compiled(product.device):
            right = np.empty(product.shape, np.float32)
            arrays = (product.numpy(), moved.numpy(), support.numpy(), right)
            _right_side(*arrays, np.float32(self.rho), np.float32(self.dual_scale))
            return torch.mm(torch.from_numpy(right), self.inverse)
        signed = torch.where(support, moved, moved * -self.dual_scale)
        return torch.mm(torch.add(product, signed, alpha=self.rho), self.inverse)

    def moved(
        self,
        product: Float32[Tensor, "out in"],
        moved: Float32[Tensor, "out in"],
        support: Bool[Tensor, "out in"],
    ) -> Float32[Tensor, "out in"]:
        """Returns the ridge solution plus V / rho: its largest weights are the next D, the others the next V / rho."""
        found = self.solution(product, moved, support)
        if runs_compiled(product.device):
            _add_dual(found.numpy(), moved.numpy(), support.numpy(), np.float32(self.dual_scale))
            return found
        return found.add_((moved * self.dual_scale).masked_fill_(support, 0))


@numba.njit(nogil=True, cache=True)
@no_type_check  # jaxtyping cannot look into compiled code
def _right_side(product, moved, support, right, rho, dual_scale):
    """The same as the tensor operations in one pass."""
    for i in range(product.shape[0]):
        for j in range(product.shape[1]):
            of_dual = -dual_scale * moved[i, j]
            right[i, j] = product[i, j] + rho * (moved[i, j] if support[i, j] else of_dual)


@numba.njit(nogil=True, cache=True)
@no_type_check
def _add_dual(found, moved, support, dual_scale):
    for i in range(found.shape[0]):
        for j in range(found.shape[1]):
            of_dual = dual_scale * moved[i, j]
            found[i, j] += np.float32(0) if support[i, j] else of_dual


class Search:
    """ADMM for the support, on weights scaled by the norms of their inputs; one matrix [out, in] per linear."""

    def __init__(
        self,
        dense: list[Float32[Tensor, "_ in"]],
        normal: Float32[Tensor, "in in"],
        targets: list[Target],
        settings: ALPS,
        shares: RowShares,
    ) -> None:
        self._dense, self._normal, self._targets = dense, normal, targets
        self._settings, self._shares = settings, shares
        self.product = _by_parts(shares, lambda rows: torch.mm(rows, normal), dense)
        """W (scaled) times the Gram matrix (scaled)."""

    def run(self) -> tuple[list[Float32[Tensor, "_ in"]], list[Bool[Tensor, "_ in"]]]:
        """Returns the ridge solutions that the search ends with, and which of their weights are to stay."""
        rho, restarts, growing = self._settings.rho, 0, False
        support = start = self._largest(self._dense)
        kept = self._count(support)
        moved, held, dual_rho = self._masked(start), start, rho
        for iteration in range(1, self._settings.max_iterations + 1):
            if (iteration - 1) % ITERATIONS_PER_RHO == 0:
                ridge = inverse = None  # room for the next
                penalty = min(rho, MAX_RHO)
                before, inverse = support, self._ridge_inverse(penalty)
            ridge = Ridge(inverse, penalty, dual_rho / penalty)
            last, dual_rho = (moved, held), penalty
            with tensor_float32():
                moved = _by_parts(self._shares, ridge.moved, self.product, moved, held)
            support = held = self._largest(moved)
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
                moved, held, dual_rho = self._masked(start), start, rho
            else:
                break
        found = _by_parts(self._shares, ridge.solution, self.product, *last)
        return found, self._largest(found)

    def _masked(self, support: list[Bool[Tensor, "_ in"]]) -> list[Float32[Tensor, "_ in"]]:
        return [w * keep for w, keep in zip(self._dense, support, strict=True)]

    def _largest(self, matrices: list[Float32[Tensor, "_ in"]]) -> list[Bool[Tensor, "_ in"]]:
        scores = [matrix.abs() for matrix in matrices]
        return keep_in_matrices(scores, self._targets, self._shares, self._settings.per_row)

    def _count(self, masks: list[Bool[Tensor, "_ in"]]) -> int:
        """Returns how many weights the masks of all workers mark. Collective."""
        return int(self._shares.gang.add(torch.stack([mask.sum() for mask in masks]).sum()))

    def _ridge_inverse(self, rho: float) -> Float32[Tensor, "in in"]:
        """Returns (G + rho I)^-1. Collective."""
        show_life()
        ridge = self._normal.clone()
        ridge.diagonal().add_(rho)
        try:
            return inverse_of_factor(
                inverse_factor(ridge, 0.0, self._shares.gang), self._shares.gang
            )
        except NotPositiveDefinite:
            raise NotPositiveDefinite(self._settings.damping) from None


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Lets GPUs round the factors of float32 products to 11 bits while it is open, several times as fast.

    Supports are as good: with factors rounded so the output errors of six linears of SmolLM2-135M were 0.999 to 1.0002
    of those without.
    """
    backend = torch.backends.cuda.matmul
    before, backend.fp32_precision = backend.fp32_precision, "tf32"
    try:
        yield
    finally:
        backend.fp32_precision = before


def _by_parts(
    shares: RowShares, work: Callable[..., Tensor], *matrices: Sequence[Tensor]
) -> list[Tensor]:
    """Returns what `shares.by_parts` does; on CPUs every thread has a part of its own."""
    if not runs_compiled(matrices[0][0].device):
        return shares.by_parts(work, *matrices)
    results = []
    for tensors in zip(*matrices, strict=True):
        result = torch.empty_like(tensors[0])

        def some(part: slice, tensors: tuple = tensors, result: Tensor = result) -> None:
            result[part] = work(*(tensor[part].clone() for tensor in tensors))

        on_threads(some, row_slices([len(result)], shares.chunk))
        results.append(result)
    return results


def refit(
    dense: Float32[Tensor, "out in"],
    product: Float32[Tensor, "out in"],
    start: Float32[Tensor, "out in"],
    keep: Bool[Tensor, "out in"],
    normal: Float32[Tensor, "in in"],
    iterations: int,
    min_gain: float = MIN_GAIN,
) -> Float32[Tensor, "out in"]:
    """Returns every row's least squares on its support, by conjugate gradients on all rows at once.

    `product` is `dense` G and `start` where the search ended, zero outside `keep`. Solves w' G = W G on the support,
    until a step takes less than `min_gain` of the rows' error together.
    """

    def dot(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(1, keepdim=True)

    tiny = torch.finfo(torch.float32).tiny
    solution = start
    residual = product - torch.mm(solution, normal)
    error = dot(dense - solution, residual).sum()
    residual *= keep
    direction, size = residual.clone(), dot(residual, residual)
    for _ in range(iterations):
        show_life()
        ahead = torch.mm(direction, normal).mul_(keep)
        step = size / dot(direction, ahead).clamp(min=tiny)
        solution = torch.addcmul(solution, step, direction)
        gain = (step * size).sum()
        if gain <= min_gain * error:
            break
        residual.addcmul_(step, ahead, value=-1)
        error, before, size = error - gain, size, dot(residual, residual)
        direction.mul_(size / before.clamp(min=tiny)).add_(residual)
    return solution
