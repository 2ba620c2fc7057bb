import itertools

import pytest
import torch

from calibprune.config.prune import SparseGPT
from calibprune.pruning import factor, rows, sparsegpt
from calibprune.pruning.factor import NotPositiveDefinite, inverse_factor
from calibprune.pruning.rows import RowShares
from calibprune.pruning.sparsegpt import prune, solve
from calibprune.pruning.statistics import Statistics
from tests.calibprune.pruning.data import (
    correlated_inputs,
    plain_statistics,
    random_weights,
    targets,
)
from tests.calibprune.simulated_gang import simulate


def settings(blocksize: int = 128, damping: float = 0.01, per_row: bool = False) -> SparseGPT:
    return SparseGPT(type="sparsegpt", blocksize=blocksize, damping=damping, per_row=per_row)


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` lowest scores; among equals by column, then by row."""
    rows, columns = scores.shape
    places = [(scores[i, j].item(), j, i) for i in range(rows) for j in range(columns)]
    chosen = torch.zeros(rows, columns, dtype=torch.bool)
    for _, j, i in sorted(places)[:count]:
        chosen[i, j] = True
    return chosen


def reference(weight, gram, sparsity, n_of_m, blocksize=128, per_row=False):
    """The authors' `fasterprune` line by line in float64, with exact counts."""
    w, h = weight.double().clone(), gram.double().clone()
    width = w.shape[1]
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    damp = 0.01 * h.diagonal().mean()
    h[range(width), range(width)] += damp
    hinv = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    for i1 in range(0, width, blocksize):
        i2 = min(i1 + blocksize, width)
        w1, q1, err1 = w[:, i1:i2].clone(), w[:, i1:i2].clone(), w[:, i1:i2].clone()
        hinv1 = hinv[i1:i2, i1:i2]
        if n_of_m is None:
            scores = w1**2 / hinv1.diagonal() ** 2
            if per_row:  # over all blocks the whole part of width * sparsity
                count = int(i2 * sparsity + 1e-6) - int(i1 * sparsity + 1e-6)
                removed = torch.cat([lowest(row[None], count) for row in scores])
            else:
                removed = lowest(scores, round(scores.numel() * sparsity))
        else:
            removed = torch.zeros_like(w1, dtype=torch.bool)
        for i in range(i2 - i1):
            if n_of_m and i % n_of_m[1] == 0:
                kept, group = n_of_m
                part = w1[:, i : i + group] ** 2 / hinv1.diagonal()[i : i + group] ** 2
                for row in range(len(part)):
                    removed[row, i : i + group] = lowest(part[row : row + 1], group - kept)[0]
            q = w1[:, i].clone()
            q[removed[:, i]] = 0
            q1[:, i] = q
            err = (w1[:, i] - q) / hinv1[i, i]
            w1[:, i:] -= err[:, None] * hinv1[i, i:]
            err1[:, i] = err
        w[:, i1:i2] = q1
        w[:, i2:] -= err1 @ hinv[i1:i2, i2:]
    return w


@pytest.fixture(params=["compiled", "tensors"])
def path(request, monkeypatch):
    """Both ways of running the columns, on the CPU."""
    monkeypatch.setitem(rows.ROW_CHUNK, "cpu", 16)
    if request.param == "tensors":
        monkeypatch.setattr(sparsegpt, "runs_compiled", lambda device: False)
    return request.param


@pytest.mark.parametrize(
    ("n_of_m", "per_row"), [(None, False), (None, True), ((2, 4), False), ((4, 8), True), ((1, 4), False)]
)  # fmt: skip
@pytest.mark.parametrize(("width", "blocksize"), [(200, 128), (64, 128), (96, 32), (72, 25)])
def test_equals_the_reference(n_of_m, per_row, width, blocksize, path):
    if n_of_m and blocksize == 25:
        blocksize = 24
    x = correlated_inputs(3 * width, width)
    statistics = plain_statistics(x)
    weights = random_weights(24, 5, width=width)
    sparsities = [0.5, 0.7]
    wanted = targets(*sparsities, n_of_m=n_of_m)
    result = prune(weights, statistics, wanted, settings(blocksize, per_row=per_row))
    for weight, sparsity, pruned in zip(weights, sparsities, result, strict=True):
        expected = reference(weight, statistics.gram, sparsity, n_of_m, blocksize, per_row)
        assert torch.equal(pruned == 0, expected == 0)
        assert (pruned - expected).norm() < 1e-5 * expected.norm()
        assert (pruned - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("n_of_m", [None, (2, 4)])
def test_inputs_that_are_always_zero(n_of_m, path):
    x = correlated_inputs(200, 64)
    x[:, [0, 1, 2, 17, 63]] = 0
    statistics = plain_statistics(x)
    weights = random_weights(16, width=64)
    (pruned,) = prune(weights, statistics, targets(0.5, n_of_m=n_of_m), settings())
    expected = reference(weights[0], statistics.gram, 0.5, n_of_m)
    assert torch.equal(pruned == 0, expected == 0)
    assert (pruned - expected).norm() < 1e-5 * expected.norm()
    assert (pruned[:, [0, 1, 2, 17, 63]] == 0).all()


def test_equal_rows_and_columns_keep_exact_counts(path):
    x = torch.eye(40).repeat(3, 1)  # an orthogonal input and one single weight: every score ties
    weight = torch.full((10, 40), 0.5)
    (pruned,) = prune([weight], plain_statistics(x), targets(0.3), settings(16))
    per_block = [(block == 0).sum().item() for block in pruned.split(16, dim=1)]
    assert per_block == [48, 48, 24]
    assert torch.equal(pruned == 0, reference(weight, x.T @ x, 0.3, None, 16) == 0)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.73])
def test_counts_per_block(sparsity, path):
    weights = random_weights(33, width=100)
    statistics = plain_statistics(correlated_inputs(300, 100))
    (pruned,) = prune(weights, statistics, targets(sparsity), settings(48))
    for block in pruned.split(48, dim=1):
        assert (block == 0).sum().item() == round(block.numel() * sparsity)


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4)])
def test_n_of_m_in_every_group(kept, group, path):
    weights = random_weights(19, width=136)
    statistics = plain_statistics(correlated_inputs(300, 136))
    (pruned,) = prune(weights, statistics, targets(0.5, n_of_m=(kept, group)), settings(64))
    assert ((pruned.reshape(-1, group) != 0).sum(1) == kept).all()


def test_both_paths_agree(monkeypatch):
    weights = random_weights(40, 24, width=272)
    statistics = plain_statistics(correlated_inputs(800, 272))
    for n_of_m in (None, (2, 4)):
        compiled = prune(weights, statistics, targets(0.5, 0.6, n_of_m=n_of_m), settings())
        with monkeypatch.context() as patch:
            patch.setattr(sparsegpt, "runs_compiled", lambda device: False)
            tensors = prune(weights, statistics, targets(0.5, 0.6, n_of_m=n_of_m), settings())
        for a, b in zip(compiled, tensors, strict=True):
            assert torch.equal(a == 0, b == 0)
            assert (a - b).abs().max() < 1e-5 * a.abs().max()


@pytest.mark.parametrize("n_of_m", [None, (2, 4)])
def test_rows_solved_apart_get_the_same_bits(n_of_m, path):
    (weights,) = random_weights(112, width=200)
    upper = inverse_factor(plain_statistics(correlated_inputs(500, 200)).gram, 0.01)
    keep = torch.rand(112, 200, generator=torch.Generator().manual_seed(0)) > 0.5

    def solve_rows(first, last):
        given = n_of_m or (lambda _, start, stop: keep[first:last, start:stop])
        return solve(weights[first:last], upper, 128, given)

    everything = solve_rows(0, 112)
    for cuts in ([0, 16, 112], [0, 48, 64, 112], [0, 32, 96, 112]):
        parts = [solve_rows(first, last) for first, last in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), everything)


def test_rows_that_are_compared_alone_get_the_same_bits_wherever_they_are_pruned(path):
    (weights,) = random_weights(48, width=200)
    statistics, wanted = plain_statistics(correlated_inputs(500, 200)), targets(0.7)
    (together,) = prune([weights], statistics, wanted, settings(per_row=True))
    assert ((together == 0).sum(1) == 140).all()
    for rows_of_one in weights.split(16), weights.split(32):
        apart = [prune([some], statistics, wanted, settings(per_row=True))[0] for some in rows_of_one]  # fmt: skip
        assert torch.equal(torch.cat(apart), together)


def test_linears_solved_apart_get_the_same_bits(path):
    weights = random_weights(40, 24, 7, width=200)
    statistics = plain_statistics(correlated_inputs(500, 200))
    together = prune(weights, statistics, targets(0.5, 0.6, 0.7), settings())
    for weight, sparsity, expected in zip(weights, (0.5, 0.6, 0.7), together, strict=True):
        assert torch.equal(prune([weight], statistics, targets(sparsity), settings())[0], expected)


def test_the_number_of_threads_does_not_matter():
    (weights,) = random_weights(50, width=200)
    upper = inverse_factor(plain_statistics(correlated_inputs(500, 200)).gram, 0.01)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = solve(weights, upper, 128, (2, 4))
        torch.set_num_threads(3)
        three = solve(weights, upper, 128, (2, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)


@pytest.mark.parametrize("n_of_m", [None, (2, 4)])
@pytest.mark.parametrize("per_row", [False, True])
def test_any_number_of_workers_gets_the_same_bits(n_of_m, per_row, path, monkeypatch):
    """Of which the factor and its inverse are dealt too."""
    monkeypatch.setattr(factor, "NARROW_BLOCK", 24)
    monkeypatch.setattr(factor, "MIN_DEALT", 100)
    weights = random_weights(40, 70, width=120)
    statistics = plain_statistics(correlated_inputs(500, 120))
    wanted, way = targets(0.5, 0.6, n_of_m=n_of_m), settings(32, per_row=per_row)

    def work(gang):
        shares = RowShares.of(weights, gang)
        return prune(shares.mine(weights), statistics, wanted, way, shares)

    alone = prune(weights, statistics, wanted, way)
    for size in (2, 3):
        for whole, *parts in zip(alone, *simulate(size, work), strict=True):
            assert torch.equal(torch.cat(parts), whole)


def test_removing_the_first_columns_is_exact_least_squares(path):
    x = correlated_inputs(200, 24)
    gram = plain_statistics(x).gram
    (weight,) = random_weights(9, width=24)
    keep = torch.arange(24) >= 10
    upper = inverse_factor(gram, 1e-7)
    pruned = solve(weight, upper, 8, lambda _, a, b: keep[a:b].expand(9, -1).clone())
    solution = torch.linalg.lstsq(x[:, 10:].double(), (x @ weight.T).double()).solution.T
    assert (pruned[:, :10] == 0).all()
    torch.testing.assert_close(pruned[:, 10:].double(), solution, rtol=1e-3, atol=1e-5)


def test_between_the_best_of_all_masks_and_no_update():
    x = correlated_inputs(100, 8)
    statistics = plain_statistics(x)
    (weight,) = random_weights(1, width=8)
    (pruned,) = prune([weight], statistics, targets(0.5), settings(8, 1e-6))
    wanted = (x @ weight.T).double()

    def error(matrix):
        return (x.double() @ matrix.double().T - wanted).norm().item()

    def refitted(kept):
        best = torch.zeros(1, 8, dtype=torch.float64)
        columns = list(kept)
        best[:, columns] = torch.linalg.lstsq(x[:, columns].double(), wanted).solution.T
        return best

    best = min(error(refitted(kept)) for kept in itertools.combinations(range(8), 4))
    assert best * (1 - 1e-6) <= error(pruned) < error(weight * (pruned != 0))


def test_a_gram_that_is_not_positive_definite_raises():
    hopeless = torch.diag(torch.tensor([-1.0, -2.0, -1.0, -3.0]))
    statistics = Statistics(1, hopeless.diagonal(), hopeless)
    with pytest.raises(NotPositiveDefinite, match=r"not positive definite with damping 0\.01$"):
        prune(random_weights(3, width=4), statistics, targets(0.5), settings())


def test_a_blocksize_that_cuts_groups_raises():
    statistics = plain_statistics(correlated_inputs(100, 24))
    with pytest.raises(ValueError, match="6"):
        prune(random_weights(4, width=24), statistics, targets(0.5, n_of_m=(2, 4)), settings(6))
