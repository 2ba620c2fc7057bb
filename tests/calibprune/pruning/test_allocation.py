import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from calibprune.config.model import ModelSettings
from calibprune.config.prune import OWL, PruneSettings
from calibprune.errors import UserError
from calibprune.events import LayerEntered, result_of
from calibprune.gang import ALONE
from calibprune.model import build_skeleton
from calibprune.pruning.allocation import (
    alpha_pruning,
    check_allocation,
    describe_summary,
    deviation_message,
    owl,
    share_out,
    summary,
)
from calibprune.pruning.alphapruning import eigenvalues, tail_exponent, tail_exponents
from calibprune.pruning.owl import layer_outliers
from tests.calibprune.pruning.data import correlated_inputs, random_weights

LAYER = {"q": (48, 48), "k": (16, 48), "up": (130, 48), "down": (48, 130)}
EQUAL = [LAYER] * 6
UNEQUAL = [LAYER, LAYER, {"q": (48, 48)}, {}, LAYER, {"up": (500, 48), "down": (48, 130)}]


def settings(**changes) -> PruneSettings:
    return PruneSettings.model_validate(changes)


def scores_for(shapes, per="layer", seed=0):
    generator = np.random.default_rng(seed)
    if per == "linear":
        return [{path: generator.uniform(1, 9) for path in layer} for layer in shapes]
    return [dict.fromkeys(layer, generator.uniform(1, 9)) for layer in shapes]


def mean_sparsity(targets, shapes):
    sizes = [
        (math.prod(shape), layer[path].sparsity)
        for layer, of in zip(targets, shapes, strict=True)
        for path, shape in of.items()
    ]
    return sum(size * value for size, value in sizes) / sum(size for size, _ in sizes)


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.33])
@pytest.mark.parametrize("shapes", [EQUAL, UNEQUAL])
@pytest.mark.parametrize(
    "allocation",
    [
        {"type": "uniform"}, {"type": "owl"}, {"type": "owl", "per": "linear", "lam": 0.15},
        {"type": "alphapruning"}, {"type": "alphapruning", "per": "linear"},
    ],
)  # fmt: skip
def test_the_mean_over_parameters_is_what_was_asked(allocation, shapes, sparsity):
    wanted = settings(sparsity=sparsity, allocation=allocation)
    scores = scores_for(shapes, allocation.get("per", "layer"))
    targets = share_out(wanted, shapes, scores)
    # one row's weight in the last linear is as near as whole weights come
    assert mean_sparsity(targets, shapes) == pytest.approx(sparsity, abs=5e-3)
    big = [{path: (rows * 40, width * 8) for path, (rows, width) in layer.items()} for layer in shapes * 5]  # fmt: skip
    targets = share_out(wanted, big, scores * 5)
    assert mean_sparsity(targets, big) == pytest.approx(sparsity, abs=1e-4)
    for layer, sizes in zip(targets, big, strict=True):
        for path, target in layer.items():
            assert (target.sparsity * sizes[path][1]) == pytest.approx(
                round(target.sparsity * sizes[path][1])
            )


def test_owl_is_the_published_formula():
    ratios = [3.1, 0.4, 7.7, 5.0, 1.1, 2.2]
    lam, sparsity = 0.08, 0.7
    published = np.array(ratios)
    published = (published - published.min()) * (1 / (published.max() - published.min()) * lam * 2)
    published = published - np.mean(published) + (1 - sparsity)
    found = owl([dict.fromkeys(LAYER, ratio) for ratio in ratios], EQUAL, sparsity, lam)
    for layer, density in zip(found, published, strict=True):
        assert all(abs(1 - value - density) < 1e-6 for value in layer.values())


def test_alpha_pruning_is_the_published_formula():
    metrics = np.repeat([3.1, 2.4, 4.7, 5.0, 2.1, 2.2], len(LAYER))
    sizes = np.array([math.prod(shape) for shape in LAYER.values()] * 6)
    ratios = (metrics - metrics.min()) / (metrics.max() - metrics.min()) * 0.6 + 0.7
    published = ratios * sizes.sum() * 0.6 / (sizes * ratios).sum()
    scores = [dict.fromkeys(LAYER, m) for m in metrics[:: len(LAYER)]]
    found = alpha_pruning(scores, EQUAL, 0.6, 0.3)
    flat = [value for layer in found for value in layer.values()]
    assert np.allclose(flat, published, atol=1e-9)


