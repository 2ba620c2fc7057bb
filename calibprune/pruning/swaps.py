"""Refinement of any method's mask: exchanges of one kept and one pruned weight of a row, the best ones first.

Zimmer et al. 2025 (SparseSwaps, arXiv 2512.10922). An exchange is judged by the exact change of the output error
||(W - W') X||^2, which falls with each; a row ends when no exchange lowers it. Every row keeps its sparsity, every
N:M group its N. Where the paper weighs all pairs anew for every exchange, here one weighing of all pairs puts the
kept weights in order, and each in turn, weighed anew on its own, makes the best exchange that is left to it: as exact,
and a fraction of the work. Beyond the paper, a method that updates weights has its own values as the start, and a
weight that comes back gets the value that is best given all others under the method's damping: inputs that are nearly
always zero would ask for weights of any size. The error falls by more than a damped return is judged to take away.

On CPUs compiled code works on the rows (swaps_compiled.py); on GPUs tensor operations, and a kernel that weighs all
pairs (swaps_triton.py).
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from calibprune.config.prune import Swaps
from calibprune.events import show_life
from calibprune.pruning.masks import Target, on_threads, runs_compiled
from calibprune.pruning.rows import RowShares, row_slices
from calibprune.pruning.statistics import Statistics, full_float32
from calibprune.pruning.swaps_compiled import exchange_rows

PAIRS_AT_ONCE = 1 << 26
"""Number of pairs, of all rows of a chunk together, that tensor operations weigh at a time."""
ROWS_AT_ONCE = 8
INPUTS_AT_ONCE = 512
TINY, NEVER = 1e-30, 3e38
MIN_GAIN = 1e-6
"""Share of the squared norm of a row's output by which an exchange has to lower the error: less is rounding."""


@dataclass(frozen=True)
class Rows:
    """Some rows of one linear while weights are exchanged.

    With d = dense - current and c = d G: taking weight p away changes the error by 2 v_p c_p + v_p^2 G_pp. Bringing r
    back with value x changes it by -2 x (c_r + v_p G_pr) + x^2 G_rr, p being gone. x is d_r or, where a method updates
    weights, (c_r + v_p G_pr) / (G_rr + damping): then the change is at most -(c_r + v_p G_pr)^2 / (G_rr + damping),
    which the return is judged by.
    """

    dense: Float32[Tensor, "out in"]
    current: Float32[Tensor, "out in"]
    """Exchanged in place."""
    gram: Float32[Tensor, "in in"]
    diagonal: Float32[Tensor, " in"]
    """Diagonal of `gram` that returns are weighed with; damped where `updates`."""
    slope: Float32[Tensor, "out in"]
    """(dense - current) @ gram, kept up to date."""
    reach: Float32[Tensor, " in"]
    """The largest |G_pr| / sqrt(G_rr) of every weight p with another one r."""
    least: Float32[Tensor, " out"]
    """Part of the error that an exchange has to take away."""
    group: int
    """Columns within which weights are exchanged."""
    updates: bool
    """Whether weights come back with the best value instead of their dense one."""
    max_swaps: int

    def change_by_return(
        self,
        pull: Float32[Tensor, "..."],
        dense: Float32[Tensor, "..."],
        diagonal: Float32[Tensor, "..."],
    ) -> Float32[Tensor, "..."]:
        """Returns the change of the error by the return of weights with these pulls c_r + v_p G_pr."""
        if self.updates:
            return -pull.square() / diagonal
        return dense.square() * diagonal - 2 * dense * pull


@torch.no_grad()
def refine(
    weights: list[Float[Tensor, "_ in"]],
    pruned: list[Float[Tensor, "_ in"]],
    statistics: Statistics,
    targets: list[Target],
    settings: Swaps,
    shares: RowShares,
    damping: float | None,
) -> list[Float[Tensor, "_ in"]]:
    """Exchanges weights of `pruned`, which a method made of the dense `weights`; returns new ones.

    Needs `gram`. `damping`: of a method that updates weights, as a fraction of the Gram matrix's mean diagonal; None
    has weights come back with their dense values. Every row is its own problem.
    """
    if statistics.gram is None:
        raise ValueError("swaps need the Gram matrix of the inputs")
    gram, updates, refined = statistics.gram, damping is not None, []
    diagonal = gram.diagonal().clone()
    if damping is not None:
        diagonal = (diagonal + damping * diagonal.mean()).clamp_(min=TINY)
    reach = _reach(gram)
    for dense, sparse, target in zip(weights, pruned, targets, strict=True):
        group = target.n_of_m[1] if target.n_of_m else dense.shape[1]

        def exchanged(dense: Tensor, current: Tensor, group: int = group) -> Tensor:
            with full_float32():
                slope = torch.mm(dense - current, gram)
                least = (torch.mm(dense, gram) * dense).sum(1) * MIN_GAIN
            rows = Rows(
                dense,
                current,
                gram,
                diagonal,
                slope,
                reach,
                least,
                group,
                updates,
                settings.max_swaps,
            )
            (_exchange_compiled if runs_compiled(gram.device) else _exchange)(rows)
            return current

        (result,) = shares.by_parts(
            exchanged, [dense.to(torch.float32)], [sparse.to(torch.float32)]
        )
        refined.append(result.to(sparse.dtype))
    return refined


