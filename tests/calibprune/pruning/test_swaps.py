import pytest
import torch

from calibprune.config import prune as config
from calibprune.pruning import rows, swaps
from calibprune.pruning.methods import METHODS, prune_group, refine_group
from tests.calibprune.pruning.data import (
    correlated_inputs,
    plain_statistics,
    random_weights,
    relative_error,
    targets,
)

SWAPS = config.Swaps(type="swaps")
METHODS_TO_START_FROM = [
    settings(type=name)
    for settings, name in (
        (config.Magnitude, "magnitude"),
        (config.Wanda, "wanda"),
        (config.RIA, "ria"),
        (config.DSnoT, "dsnot"),
        (config.SparseGPT, "sparsegpt"),
        (config.ALPS, "alps"),
    )
]


@pytest.fixture(params=["compiled", "tensors", "tensors in pieces"])
def path(request, monkeypatch):
    """All ways of weighing the exchanges, on the CPU."""
    monkeypatch.setitem(rows.ROW_CHUNK, "cpu", 16)
    if request.param != "compiled":
        monkeypatch.setattr(swaps, "runs_compiled", lambda device: False)
    if request.param == "tensors in pieces":
        monkeypatch.setattr(swaps, "PAIRS_AT_ONCE", 1000)
    return request.param


def damping_of(x):
    return 0.01 * x.double().square().sum(0).mean()


def swapped(weights, statistics, wanted, method, settings=SWAPS):
    """What the method makes of the weights, refined."""
    start = prune_group(weights, statistics, wanted, method)
    return refine_group(weights, start, statistics, wanted, method, settings)


def best_exchange(w, v, x, out, group, updates):
    """(error, row) after the best exchange for weight `out`, every other one tried, from the inputs in float64.

    Where weights are updated, the error is what a ridge solution takes away of it, and may be less.
    """
    best, found = torch.inf, None
    for into in range(out - out % group, out - out % group + group):
        if v[into] != 0:
            continue
        tried = v.clone()
        tried[out], tried[into] = 0, 0
        column, left = x[:, into], x @ (w - tried)
        pull, damped = column @ left, column.square().sum() + damping_of(x)
        tried[into] = pull / damped if updates else w[into]
        error = (x @ (w - tried)).square().sum()
        if updates:
            assert error <= left.square().sum() - pull.square() / damped
            error = left.square().sum() - pull.square() / damped
        if error < best:
            best, found = error, tried
    return best, found