@pytest.mark.parametrize("per", ["layer", "linear"])
def test_outliers_are_counted_as_published(per):
    x = correlated_inputs(200, 48)
    weights = dict(zip("qku", random_weights(40, 8, 60, width=48), strict=True))
    squares = {path: x.square().sum(0) for path in weights}
    found = layer_outliers(weights, squares, OWL(type="owl", m=3, per=per))
    metric = {p: w.double().abs() * x.double().square().sum(0).sqrt() for p, w in weights.items()}
    everything = torch.cat([m.flatten() for m in metric.values()])
    for path in weights:
        of = everything if per == "layer" else metric[path].flatten()
        assert found[path] == pytest.approx(((of > 3 * of.mean()).sum() / of.numel() * 100).item())
        assert 0 < found[path] < 50


def published_exponent(matrix: torch.Tensor) -> float:
    """Fits the exponent as the published code does with `xmin_peak`, one candidate after another."""
    eigs = torch.linalg.svdvals(matrix).square().double().sort().values
    logs, count = eigs.log(), len(eigs)
    log10 = eigs.log10().float()
    counts = torch.histc(log10, 100, min=log10.min().item(), max=log10.max().item())
    peak = (
        10 ** torch.linspace(log10.min().item(), log10.max().item(), 101)[counts.argmax()].double()
    )
    alphas, distances = torch.zeros(count - 1).double(), torch.ones(count - 1).double()
    for i, xmin in enumerate(eigs[:-1]):
        if xmin < torch.log10(0.95 * peak):
            continue
        if xmin > 1.5 * peak:
            break
        n = float(count - i)
        alphas[i] = alpha = 1 + n / (logs[i:].sum() - n * logs[i])
        if alpha > 1:
            model = 1 - (eigs[i:] / xmin) ** (-alpha + 1)
            distances[i] = (model - torch.arange(n) / n).abs().max()
    return alphas[distances.argmin()].item()


