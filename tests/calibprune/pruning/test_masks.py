import numpy as np
import pytest
import torch

from calibprune.pruning import masks
from calibprune.pruning.masks import (
    Target,
    _keep_n_of_m_torch,
    _nth_lowest,
    keep_all_but_lowest,
    keep_all_but_lowest_of_matrices,
    keep_all_but_lowest_of_rows,
    keep_in_matrices,
    keep_n_of_m,
    zeroed,
)
from calibprune.pruning.rows import RowShares
from tests.calibprune.simulated_gang import simulate


def scores_with_ties(rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * width)
    return torch.randint(0, 5, (rows, width), generator=generator).float()


def reference_rows(scores: torch.Tensor, removed: int) -> torch.Tensor:
    keep = torch.ones_like(scores, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        for _, column in sorted((value, j) for j, value in enumerate(row))[:removed]:
            keep[i, column] = False
    return keep


def reference_matrix(scores: torch.Tensor, removed: int) -> torch.Tensor:
    keep = torch.ones_like(scores, dtype=torch.bool)
    places = sorted(
        (value, j, i) for i, row in enumerate(scores.tolist()) for j, value in enumerate(row)
    )
    for _, j, i in places[:removed]:
        keep[i, j] = False
    return keep


def reference_groups(scores: torch.Tensor, kept: int, group: int) -> torch.Tensor:
    return reference_rows(scores.reshape(-1, group), group - kept).reshape(scores.shape)


@pytest.mark.parametrize("sparsity", [0.0, 0.04, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (13, 50), (40, 64)])
@pytest.mark.parametrize("ties", [True, False])
def test_counts_and_choice(shape, sparsity, ties):
    scores = scores_with_ties(*shape) if ties else torch.rand(shape)
    per_row, per_matrix = int(shape[1] * sparsity), int(shape[0] * shape[1] * sparsity)
    keep = keep_all_but_lowest_of_rows(scores, per_row)
    assert torch.equal(keep, reference_rows(scores, per_row))
    keep = keep_all_but_lowest(scores, per_matrix)
    assert torch.equal(keep, reference_matrix(scores, per_matrix))


@pytest.mark.parametrize("removed", [0, 1, 57, 119, 120])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_scores_equal(removed, value):
    scores = torch.full((10, 12), value)
    keep = keep_all_but_lowest(scores, removed)
    assert torch.equal(keep, reference_matrix(scores, removed))


def test_impossible_counts_raise():
    for removed in (-1, 121):
        with pytest.raises(ValueError, match="120"):
            keep_all_but_lowest(torch.zeros(10, 12), removed)


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4), (3, 8), (5, 6)])
@pytest.mark.parametrize("ties", [True, False])
def test_n_of_m(kept, group, ties):
    scores = scores_with_ties(11, 120) if ties else torch.rand(11, 120)
    keep = keep_n_of_m(scores, kept, group)
    assert (keep.reshape(-1, group).sum(1) == kept).all()
    assert torch.equal(keep, reference_groups(scores, kept, group))
    assert torch.equal(keep, _keep_n_of_m_torch(scores, kept, group))


def test_n_of_m_of_columns_not_stored_in_order():
    scores = torch.rand(24, 10)
    assert torch.equal(keep_n_of_m(scores.T, 2, 4), keep_n_of_m(scores.T.contiguous(), 2, 4))


def test_n_of_m_names_the_width_that_does_not_fit():
    with pytest.raises(ValueError, match="not 30"):
        keep_n_of_m(torch.rand(3, 30), 2, 4)


def test_half_precision_scores():
    scores = torch.rand(30, 40).bfloat16()
    assert torch.equal(keep_all_but_lowest_of_rows(scores, 20), reference_rows(scores.float(), 20))


def test_threshold_is_an_order_statistic():
    scores = scores_with_ties(7, 33)
    for n in (1, 16, 33):
        expected = np.sort(scores.numpy(), axis=1)[:, n - 1]
        assert (_nth_lowest(scores, n).numpy() == expected).all()


def test_scores_are_not_modified():
    scores = torch.rand(20, 40)
    before = scores.clone()
    keep_all_but_lowest_of_rows(scores, scores.shape[1] // 2)
    keep_all_but_lowest(scores, 400)
    keep_n_of_m(scores, 2, 4)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_matrices_of_which_every_worker_has_some_rows(monkeypatch, size, compiled):
    """With ties all over, across workers too, and workers without a row of some matrix."""
    monkeypatch.setattr(masks, "runs_compiled", lambda device: compiled)
    monkeypatch.setattr(masks, "GPU_SCORES_AT_ONCE", 100)
    whole = [
        scores_with_ties(40, 12), torch.rand(33, 12), torch.zeros(20, 12), torch.rand(7, 12) * 1e-42,
    ]  # fmt: skip
    removed = [311, 100, 77, 0]

    def work(gang):
        shares = RowShares(tuple(map(len, whole)), 8, gang)
        return keep_all_but_lowest_of_matrices(shares.mine(whole), removed, gang)

    for keeps in zip(*simulate(size, work), whole, removed, strict=True):
        *parts, scores, count = keeps
        assert torch.equal(torch.cat(parts), reference_matrix(scores, count))


def test_matrices_and_patterns_side_by_side():
    whole = [torch.rand(16, 12), torch.rand(8, 12), torch.rand(24, 12)]
    wanted = [Target(0.3), Target(0.5, (2, 4)), Target(0.7)]

    def work(gang):
        shares = RowShares(tuple(map(len, whole)), 8, gang)
        return keep_in_matrices(shares.mine(whole), wanted, shares)

    first, pattern, last = map(torch.cat, zip(*simulate(2, work), strict=True))
    assert torch.equal(first, reference_matrix(whole[0], 57))
    assert torch.equal(pattern, reference_groups(whole[1], 2, 4))
    assert torch.equal(last, reference_matrix(whole[2], 201))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_zeroed_leaves_the_bits_of_what_stays(dtype):
    weight, keep = torch.randn(9, 14).to(dtype), torch.rand(9, 14) > 0.5
    found = zeroed(weight, keep)
    assert torch.equal(found, weight.masked_fill(~keep, 0))
    assert not found[~keep].signbit().any()
