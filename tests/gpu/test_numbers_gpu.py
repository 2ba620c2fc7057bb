"""Statistics, masks and kernels on a GPU against the same on the CPU or in float64."""

import pytest
import torch

from calibprune.config.prune import SparseGPT
from calibprune.gang import ALONE
from calibprune.pruning import masks, sparsegpt
from calibprune.pruning.layer import Clock, gathered_statistics
from calibprune.pruning.masks import Target
from calibprune.pruning.statistics import (
    column_squares,
    finish,
    magnitude_bound,
    observe,
)

GRAM = frozenset({"gram"})


@pytest.fixture(scope="module")
def inputs(device: torch.device) -> list[torch.Tensor]:
    """Micro-batches in bfloat16 with a few inputs of massive activations."""
    width, tokens = (4096, 2048) if device.type == "cuda" else (96, 64)
    generator = torch.Generator(device).manual_seed(0)
    batches = torch.randn(3, 2, tokens, width, device=device, generator=generator)
    batches[..., :: width // 7] *= 300
    return list(batches.bfloat16())


def gram_of(inputs: list[torch.Tensor]) -> torch.Tensor:
    statistics = gathered_statistics(inputs, GRAM, ALONE, len(inputs), Clock())
    assert statistics.gram is not None
    return statistics.gram


def test_gram_matrices_are_near_those_in_float64_and_repeat_to_the_bit(
    inputs: list[torch.Tensor],
):
    gram = gram_of(inputs)
    tokens = torch.cat([batch.flatten(0, 1) for batch in inputs]).double()
    norms = tokens.square().sum(0).sqrt()
    error = (gram.double() - tokens.T @ tokens) / (norms[:, None] * norms)
    assert error.abs().max() < 1e-4
    moved = [
        torch.empty(batch.numel() + 64, dtype=batch.dtype, device=batch.device)[64:]
        .view_as(batch)
        .copy_(batch)
        for batch in inputs
    ]
    assert torch.equal(gram_of(moved), gram)


def test_sums_do_not_depend_on_who_adds_them_up(inputs: list[torch.Tensor]):
    squares = column_squares(inputs, GRAM)
    bound = magnitude_bound(squares)
    whole = observe(inputs, squares, GRAM, bound, len(inputs))
    parts = [
        observe([batch], [of_batch], GRAM, bound, len(inputs))
        for batch, of_batch in zip(inputs, squares, strict=True)
    ]
    added = sum(part.gram for part in reversed(parts))
    assert torch.equal(added.tril(), whole.gram.tril())
    assert torch.equal(finish(whole).gram, finish(whole).gram.T)


def test_masks_are_those_of_the_cpu(device: torch.device):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(512, 1024, generator=generator)
    ties = (scores * 50).round()
    for here in (scores, ties):
        there = here.to(device)
        for keep in (
            lambda s: masks.keep_all_but_lowest(s, s.numel() * 2 // 5),
            lambda s: masks.keep_all_but_lowest_of_rows(s, s.shape[1] * 3 // 5),
            lambda s: masks.keep_n_of_m(s, 2, 4),
        ):
            assert torch.equal(keep(there).cpu(), keep(here))


@pytest.mark.parametrize("n_of_m", [None, (2, 4), (4, 8)])
def test_sparsegpt_on_a_gpu_is_near_that_of_the_cpu(
    n_of_m: tuple[int, int] | None, device: torch.device, inputs: list[torch.Tensor]
):
    """Near, since sums are rounded otherwise: nearly all zeros are the same, and so is the output error."""
    statistics = gathered_statistics(inputs, GRAM, ALONE, len(inputs), Clock())
    on_cpu = gathered_statistics([b.cpu() for b in inputs], GRAM, ALONE, len(inputs), Clock())
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(256, inputs[0].shape[-1], generator=generator)
    settings, target = SparseGPT(type="sparsegpt"), [Target(0.5, n_of_m)]
    (there,) = sparsegpt.prune([weight.to(device)], statistics, target, settings)
    (here,) = sparsegpt.prune([weight], on_cpu, target, settings)
    assert ((there.cpu() == 0) == (here == 0)).float().mean() > 0.995
    gram = on_cpu.gram.double()
    changes = [(pruned - weight).double() for pruned in (there.cpu(), here)]
    errors = [((change @ gram) * change).sum().item() for change in changes]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