def test_the_exponent_of_a_spectrum_is_the_published_one():
    for seed, power in enumerate((1.0, 1.5, 3.0)):
        generator = torch.Generator().manual_seed(seed)
        tail = (1 + torch.rand(90, 1, generator=generator)) ** power
        weight = torch.randn(90, 200, generator=generator) * tail * 0.05
        found = tail_exponent(eigenvalues(weight))
        assert found == pytest.approx(published_exponent(weight), rel=1e-3)
    assert tail_exponent(torch.full((20,), 2.0).double()) == 0.0


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (1, 7), (30, 30)])
def test_eigenvalues_are_squared_singular_values(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).bfloat16()
    expected = torch.linalg.svdvals(weight.double()).square().flip(0)
    torch.testing.assert_close(eigenvalues(weight), expected, rtol=1e-9, atol=0)
    weight[len(weight) // 2 :] = 0  # of a lower rank: what rounding leaves is no eigenvalue
    rank = torch.linalg.matrix_rank(weight.double())
    assert (eigenvalues(weight) > 0).sum() == rank


def test_a_list_is_taken_as_it_is():
    listed = settings(allocation={"type": "list", "sparsities": [0.25, 0.5, 0.75, 0, 0.5, 0.5]})
    targets = share_out(listed, EQUAL)
    for layer, sparsity in zip(targets, (0.25, 0.5, 0.75, 0, 0.5, 0.5), strict=True):
        assert all(abs(target.sparsity - sparsity) < 0.02 for target in layer.values())
    with pytest.raises(UserError, match="has 6 entries, the model 3 layers"):
        check_allocation(listed, EQUAL[:3])
    check_allocation(listed, EQUAL)
    agreeing = listed.model_copy(update={"sparsity": 2.5 / 6})
    check_allocation(agreeing, EQUAL)
    with pytest.raises(UserError, match=r"remove 41\.6667%.*says 60\.0000%"):
        check_allocation(listed.model_copy(update={"sparsity": 0.6}), EQUAL)


def test_one_n_for_a_layer_and_the_mean_kept():
    for allocation in ({"type": "owl", "lam": 0.2}, {"type": "alphapruning"}):
        wanted = settings(pattern="4:8", allocation=allocation)
        targets = share_out(wanted, EQUAL, scores_for(EQUAL, seed=3))
        kept = [{target.n_of_m for target in layer.values()} for layer in targets]
        assert all(len(of_layer) == 1 for of_layer in kept)
        numbers = [n for ((n, m),) in kept if m == 8]
        assert sum(numbers) == 4 * len(EQUAL) and len(set(numbers)) > 1


def wishes(allocation, shapes, scores, sparsity):
    of = owl if allocation["type"] == "owl" else alpha_pruning
    strength = allocation.get("lam", 0.08) if of is owl else 0.3
    return of(scores, shapes, sparsity, strength)


LLAMA = {
    "q": (64, 64), "k": (16, 64), "v": (16, 64), "o": (64, 64),
    "gate": (224, 64), "up": (224, 64), "down": (64, 224),
}  # fmt: skip
SHAPES = {
    "equal": [LLAMA] * 8,
    "unequal": [{"q": (64, 64), "up": (16 * (1 + i * 7 % 9), 64)} for i in range(24)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "5:8"])
@pytest.mark.parametrize("kind", ["owl", "alphapruning"])
@pytest.mark.parametrize("per", ["layer", "linear"])
def test_whole_ns_keep_the_mean_and_the_order_of_the_scores(per, kind, pattern, shapes):
    allocation = {"type": kind, "per": per}
    asked = settings(pattern=pattern, allocation=allocation)
    for seed in range(8):
        scores = scores_for(shapes, per, seed)
        targets = share_out(asked, shapes, scores)
        assert mean_sparsity(targets, shapes) == pytest.approx(asked.target_sparsity, abs=1e-4)
        assert deviation_message(asked, summary(targets, shapes)) is None
        wanted = wishes(allocation, shapes, scores, asked.target_sparsity)
        group = asked.n_of_m[1]
        got = [
            (math.prod(of[path]) if per == "linear" else sum(map(math.prod, of.values())), s, n)
            for of, layer, wish in zip(shapes, targets, wanted, strict=True)
            for path, s in wish.items()
            for n in [layer[path].n_of_m[0]]
        ]
        assert all(abs(n - group * (1 - s)) < 1 for _, s, n in got)
        for one, two in itertools.combinations(got, 2):
            if one[0] == two[0] and one[1] != two[1]:
                assert (one[1] < two[1]) <= (one[2] >= two[2]), "the more pruned one keeps more"
                assert (one[1] > two[1]) <= (one[2] <= two[2])


def test_sizes_too_coarse_come_as_near_as_any_whole_ns_and_say_so():
    generator, told = np.random.default_rng(0), 0
    allocation = {"type": "owl", "lam": 0.25}
    asked = settings(pattern="4:8", allocation=allocation)
    for seed in range(40):
        shapes = [{"q": (int(rows), 16)} for rows in generator.integers(3, 60, 7)]
        scores = scores_for(shapes, "layer", seed)
        targets = share_out(asked, shapes, scores)
        wanted = [layer["q"] for layer in wishes(allocation, shapes, scores, 0.5)]
        sides = [{math.floor(8 * s) / 8, math.ceil(8 * s) / 8} for s in wanted]
        sizes = np.array([math.prod(layer["q"]) for layer in shapes])
        misses = [abs(np.dot(sizes, c) / sizes.sum() - 0.5) for c in itertools.product(*sides)]
        miss = abs(mean_sparsity(targets, shapes) - 0.5)
        assert miss <= max(1e-4, min(misses)) + 1e-12
        line = deviation_message(asked, summary(targets, shapes))
        assert (line is not None) == (miss > 1e-4)
        if line:
            told += 1
            assert f"{mean_sparsity(targets, shapes):.3%}" in line and "50.000%" in line
    assert 0 < told < 40


def test_a_layer_beyond_its_range_says_which_and_what_would_fit():
    shapes, scores = [{"q": (100, 100)}] * 4, [{"q": 1.0}, {"q": 1.0}, {"q": 9.0}, {"q": 1.0}]
    for allocation, sparsity, layer, key in (
        ({"type": "owl", "lam": 0.45}, 0.5, "layer 2", "lam"),
        ({"type": "owl", "lam": 0.45}, 0.9, "layer 0", "lam"),
        ({"type": "alphapruning", "epsilon": 0.9}, 0.8, "layer 2", "epsilon"),
    ):
        wanted = settings(sparsity=sparsity, allocation=allocation)
        with pytest.raises(UserError, match=f"{layer}, q.*at most") as raised:
            share_out(wanted, shapes, scores)
        fits = float(str(raised.value).split("at most ")[1].split()[0])
        share_out(settings(sparsity=sparsity, allocation=allocation | {key: fits}), shapes, scores)
        with pytest.raises(UserError, match=layer):
            more = allocation | {key: fits * 1.02}
            share_out(settings(sparsity=sparsity, allocation=more), shapes, scores)


def test_a_pattern_that_a_layer_leaves_says_what_would_fit():
    shapes, scores = [{"q": (96, 96)}] * 4, [{"q": 1.0}, {"q": 1.0}, {"q": 9.0}, {"q": 1.0}]
    for allocation, pattern, key in (
        ({"type": "owl", "lam": 0.4}, "2:8", "lam"),
        ({"type": "owl", "lam": 0.5}, "6:8", "lam"),
        ({"type": "alphapruning", "epsilon": 0.9}, "2:4", "epsilon"),
    ):
        with pytest.raises(UserError, match=r"layer \d, q would.*at most") as raised:
            share_out(settings(pattern=pattern, allocation=allocation), shapes, scores)
        fits = float(str(raised.value).split("at most ")[1].split()[0])
        fitting = allocation | {key: fits}
        share_out(settings(pattern=pattern, allocation=fitting), shapes, scores)
        with pytest.raises(UserError, match="at most"):
            more = allocation | {key: fits * 1.02}
            share_out(settings(pattern=pattern, allocation=more), shapes, scores)


def test_in_words():
    wanted = settings(sparsity=0.6, allocation={"type": "owl"})
    scores = [dict.fromkeys(LAYER, value) for value in (5.0, 5.0, 1.0, 5.0, 9.0, 5.0)]
    text = describe_summary(summary(share_out(wanted, EQUAL, scores), EQUAL))
    assert text.startswith("6") and "in layer 4 to" in text and text.endswith("in layer 2")


def test_patterns_of_which_nothing_would_stay_are_refused():
    measured = settings(pattern="1:4", allocation="owl")
    with pytest.raises(UserError, match=r'"1:4" cannot vary between layers as owl needs it'):
        check_allocation(measured, EQUAL)
    listed = {"type": "list", "sparsities": [0.5, 0.9, 0.25, 0.25, 0.5, 0.5]}
    with pytest.raises(UserError, match=r"layer 1 would get a sparsity of 0\.900"):
        check_allocation(settings(pattern="2:4", allocation=listed), EQUAL)


@pytest.mark.parametrize("per", ["layer", "linear"])
def test_exponents_of_a_layer_are_one_or_of_every_linear(tiny_llama, per, heard):
    skeleton = build_skeleton(ModelSettings(path=str(tiny_llama)))
    chosen = [tuple(skeleton.linears(0)), ("mlp.up_proj", "mlp.down_proj"), ()]
    exponents = result_of(tail_exponents(skeleton, chosen, per, ALONE))
    entered = [event for event in heard.events if isinstance(event, LayerEntered)]
    assert [event.position for event in entered] == [(0, 0), (0, 1), (0, 2)]
    assert [tuple(of) for of in exponents] == chosen
    weight = load_file(tiny_llama / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    own = tail_exponent(eigenvalues(weight))
    assert len(set(exponents[0].values())) == (1 if per == "layer" else 7)
    assert (exponents[0]["self_attn.q_proj"] == own) == (per == "linear")
