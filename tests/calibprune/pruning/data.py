"""Makes inputs with correlated columns, like real ones, and computes statistics directly in float64."""

import torch
from torch import Tensor

from calibprune.pruning.masks import Target
from calibprune.pruning.statistics import Statistics


def correlated_inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Mixes columns of very different sizes with one another."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(tokens, max(2, width // 4), generator=generator)
    mixing = torch.randn(max(2, width // 4), width, generator=generator)
    sizes = torch.exp(torch.randn(width, generator=generator))
    noise = torch.randn(tokens, width, generator=generator)
    return (factors @ mixing * 0.5 + noise) * sizes


def random_weights(*rows: int, width: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(out, width, generator=generator) * 0.05 for out in rows]


def plain_statistics(inputs: Tensor) -> Statistics:
    x = inputs.double()
    gram = (x.T @ x).float()
    variance = x.var(0, unbiased=False).float()
    return Statistics(len(x), gram.diagonal().clone(), gram, x.sum(0).float(), variance)


def targets(*sparsities: float, n_of_m: tuple[int, int] | None = None) -> list[Target]:
    return [Target(sparsity, n_of_m) for sparsity in sparsities]


def relative_error(weight: Tensor, pruned: Tensor, inputs: Tensor) -> float:
    x = inputs.double()
    return ((x @ (weight - pruned).double().T).norm() / (x @ weight.double().T).norm()).item()