def _reach(gram: Float32[Tensor, "in in"]) -> Float32[Tensor, " in"]:
    """Returns the largest |G_pr| / sqrt(G_rr) of every input p with another one r."""
    norms, found = gram.diagonal().sqrt().clamp_(min=TINY), []
    for start in range(0, len(gram), INPUTS_AT_ONCE):
        rows = gram[start : start + INPUTS_AT_ONCE].abs().div_(norms)
        rows.diagonal(start).zero_()
        found.append(rows.amax(1))
    return torch.cat(found)


def _exchange(rows: Rows) -> None:
    """Exchanges weights as tensor operations, on all rows at once that may still get better."""
    made = torch.zeros(len(rows.dense), dtype=torch.int64, device=rows.gram.device)
    left = torch.arange(len(made), device=made.device)
    while len(left):
        show_life()
        some = replace(
            rows,
            dense=rows.dense[left],
            current=rows.current[left],
            slope=rows.slope[left],
            least=rows.least[left],
        )
        before, now = made[left], made[left]
        _exchange_once(some, now)
        rows.current[left], rows.slope[left], made[left] = some.current, some.slope, now
        left = left[(now > before) & (now < rows.max_swaps)]


def _exchange_once(rows: Rows, made: Int64[Tensor, " out"]) -> None:
    """Weighs all pairs, makes the exchanges that lower the error, the best first, and adds them to `made`."""
    dense, current, gram, slope, least = rows.dense, rows.current, rows.gram, rows.slope, rows.least
    diagonal, every = gram.diagonal(), torch.arange(len(dense), device=gram.device)
    of_group = torch.arange(gram.shape[0], device=gram.device) // rows.group
    changes = _best_changes(rows)
    improving = changes < -least[:, None]
    most = min(rows.max_swaps, int(improving.sum(1).max()))
    for p in changes.argsort(dim=1, stable=True)[:, :most].unbind(1):
        value = current[every, p]
        pull = slope + value[:, None] * gram[p]
        back = rows.change_by_return(pull, dense, rows.diagonal)
        may = (current == 0) & (of_group == of_group[p, None])
        lowest, r = back.masked_fill(~may, torch.inf).min(1)
        change = 2 * value * slope[every, p] + value.square() * diagonal[p] + lowest
        x = dense[every, r]
        if rows.updates:
            x = pull[every, r] / rows.diagonal[r]
        wanted = improving[every, p] & (change < -least) & (made < rows.max_swaps) & (x != 0)
        value, x = value * wanted, x * wanted
        slope += value[:, None] * gram[p] - x[:, None] * gram[r]
        current[every, p] -= value
        current[every, r] += x
        made += wanted


def _best_changes(rows: Rows) -> Float32[Tensor, "out in"]:
    """For every kept weight the change of the error by its best exchange; infinite for the others."""
    back = _weigher(rows)(rows)
    taken = 2 * rows.current * rows.slope + rows.current.square() * rows.gram.diagonal()
    return (taken + back).masked_fill_(rows.current == 0, torch.inf)


def _weigher(rows: Rows) -> Callable[[Rows], Tensor]:
    """One kernel where Triton is at hand and groups are whole rows, else tensor operations on all pairs."""
    whole = rows.group == rows.gram.shape[0]
    if rows.gram.is_cuda and whole and importlib.util.find_spec("triton"):
        return _best_returns_triton
    return _best_returns


def _best_returns_triton(rows: Rows) -> Float32[Tensor, "out in"]:
    from calibprune.pruning.swaps_triton import lowest_scores

    # the change by a return is linear in its pull, or the square of what is
    if rows.updates:
        factor = rows.diagonal.rsqrt().expand_as(rows.dense).masked_fill(rows.current != 0, 0)
        base = factor * rows.slope
    else:
        factor = -2 * rows.dense
        base = rows.dense.square() * rows.diagonal + factor * rows.slope
        base.masked_fill_(rows.current != 0, NEVER)
        factor.masked_fill_(rows.current != 0, 0)
    lowest = lowest_scores(rows.current, base, factor, rows.gram, rows.updates)
    return -lowest.square() if rows.updates else lowest


def _best_returns(rows: Rows) -> Float32[Tensor, "out in"]:
    """For every weight the lowest change of the error by any return once it is gone."""
    group = rows.group
    groups = rows.gram.shape[0] // group
    # pairs are within a group: [groups, group, group] of the Gram matrix
    blocks = rows.gram.view(groups, group, groups, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    dense, current, slope, returning = (
        tensor.unflatten(-1, (groups, group))
        for tensor in (rows.dense, rows.current, rows.slope, rows.diagonal)
    )
    lowest = torch.empty_like(current)
    at_once = max(1, PAIRS_AT_ONCE // max(1, rows.dense.numel()))
    for first in range(0, group, at_once):
        some = slice(first, first + at_once)
        pull = slope[..., None, :] + current[..., some, None] * blocks[:, some]
        back = rows.change_by_return(pull, dense[..., None, :], returning[:, None])
        lowest[..., some] = back.masked_fill_(current[..., None, :] != 0, torch.inf).amin(-1)
    return lowest.flatten(1)


def _exchange_compiled(rows: Rows) -> None:
    """The same in compiled code, a few rows at a time."""
    w, v, c, enough, g, h, reach = (
        tensor.numpy()
        for tensor in (
            rows.dense, rows.current, rows.slope, rows.least, rows.gram, rows.diagonal, rows.reach
        )
    )  # fmt: skip
    how = rows.group, rows.max_swaps, rows.updates

    def work(part: slice) -> None:
        exchange_rows(w[part], v[part], c[part], g, h, reach, enough[part], *how)
        show_life()

    on_threads(work, row_slices([len(w)], ROWS_AT_ONCE))
