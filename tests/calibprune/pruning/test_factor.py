import pytest
import torch

from calibprune.pruning import factor
from calibprune.pruning.factor import NotPositiveDefinite, inverse_factor
from tests.calibprune.pruning.data import correlated_inputs, plain_statistics
from tests.calibprune.simulated_gang import simulate


@pytest.mark.parametrize("block", [16, 30, 90, 256])
def test_equals_the_inverse_in_float64(monkeypatch, block):
    monkeypatch.setattr(factor, "NARROW_BLOCK", block)
    gram = plain_statistics(correlated_inputs(400, 90)).gram
    before = gram.clone()
    upper = inverse_factor(gram, 0.01).double()
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(90)
    assert torch.equal(gram, before)
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    torch.testing.assert_close(
        upper.T @ upper @ damped, torch.eye(90, dtype=torch.float64), rtol=0, atol=1e-3
    )
    exact = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert (upper - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("width", [64, 90, 200])
def test_any_number_of_workers_gets_the_same_bits(monkeypatch, width):
    monkeypatch.setattr(factor, "NARROW_BLOCK", 16)
    monkeypatch.setattr(factor, "MIN_DEALT", 70)
    gram = plain_statistics(correlated_inputs(400, width)).gram
    alone = inverse_factor(gram, 0.01)
    for size in (2, 3, 8):
        for upper in simulate(size, lambda gang: inverse_factor(gram, 0.01, gang)):
            assert torch.equal(upper, alone)


@pytest.mark.parametrize("place", [0, 17, 59])
def test_a_gram_that_is_not_positive_definite_raises_on_all_workers(monkeypatch, place):
    monkeypatch.setattr(factor, "NARROW_BLOCK", 16)
    monkeypatch.setattr(factor, "MIN_DEALT", 30)
    gram = torch.eye(60)
    gram[place, place] = -0.5

    def work(gang):
        with pytest.raises(NotPositiveDefinite, match=r"with damping 0\.01$"):
            inverse_factor(gram, 0.01, gang)
        return inverse_factor(gram, 1.0, gang)

    for upper in simulate(3, work):
        assert upper.isfinite().all()


def test_inputs_that_are_always_zero_do_not_matter():
    gram = plain_statistics(correlated_inputs(400, 40)).gram
    gram[7], gram[:, 7] = 0, 0
    upper = inverse_factor(gram, 0.01)
    others = torch.arange(40) != 7
    assert (upper[7, others] == 0).all() and (upper[others, 7] == 0).all()