def reference(dense, pruned, x, group, max_swaps, updates):
    x, result = x.double(), pruned.double().clone()
    for w, v in zip(dense.double(), result, strict=True):
        least, made, before = swaps.MIN_GAIN * (x @ w).square().sum(), 0, -1
        while made > before:
            before, begun = made, (x @ (w - v)).square().sum()
            kept = v.nonzero().flatten().tolist()
            first = {p: best_exchange(w, v, x, p, group, updates)[0] for p in kept}
            for p in sorted(kept, key=lambda p: first[p])[:max_swaps]:
                if first[p] >= begun - least or made == max_swaps:
                    break
                error, row = best_exchange(w, v, x, p, group, updates)
                if error < (x @ (w - v)).square().sum() - least:
                    v[:], made = row, made + 1
    return result


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("updates", [False, True])
def test_equals_the_reference(group, updates, path):
    x = correlated_inputs(60, 16)
    (dense,) = random_weights(20, width=16)
    pattern = (2, 4) if group else None
    method = config.SparseGPT(type="sparsegpt") if updates else config.Magnitude(type="magnitude")
    statistics, wanted = plain_statistics(x), targets(0.5, n_of_m=pattern)
    (start,) = prune_group([dense], statistics, wanted, method)
    for max_swaps in (1, 3, 100):
        settings = SWAPS.model_copy(update={"max_swaps": max_swaps})
        (found,) = swapped([dense], statistics, wanted, method, settings)
        expected = reference(dense, start, x, group or 16, max_swaps, updates)
        assert torch.equal(found == 0, expected == 0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
        assert not torch.equal(found == 0, start == 0)


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("updates", [False, True])
def test_no_exchange_is_left_that_would_lower_the_error(group, updates, path):
    x, (dense,) = correlated_inputs(80, 24), random_weights(12, width=24)
    pattern = (4, 8) if group else None
    method = config.SparseGPT(type="sparsegpt") if updates else config.Wanda(type="wanda")
    (found,) = swapped([dense], plain_statistics(x), targets(0.5, n_of_m=pattern), method)
    x = x.double()
    for w, v in zip(dense.double(), found.double(), strict=True):
        least = 2 * swaps.MIN_GAIN * (x @ w).square().sum()
        error = (x @ (w - v)).square().sum()
        for p in v.nonzero().flatten().tolist():
            assert best_exchange(w, v, x, p, group or 24, updates)[0] > error - least


@pytest.mark.parametrize("method", METHODS_TO_START_FROM, ids=lambda m: m.type)
@pytest.mark.parametrize("pattern", [None, (2, 4), (5, 8)])
def test_every_method_gets_better_and_keeps_its_counts(method, pattern, path):
    x, weights = correlated_inputs(300, 64), random_weights(20, 9, width=64)
    statistics, wanted = plain_statistics(x), targets(0.6, 0.5, n_of_m=pattern)
    before = prune_group(weights, statistics, wanted, method)
    after = swapped(weights, statistics, wanted, method)
    for dense, start, end in zip(weights, before, after, strict=True):
        assert relative_error(dense, end, x) < relative_error(dense, start, x)
        assert torch.equal((end == 0).sum(1), (start == 0).sum(1))
        if pattern:
            assert ((end.reshape(-1, pattern[1]) != 0).sum(1) == pattern[0]).all()
        if not METHODS[type(method)].updates:
            assert torch.equal(end, dense * (end != 0)), "weights that stay are as they were"


@pytest.mark.parametrize("method", METHODS_TO_START_FROM[1:5:3], ids=lambda m: m.type)
def test_bounds_rule_out_no_exchange(method, monkeypatch):
    """Compiled code weighs what bounds leave of wide rows, tensor operations weigh everything."""
    x, (dense,) = correlated_inputs(300, 240), random_weights(24, width=240)
    x[:, 7] *= 50
    statistics, wanted = plain_statistics(x), targets(0.5)
    found = swapped([dense], statistics, wanted, method)
    monkeypatch.setattr(swaps, "runs_compiled", lambda device: False)
    expected = swapped([dense], statistics, wanted, method)
    assert torch.equal(found[0] == 0, expected[0] == 0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_best_there_is_stays():
    x, (dense,) = correlated_inputs(50, 8), random_weights(3, width=8)
    statistics, wanted = plain_statistics(x), targets(0.5)
    method = config.Wanda(type="wanda")
    (once,) = swapped([dense], statistics, wanted, method)
    again = swaps.refine(
        [dense], [once], statistics, wanted, SWAPS, rows.RowShares.of([dense]), None
    )
    assert torch.equal(once, again[0])


def test_inputs_that_are_always_zero(path):
    x, (dense,) = correlated_inputs(200, 32), random_weights(16, width=32)
    x[:, :10] = 0
    for method in METHODS_TO_START_FROM[:2]:
        (found,) = swapped([dense], plain_statistics(x), targets(0.5), method)
        assert found.isfinite().all()


@pytest.mark.parametrize("method", METHODS_TO_START_FROM[4:], ids=lambda m: m.type)
def test_inputs_that_are_nearly_always_zero_get_no_weights_beyond_measure(method, path):
    x, (dense,) = correlated_inputs(200, 32), random_weights(16, width=32)
    x[:, :12] *= 1e-6 * torch.rand(12, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 1e-6 * x[:, 20]
    statistics, wanted = plain_statistics(x), targets(0.5)
    (start,) = prune_group([dense], statistics, wanted, method)
    (found,) = swapped([dense], statistics, wanted, method)
    assert not torch.equal(found == 0, start == 0)
    assert found.abs().max() < 10 * start.abs().max()
    assert relative_error(dense, found, x) < relative_error(dense, start, x)
    (half,) = swapped([dense.half()], statistics, wanted, method)
    assert half.isfinite().all()
