import itertools
import math

import pytest
import torch

from calibprune import events
from calibprune.config import prune as config
from calibprune.pruning import alps, swaps
from calibprune.pruning.masks import Target
from calibprune.pruning.methods import need_of, prune_group, refine_group
from calibprune.pruning.statistics import Statistics
from tests.calibprune.pruning.data import (
    correlated_inputs,
    plain_statistics,
    random_weights,
    relative_error,
    targets,
)

MAGNITUDE = config.Magnitude(type="magnitude")
WANDA = config.Wanda(type="wanda")
SPARSEGPT = config.SparseGPT(type="sparsegpt")
RIA = config.RIA(type="ria")
DSNOT = config.DSnoT(type="dsnot")
ALPS = config.ALPS(type="alps")
SWAPS = config.Swaps(type="swaps")
EVERY_METHOD = (MAGNITUDE, WANDA, RIA, DSNOT, SPARSEGPT, ALPS)


def lowest_in(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda j: (scores[j], j))[:count])


def reference(weight, column_norms, sparsity, n_of_m, per_row):
    """Scores |W_ij| * norm_j in float64, compared in plain Python."""
    rows, width = weight.shape
    scores = [
        [abs(w) * n for w, n in zip(row, column_norms, strict=True)] for row in weight.tolist()
    ]
    pruned = weight.clone()
    if n_of_m:
        kept, group = n_of_m
        for i, start in itertools.product(range(rows), range(0, width, group)):
            for j in lowest_in(scores[i][start : start + group], group - kept):
                pruned[i, start + j] = 0
    elif per_row:
        for i in range(rows):
            for j in lowest_in(scores[i], int(width * sparsity)):
                pruned[i, j] = 0
    else:
        by_column = [scores[i][j] for j in range(width) for i in range(rows)]
        for place in lowest_in(by_column, int(rows * width * sparsity)):
            pruned[place % rows, place // rows] = 0
    return pruned


@pytest.mark.parametrize("n_of_m", [None, (2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_and_wanda_equal_the_reference(n_of_m, dtype):
    x = correlated_inputs(300, 48)
    x[:, 5] = 0
    weights = [weight.to(dtype) for weight in random_weights(20, 7, width=48)]
    weights[0][3] = 0.25  # a row of ties
    statistics = plain_statistics(x)
    sparsities = [0.5, 0.7]
    for settings, norms, per_row in (
        (MAGNITUDE, [1.0] * 48, False),
        (WANDA, x.double().square().sum(0).sqrt().tolist(), True),
    ):
        result = prune_group(weights, statistics, targets(*sparsities, n_of_m=n_of_m), settings)
        for weight, sparsity, pruned in zip(weights, sparsities, result, strict=True):
            expected = reference(weight, norms, sparsity, n_of_m, per_row)
            assert pruned.dtype == dtype
            assert torch.equal(pruned, expected)


def test_statistics_that_a_method_does_not_need_may_be_missing():
    weights = random_weights(6, width=8)
    nothing = Statistics(10, None, None)
    prune_group(weights, nothing, targets(0.5), MAGNITUDE)
    with pytest.raises(ValueError, match="sums of squares"):
        prune_group(weights, nothing, targets(0.5), WANDA)
    with pytest.raises(ValueError, match="Gram"):
        prune_group(weights, nothing, targets(0.5), SPARSEGPT)
    for settings, needed in ((RIA, "sums of squares"), (DSNOT, "sums"), (ALPS, "Gram")):
        with pytest.raises(ValueError, match=needed):
            prune_group(weights, nothing, targets(0.5), settings)
    with pytest.raises(ValueError, match="Gram"):
        refine_group(weights, weights, nothing, targets(0.5), MAGNITUDE, SWAPS)


def test_the_sums_that_a_method_and_its_refinement_read():
    def need(method, refine=None):
        return need_of(config.PruneSettings(method=method, refine=refine))

    assert [need(method) for method in EVERY_METHOD] == [
        set(), {"sum_squares"}, {"sum_squares"}, {"sum_squares", "sums"}, {"gram"}, {"gram"}
    ]  # fmt: skip
    assert need(DSNOT, SWAPS) == {"sum_squares", "sums", "gram"}


@pytest.mark.parametrize("n_of_m", [None, (2, 4)])
@pytest.mark.parametrize("settings", EVERY_METHOD)
def test_arguments_stay_and_dtypes_too(settings, n_of_m):
    statistics = plain_statistics(correlated_inputs(200, 40))
    weights = random_weights(10, 6, 4, width=40)
    weights = [
        w.to(d)
        for w, d in zip(weights, (torch.float32, torch.bfloat16, torch.float16), strict=True)
    ]
    before = [weight.clone() for weight in weights]
    gram, squares = statistics.gram.clone(), statistics.sum_squares.clone()
    result = prune_group(weights, statistics, targets(0.5, 0.5, 0.25, n_of_m=n_of_m), settings)
    assert [r.dtype for r in result] == [w.dtype for w in weights]
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert torch.equal(gram, statistics.gram)
    assert torch.equal(squares, statistics.sum_squares)
    for pruned, sparsity in zip(result, (0.5, 0.5, 0.25), strict=True):
        removed = (pruned == 0).sum().item()
        assert removed == int(pruned.numel() * (0.5 if n_of_m else sparsity))
    storages = {r.untyped_storage().data_ptr() for r in [*result, *weights]}
    assert len(storages) == len(result) + len(weights)


@pytest.mark.parametrize("n_of_m", [None, (2, 4), (4, 8)])
def test_output_error_falls_from_magnitude_to_wanda_to_sparsegpt_to_alps(n_of_m):
    for seed in range(3):
        x = correlated_inputs(600, 96, seed)
        weights = random_weights(64, width=96, seed=seed)
        errors = [
            relative_error(
                weights[0],
                prune_group(weights, plain_statistics(x), targets(0.5, n_of_m=n_of_m), m)[0],
                x,
            )
            for m in (MAGNITUDE, WANDA, SPARSEGPT, ALPS)
        ]
        assert errors[0] > errors[1] > errors[2] > errors[3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_raise(value):
    weights = random_weights(6, 6, width=8)
    weights[1][2, 3] = value
    with pytest.raises(ValueError, match="linear 1"):
        prune_group(weights, plain_statistics(correlated_inputs(20, 8)), targets(0.5, 0.5), WANDA)


def test_pruned_weights_that_do_not_fit_their_dtype_raise():
    x = correlated_inputs(300, 1) + 1e-3 * correlated_inputs(300, 8)
    weights = random_weights(6, 6, width=8)
    weights[1] = (weights[1].sign() * 6e4).half()
    with pytest.raises(
        ValueError, match=r"pruned weights of linear 1 .* not finite in torch.float16"
    ):
        prune_group(weights, plain_statistics(x), targets(0.5, 0.5), SPARSEGPT)


@pytest.mark.parametrize("settings", EVERY_METHOD)
def test_a_width_that_does_not_fit_the_pattern_raises(settings):
    statistics = plain_statistics(correlated_inputs(100, 30))
    with pytest.raises(ValueError, match="30"):
        prune_group(random_weights(6, width=30), statistics, targets(0.5, n_of_m=(2, 4)), settings)


@pytest.mark.parametrize("settings", EVERY_METHOD)
@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("dead", [[0, 1, 17], [0, 1, 2, 17]])
def test_inputs_that_are_always_zero_and_rows_of_zeros(settings, pattern, dead):
    x = correlated_inputs(200, 64)
    x[:, dead] = 0
    (weight,) = random_weights(16, width=64)
    weight[3] = 0
    (pruned,) = prune_group([weight], plain_statistics(x), targets(0.5, n_of_m=pattern), settings)
    assert pruned.isfinite().all()
    by_row = pattern or settings in (
        WANDA,
        DSNOT,
    )  # otherwise the row of zeros would be among the removed half
    removed = 15 * 32 + 64 if by_row else 16 * 32
    if settings is SPARSEGPT:
        assert (pruned[:, dead] == 0).all()
        if pattern and dead == [0, 1, 2, 17]:  # three of a group from which two are removed
            removed += 15
    assert (pruned == 0).sum().item() == removed
    assert relative_error(weight, pruned, x) < 1


@pytest.mark.parametrize("settings", [m for m in EVERY_METHOD if m is not MAGNITUDE])
def test_widths_and_rows_of_any_size(settings):
    """Tries rows shorter than a block, a single row, and widths that are no multiple of anything."""
    for rows, width in ((1, 5), (3, 131), (130, 7)):
        statistics = plain_statistics(correlated_inputs(3 * width, width))
        (pruned,) = prune_group(
            random_weights(rows, width=width), statistics, targets(0.5), settings
        )
        assert pruned.shape == (rows, width)
        assert abs((pruned == 0).sum().item() - rows * width / 2) <= rows


@pytest.mark.parametrize("settings", EVERY_METHOD)
def test_a_different_n_of_the_same_m_for_every_linear(settings):
    weights = random_weights(12, 9, width=48)
    wanted = [Target(1 / 4, (6, 8)), Target(5 / 8, (3, 8))]
    pruned = prune_group(weights, plain_statistics(correlated_inputs(200, 48)), wanted, settings)
    for part, kept in zip(pruned, (6, 3), strict=True):
        assert ((part.reshape(-1, 8) != 0).sum(1) == kept).all()


@pytest.mark.parametrize("settings", EVERY_METHOD)
def test_nothing_to_remove(settings):
    weights = random_weights(12, width=48)
    (pruned,) = prune_group(
        weights, plain_statistics(correlated_inputs(200, 48)), targets(0.0), settings
    )
    torch.testing.assert_close(pruned, weights[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_long_solves_show_life(compiled, heard, monkeypatch):
    """A hang is what shows none for minutes: swaps tick with every few rows, ALPS with every iteration."""
    monkeypatch.setattr(events, "TICK_SECONDS", 0.0)
    if not compiled:
        for module in (swaps, alps):
            monkeypatch.setattr(module, "runs_compiled", lambda device: False)
    weights = random_weights(30, width=32)
    statistics, wanted = plain_statistics(correlated_inputs(100, 32)), targets(0.5)
    method = ALPS.model_copy(update={"max_iterations": 4, "refit_iterations": 3})
    pruned = prune_group(weights, statistics, wanted, method)
    of_alps = heard.events.count(events.Tick())
    assert of_alps >= 4
    refine_group(weights, pruned, statistics, wanted, method, SWAPS)
    assert heard.events.count(events.Tick()) > of_alps


def test_ticks_are_few(heard):
    before = len(heard.events)
    for _ in range(100):
        events.show_life()
    assert len(heard.events) - before <= 1
