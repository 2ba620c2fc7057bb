import numpy as np
import pytest
import torch

from calibprune.config.prune import ALPS
from calibprune.pruning import factor, rows, swaps
from calibprune.pruning.alps import normalised, refit
from calibprune.pruning.factor import NotPositiveDefinite, inverse_of_factor
from calibprune.pruning.methods import prune_group, refine_group
from calibprune.pruning.statistics import Statistics
from tests.calibprune.pruning.data import (
    correlated_inputs,
    plain_statistics,
    random_weights,
    relative_error,
    targets,
)
from tests.calibprune.simulated_gang import simulate


def largest(matrix, kept, n_of_m):
    """1 at the largest entries of [in, out], over the whole matrix or in every group of inputs."""
    if n_of_m is None:
        keep = np.zeros(matrix.size)
        keep[np.argsort(-(matrix.ravel() ** 2))[:kept]] = 1
        return keep.reshape(matrix.shape)
    count, group = n_of_m
    parts = (matrix.T.reshape(-1, group)) ** 2
    keep = np.zeros_like(parts)
    np.put_along_axis(keep, np.argsort(-parts, axis=1)[:, :count], 1, axis=1)
    return keep.reshape(matrix.T.shape).T


def reference(weight, gram, sparsity, n_of_m):
    """The published code in float64: one eigendecomposition, [in, out], exact least squares at the end."""
    h = gram.double().numpy().copy()
    h[np.diag_indices_from(h)] += 0.01 * np.diag(h).mean()
    norms = np.sqrt(np.diag(h))
    h = h / norms / norms[:, None]
    b = (weight.double().numpy() * norms).T
    target = h @ b
    values, vectors = np.linalg.eigh(h)
    rho, growing, start = 0.1, False, b
    kept = round((1 - sparsity) * b.size)
    d = start * largest(start, kept, n_of_m)
    first, v, before = d, np.zeros_like(b), d == 0
    for i in range(300):
        inverse = (vectors / (values + rho)) @ vectors.T if i % 3 == 0 else inverse  # noqa: F821
        b = inverse @ (target - v + rho * d)
        d = b + v / rho
        d = d * largest(d, kept, n_of_m)
        v = v + rho * (b - d)
        if (i + 1) % 3:
            continue
        change = ((d == 0) != before).sum() / kept
        before = d == 0
        if change > 0.1:
            growing, rho = True, rho * 1.3
        elif change > 0.005:
            growing, rho = True, rho * 1.2
        elif change > 0:
            if growing:
                rho *= 1.1
            else:
                rho, b, d, v = rho / 5, start, first, np.zeros_like(b)
        elif growing:
            break
        else:
            rho /= 5
        if i >= 30 and change < 0.0003:
            break
    keep = largest(b, kept, n_of_m)
    result = np.zeros_like(b)
    for column in range(b.shape[1]):
        some = keep[:, column] == 1
        result[some, column] = np.linalg.solve(h[np.ix_(some, some)], target[some, column])
    return torch.from_numpy((result.T / norms).copy())


@pytest.mark.parametrize("n_of_m", [None, (2, 4), (4, 8)])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_as_good_as_the_reference(n_of_m, sparsity):
    x, (weight,) = correlated_inputs(400, 96), random_weights(140, width=96)
    statistics = plain_statistics(x)
    (pruned,) = prune_group(
        [weight], statistics, targets(sparsity, n_of_m=n_of_m), ALPS(type="alps")
    )
    expected = reference(weight, statistics.gram, sparsity, n_of_m)
    assert ((pruned == 0) != (expected == 0)).double().mean() < 0.002
    assert (pruned == 0).sum() == (expected == 0).sum()
    assert relative_error(weight, pruned, x) == pytest.approx(
        relative_error(weight, expected.float(), x), rel=2e-3
    )


