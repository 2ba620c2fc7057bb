import pytest
import torch

from calibprune.config.prune import RIA
from calibprune.pruning.methods import prune_group
from tests.calibprune.pruning.data import (
    correlated_inputs,
    plain_statistics,
    random_weights,
    targets,
)


def reference(weight, x, power, sparsity, n_of_m, per_row):
    """Computes the published score in float64 and removes the lowest scores in plain Python."""
    size = weight.double().abs()
    norms = x.double().square().sum(0).sqrt()
    scores = (size / size.sum(0) + size / size.sum(1)[:, None]) * norms**power
    keep = torch.ones_like(weight, dtype=torch.bool)
    rows, width = weight.shape
    if n_of_m:
        kept, group = n_of_m
        for i in range(rows):
            for start in range(0, width, group):
                order = sorted(range(start, start + group), key=lambda j: scores[i, j].item())
                keep[i, order[: group - kept]] = False
    elif per_row:
        for i in range(rows):
            keep[i, scores[i].argsort()[: int(width * sparsity)]] = False
    else:
        keep.view(-1)[scores.flatten().argsort()[: int(rows * width * sparsity)]] = False
    return weight * keep


@pytest.mark.parametrize("n_of_m", [None, (2, 4), (4, 8)])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("power", [0.5, 1.0, 0.0])
def test_equals_the_reference(n_of_m, per_row, power):
    x = correlated_inputs(400, 96)
    weights = random_weights(140, 9, width=96)
    settings = RIA(type="ria", power=power, per_row=per_row)
    wanted = targets(0.5, 0.7, n_of_m=n_of_m)
    pruned = prune_group(weights, plain_statistics(x), wanted, settings)
    for weight, target, found in zip(weights, wanted, pruned, strict=True):
        expected = reference(weight, x, power, target.sparsity, n_of_m, per_row)
        assert torch.equal(found, expected)
