import numpy as np
import pytest
import torch

from calibprune.config.prune import DSnoT, Wanda
from calibprune.pruning.masks import Target
from calibprune.pruning.methods import prune_group
from calibprune.pruning.statistics import Statistics
from tests.calibprune.pruning.data import correlated_inputs, random_weights

SEQUENCES, LENGTH, WIDTH = 8, 50, 48


def inputs(seed: int = 0) -> torch.Tensor:
    """Makes inputs with means far from zero, as they are after an activation function."""
    x = correlated_inputs(SEQUENCES * LENGTH, WIDTH, seed)
    return x + 0.3 * x.std(0) * torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))


def statistics_of(x: torch.Tensor) -> Statistics:
    x = x.double()
    squares, sums = x.square().sum(0).float(), x.sum(0).float()
    return Statistics(len(x), squares, None, sums, x.var(0, unbiased=False).float(), SEQUENCES)


def reference(weight, x, settings, sparsity, n_of_m):
    """Computes the mask row by row in float64, with the published code's two queues as sorted lists."""
    x, w = x.double().numpy(), weight.double().numpy()
    mean, variance = x.mean(0), x.var(0)
    expected = x.sum(0) / SEQUENCES if settings.faithful else mean
    wanda = np.abs(w) * np.sqrt((x**2).sum(0))
    initial = wanda if settings.initial == "wanda" else np.abs(w)
    kept_mask = np.ones(w.shape, bool)
    for i in range(len(w)):
        keep = kept_mask[i]
        if n_of_m:
            kept, group = n_of_m
            for start in range(0, WIDTH, group):
                order = start + np.argsort(initial[i, start : start + group])
                keep[order[: group - kept]] = False
        else:
            keep[np.argsort(initial[i])[: int(WIDTH * sparsity)]] = False
        adds = w[i] * expected
        error = adds[~keep].sum()
        sign = np.sign(error)
        grow = sorted(np.flatnonzero(~keep), key=lambda j: adds[j] / variance[j])
        go = sorted(np.flatnonzero(keep), key=lambda j: wanda[i, j])
        positive, negative = [j for j in go if adds[j] > 0], [j for j in go if adds[j] < 0]
        used = set()
        for _ in range(settings.max_swaps):
            back = grow.pop(-1 if error > 0 else 0) if grow else None
            if back is None or adds[back] * error <= 0:
                break
            if n_of_m:
                start = back - back % n_of_m[1]
                free = [j for j in range(start, start + n_of_m[1]) if j in set(go) - used]
                out = min(free, key=lambda j: initial[i, j], default=None)
            else:
                queue = positive if error < 0 else negative
                out = queue.pop(0) if queue else None
            if out is None:
                break
            after = error + adds[out] - adds[back]
            if settings.faithful:
                wanted = abs(error) > settings.threshold
                wanted &= not n_of_m or np.sign(after) == sign
            else:
                wanted = abs(after) < abs(error)
            if not wanted:
                break
            keep[back], keep[out] = True, False
            used |= {back, out}
            error = after
    return weight * torch.from_numpy(kept_mask)


@pytest.mark.parametrize("n_of_m", [None, (2, 4), (4, 8)])
@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("initial", ["wanda", "magnitude"])
def test_equals_the_reference(n_of_m, faithful, initial):
    x, weights = inputs(), random_weights(140, 9, width=WIDTH)
    settings = DSnoT(type="dsnot", faithful=faithful, initial=initial)
    wanted = [Target(0.5, n_of_m, "self_attn.q_proj"), Target(0.75, n_of_m, "self_attn.k_proj")]
    pruned = prune_group(weights, statistics_of(x), wanted, settings)
    for weight, target, found in zip(weights, wanted, pruned, strict=True):
        expected = reference(weight, x, settings, target.sparsity, n_of_m)
        assert torch.equal(found, expected)
        start = prune_group([weight], statistics_of(x), [target], settings.model_copy(
            update={"max_swaps": 1, "threshold": 1e9, "faithful": True}))[0]  # fmt: skip
        assert not torch.equal(found, start), "nothing was exchanged"


@pytest.mark.parametrize("n_of_m", [None, (2, 4)])
def test_the_expected_output_error_falls_in_every_row(n_of_m):
    x, (weight,) = inputs(), random_weights(60, width=WIDTH)
    mean = x.double().mean(0)
    settings, target = DSnoT(type="dsnot"), Target(0.5, n_of_m)

    def errors(max_swaps):
        changed = settings.model_copy(update={"max_swaps": max_swaps})
        changed = changed if max_swaps else Wanda(type="wanda")
        (pruned,) = prune_group([weight], statistics_of(x), [target], changed)
        assert ((pruned == 0).sum(1) == WIDTH // 2).all()
        return ((weight - pruned).double() @ mean).abs()

    begun, after_one, ended = errors(0), errors(1), errors(50)
    assert (after_one <= begun + 1e-9).all() and (ended <= after_one + 1e-9).all()
    assert ended.sum() < (0.6 if n_of_m else 0.3) * begun.sum()


def test_published_the_mlp_stays_as_it_starts():
    x, weights = inputs(), random_weights(20, width=WIDTH)
    settings = DSnoT(type="dsnot", faithful=True)
    attention, mlp = (
        prune_group(weights, statistics_of(x), [Target(0.5, None, path)], settings)[0]
        for path in ("self_attn.q_proj", "mlp.up_proj")
    )
    assert not torch.equal(attention, mlp)
    wanda = (weights[0].abs() * x.square().sum(0).sqrt()).argsort(1)[:, : WIDTH // 2]
    assert (mlp.gather(1, wanda) == 0).all()
