"""The factor that SparseGPT needs of a Gram matrix: U upper triangular with U^T U = H^-1.

H is the Gram matrix made safe to invert. H = R R^T with R upper triangular, so U = R^-1. Both are computed in columns
of blocks of one width, which are dealt to the gang: no operation's shape depends on how many workers there are, and
what a worker computes is copied to the others.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from calibprune.gang import ALONE, Gang
from calibprune.pruning.rows import row_slices
from calibprune.pruning.statistics import full_float32

BLOCK, NARROW_BLOCK = 256, 128
"""Columns that are one worker's; the second for matrices of up to MAX_NARROW, which eight workers are to share."""
MAX_NARROW = 4096

MIN_DEALT = 2048
"""Width below which every worker computes everything: exchanging takes longer."""


class NotPositiveDefinite(ValueError):
    """The damped Gram matrix has no Cholesky factor: more damping may help."""

    def __init__(self, damping: float) -> None:
        super().__init__(
            f"the Gram matrix of the inputs is not positive definite with damping {damping:g}"
        )
        self.damping = damping


def inverse_factor(
    gram: Float32[Tensor, "in in"], damping: float, gang: Gang = ALONE
) -> Float32[Tensor, "in in"]:
    """Returns U. Inputs that were always zero get H_jj = 1, then damping * mean(diag H) is added to the diagonal.

    Takes two matrices of this size beside `gram`. Collective. Raises NotPositiveDefinite.
    """
    factor = gram.clone()
    diagonal = factor.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    blocks = row_slices([len(gram)], NARROW_BLOCK if len(gram) <= MAX_NARROW else BLOCK)
    gang = gang if len(gram) >= MIN_DEALT else ALONE
    with full_float32():
        inverses = _factorise(factor, blocks, gang)
        if not factor.diagonal().isfinite().all():
            raise NotPositiveDefinite(damping)
        return _inverse(factor, blocks, inverses, gang)


def dealt(costs: Sequence[int], workers: int) -> list[int]:
    """Returns a worker for every piece of work: from the largest to the smallest, each to who has least so far."""
    owners, given = [0] * len(costs), [0] * workers
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        owners[piece] = given.index(min(given))
        given[owners[piece]] += costs[piece]
    return owners


def _factorise(
    matrix: Float32[Tensor, "in in"], blocks: Sequence[slice], gang: Gang
) -> list[Float32[Tensor, "_ _"]]:
    """Replaces the upper triangle of a symmetric matrix by its factor R; returns the inverses of R's diagonal blocks.

    From the last block to the first, each being taken off all before it once it is known (a right-looking Cholesky
    factorisation). Where there is no factor, its diagonal is not finite.
    """
    # a block's columns are updated for each block after it
    owners = dealt([here.stop * (len(blocks) - n) for n, here in enumerate(blocks)], gang.size)
    inverses: dict[int, Tensor] = {}
    for number in reversed(range(len(blocks))):
        here, owner = blocks[number], owners[number]
        above = slice(0, here.start)
        width = here.stop - here.start
        column = matrix.new_empty(here.stop + width, width)  # of the factor, then the inverse
        if owner == gang.rank:
            corner, inverse = _factorised_block(matrix[here, here])
            torch.mm(matrix[above, here], inverse.T, out=column[above])
            column[here], column[here.stop :] = corner, inverse
        gang.broadcast([(column, owner)])
        matrix[: here.stop, here] = column[: here.stop]
        inverses[number] = column[here.stop :].clone()
        for other, columns in enumerate(blocks[:number]):
            if owners[other] == gang.rank:
                rows = slice(0, columns.stop)
                matrix[rows, columns].addmm_(column[rows], column[columns].T, alpha=-1)
    return [inverses[number] for number in range(len(blocks))]


def _factorised_block(
    block: Float32[Tensor, "n n"],
) -> tuple[Float32[Tensor, "n n"], Float32[Tensor, "n n"]]:
    """Returns R of one block, and its inverse: of the lower factor with rows and columns reversed."""
    lower, failed = torch.linalg.cholesky_ex(block.flip(0, 1))
    lower = torch.where(failed > 0, torch.nan, lower)
    identity = torch.eye(len(block), dtype=block.dtype, device=block.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False).tril_()
    return lower.flip(0, 1), inverse.flip(0, 1)


def _inverse(
    factor: Float32[Tensor, "in in"],
    blocks: Sequence[slice],
    inverses: Sequence[Float32[Tensor, "_ _"]],
    gang: Gang,
) -> Float32[Tensor, "in in"]:
    """Returns the inverse of an upper triangular matrix from those of its diagonal blocks."""
    upper = torch.zeros_like(factor)
    columns = [upper[: here.stop, here] for here in blocks]
    owners = dealt([here.stop**2 for here in blocks], gang.size)
    for number, (here, owner) in enumerate(zip(blocks, owners, strict=True)):
        if owner == gang.rank:
            upper[here, here] = inverses[number]
            if number:
                column = upper[: here.start, here]
                torch.mm(factor[: here.start, here], inverses[number].neg(), out=column)
                _substitute(factor, blocks, inverses, column, 0, number)
    _exchange(columns, owners, gang)
    return upper


def inverse_of_factor(
    upper: Float32[Tensor, "in in"], gang: Gang = ALONE
) -> Float32[Tensor, "in in"]:
    """Returns U^T U of an upper triangular U, its rows in blocks that are dealt to the gang. Collective."""
    gang = gang if len(upper) >= MIN_DEALT else ALONE
    blocks = row_slices([len(upper)], BLOCK)
    product = torch.empty_like(upper)
    lower = [product[block, : block.stop] for block in blocks]
    owners = dealt([block.stop**2 for block in blocks], gang.size)
    for block, rows, owner in zip(blocks, lower, owners, strict=True):
        if owner == gang.rank:
            rows.copy_(upper[: block.stop, block].T @ upper[: block.stop, : block.stop])
    _exchange(lower, owners, gang)
    for block, rows in zip(blocks, lower, strict=True):
        product[: block.start, block] = rows[:, : block.start].T
    return product


def _exchange(blocks: Sequence[Float32[Tensor, "_ _"]], owners: Sequence[int], gang: Gang) -> None:
    """Fills blocks of a matrix with what their owners hold in them, as many at a time as there are workers."""
    if gang.size == 1:
        return
    dealt_blocks = list(zip(blocks, owners, strict=True))
    for first in range(0, len(dealt_blocks), gang.size):
        some = dealt_blocks[first : first + gang.size]
        pieces = [(block.contiguous(), owner) for block, owner in some]
        gang.broadcast(pieces)
        for (block, _), (piece, _) in zip(some, pieces, strict=True):
            block.copy_(piece)


def _substitute(
    factor: Float32[Tensor, "in in"],
    blocks: Sequence[slice],
    inverses: Sequence[Float32[Tensor, "_ _"]],
    column: Float32[Tensor, "rows columns"],
    first: int,
    stop: int,
) -> None:
    """Solves R X = `column` in place for the blocks of rows [first, stop), by halves: mostly large products."""
    if stop - first == 1:
        rows = blocks[first]
        column[rows] = inverses[first] @ column[rows]
        return
    half = (first + stop) // 2
    above = slice(blocks[first].start, blocks[half].start)
    below = slice(blocks[half].start, blocks[stop - 1].stop)
    _substitute(factor, blocks, inverses, column, half, stop)
    column[above].addmm_(factor[above, below], column[below], alpha=-1)
    _substitute(factor, blocks, inverses, column, first, half)