def test_the_refit_is_least_squares():
    x, (weight,) = correlated_inputs(300, 40), random_weights(12, width=40)
    normal, norms = normalised(plain_statistics(x).gram, 0.01)
    keep = torch.rand(12, 40, generator=torch.Generator().manual_seed(0)) > 0.5
    dense = weight * norms
    found = refit(dense, dense @ normal, dense * keep, keep, normal, 200, min_gain=0.0)
    for row, mask, whole in zip(found.double(), keep, dense.double(), strict=True):
        h = normal.double()
        exact = torch.linalg.solve(h[mask][:, mask], (h @ whole)[mask])
        assert (row[~mask] == 0).all()
        assert (row[mask] - exact).norm() < 3e-4 * exact.norm()
        away = row[mask] - exact  # the loss above its least value
        assert away @ h[mask][:, mask] @ away < 1e-8 * (whole @ h @ whole)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_inverse_of_a_factor(workers, monkeypatch):
    monkeypatch.setattr(factor, "BLOCK", 8)
    monkeypatch.setattr(factor, "MIN_DEALT", 16)
    upper = torch.randn(45, 45, generator=torch.Generator().manual_seed(0)).triu_()
    alone = inverse_of_factor(upper)
    for found in simulate(workers, lambda gang: inverse_of_factor(upper, gang)):
        assert torch.equal(found, alone)
    assert torch.equal(alone, alone.T)
    torch.testing.assert_close(alone, upper.T @ upper, rtol=1e-5, atol=1e-5)


def test_any_number_of_workers_makes_the_same_bytes(monkeypatch):
    monkeypatch.setitem(rows.ROW_CHUNK, "cpu", 8)
    statistics, weights = (
        plain_statistics(correlated_inputs(100, 40)),
        random_weights(30, 13, width=40),
    )

    def prune(gang):
        shares = rows.RowShares.of(weights, gang)
        mine, settings = shares.mine(weights), ALPS(type="alps", max_iterations=12)
        found = prune_group(mine, statistics, targets(0.5, 0.6), settings, shares)
        refined = swaps.Swaps(type="swaps")
        return refine_group(mine, found, statistics, targets(0.5, 0.6), settings, refined, shares)

    (whole,) = simulate(1, prune)
    for workers in (2, 3):
        parts = simulate(workers, prune)
        for number, expected in enumerate(whole):
            assert torch.equal(torch.cat([part[number] for part in parts]), expected)


def test_orthogonal_inputs_have_nothing_to_make_up_for():
    """The largest weights, as they are, would be best; the search comes near, and leaves what stays as it is."""
    x, (weight,) = torch.eye(24).repeat(2, 1), random_weights(10, width=24)
    (pruned,) = prune_group([weight], plain_statistics(x), targets(0.5), ALPS(type="alps"))
    torch.testing.assert_close(pruned, weight * (pruned != 0), rtol=1e-4, atol=1e-6)
    best = weight * (weight.abs() > weight.abs().flatten().kthvalue(120).values)
    assert relative_error(weight, pruned, x) < 1.01 * relative_error(weight, best, x)


@pytest.mark.parametrize("per_row", [False, True])
def test_counts(per_row):
    x, weights = correlated_inputs(300, 64), random_weights(30, 7, width=64)
    settings = ALPS(type="alps", per_row=per_row)
    pruned = prune_group(weights, plain_statistics(x), targets(0.5, 0.75), settings)
    for part, sparsity in zip(pruned, (0.5, 0.75), strict=True):
        assert (part == 0).sum() == part.numel() * sparsity
        assert bool(((part == 0).sum(1) == 64 * sparsity).all()) == per_row


def test_a_gram_that_is_not_positive_definite_raises():
    gram = torch.full((8, 8), 3.0)
    gram.diagonal().fill_(1.0)  # no sum of squares at all, but what rounding could make of one
    statistics = Statistics(10, gram.diagonal().clone(), gram)
    weights = random_weights(6, width=8)
    with pytest.raises(NotPositiveDefinite, match=r"with damping 0\.01$"):
        prune_group(weights, statistics, targets(0.5), ALPS(type="alps"))
    prune_group(weights, statistics, targets(0.5), ALPS(type="alps", damping=10.0))
