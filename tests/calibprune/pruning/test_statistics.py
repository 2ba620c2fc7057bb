import math
from dataclasses import replace

import pytest
import torch

from calibprune.pruning import statistics as product
from calibprune.pruning.products import have_bfloat16_products, multiply_bfloat16
from calibprune.pruning.statistics import (
    IntegerSums,
    finish,
    full_float32,
    output_error,
    scale_exponent,
)
from tests.calibprune.pruning.data import correlated_inputs, random_weights

MAX_TOKENS = 700


def magnitude_bound(inputs, *need):
    return product.magnitude_bound(product.column_squares(inputs, frozenset(need)))


def observe(inputs, need, bound, micro_batches, **options):
    need = frozenset([need] if isinstance(need, str) else need)
    squares = product.column_squares(inputs, need)
    return product.observe(inputs, squares, need, bound, micro_batches, MAX_TOKENS, **options)


def micro_batches(dtype=torch.float32, width=70):
    return [correlated_inputs(tokens, width, seed=tokens).to(dtype) for tokens in (40, 25, 33, 700)]


def same(a: IntegerSums, b: IntegerSums) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def plus(a: IntegerSums, b: IntegerSums) -> IntegerSums:
    assert (a.exponent, a.sums_exponent) == (b.exponent, b.sums_exponent)
    added = {
        name: None if getattr(a, name) is None else getattr(a, name) + getattr(b, name)
        for name in ("tokens", "sequences", "sum_squares", "gram", "sums")
    }
    return replace(a, **added)


@pytest.mark.parametrize(
    "need", [(), ("sum_squares",), ("gram",), ("sum_squares", "sums"), ("gram", "sums")]
)
def test_sums_do_not_depend_on_order_or_partition(need):
    batches = micro_batches(torch.bfloat16)
    bound = magnitude_bound(batches, *need)
    everything = observe(batches, need, bound, 4)
    for order in ((3, 1, 0, 2), (2, 3, 0, 1), (1, 0, 3, 2)):
        for cut in (1, 2, 3):
            parts = [[batches[i] for i in order[:cut]], [batches[i] for i in order[cut:]]]
            assert max(magnitude_bound(part, *need) for part in parts) == bound
            assert same(plus(*(observe(part, need, bound, 4) for part in parts)), everything)


PRODUCTS = [
    False,
    pytest.param(
        True,
        marks=pytest.mark.skipif(
            not have_bfloat16_products(), reason="this processor multiplies no bfloat16"
        ),
    ),
]


@pytest.mark.parametrize("bfloat16_products", PRODUCTS)
def test_the_number_of_threads_does_not_matter(bfloat16_products):
    batch = [correlated_inputs(2100, 300).bfloat16()]
    before = torch.get_num_threads()
    sums = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            bounds = magnitude_bound(batch, "gram")
            options = {"bfloat16_products": bfloat16_products}
            sums.append(observe(batch, "gram", bounds, 1, **options))
    finally:
        torch.set_num_threads(before)
    assert same(sums[0], sums[1])
    assert same(sums[0], sums[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 256, 300])
@pytest.mark.parametrize("bfloat16_products", PRODUCTS)
def test_sums_equal_float64(dtype, width, bfloat16_products):
    batches = micro_batches(dtype, width)
    x = torch.cat(batches).double()
    bound = magnitude_bound(batches, "gram")
    statistics = finish(observe(batches, "gram", bound, 4, bfloat16_products=bfloat16_products))
    gram = x.T @ x
    assert statistics.tokens == len(x)
    assert statistics.gram.dtype == torch.float32
    assert torch.equal(statistics.gram, statistics.gram.T)
    assert torch.equal(statistics.gram.diagonal(), statistics.sum_squares)
    scale = (gram.diagonal()[:, None] * gram.diagonal()).sqrt()
    # float32, in the order in which the processor's own kernel for so narrow a product sums
    assert ((statistics.gram - gram) / scale).abs().max() < 4e-6

    squares = finish(observe(batches, "sum_squares", bound, 4))
    assert squares.gram is None
    torch.testing.assert_close(squares.sum_squares.double(), gram.diagonal(), rtol=1e-6, atol=0)


def test_a_huge_column_leaves_small_ones_exact():
    x = correlated_inputs(500, 20)
    x[3, 7] = 3e4  # a massive activation, next to columns of size 1
    bound = magnitude_bound([x], "gram")
    gram = finish(observe([x], "gram", bound, 1000)).gram
    torch.testing.assert_close(
        gram.diagonal().double(), x.double().square().sum(0), rtol=1e-6, atol=0
    )


def test_leading_dimensions_are_tokens():
    x = correlated_inputs(24, 8)
    bound = magnitude_bound([x], "gram")
    found = observe([x.reshape(4, 6, 8)], "gram", bound, 1)
    assert (found.tokens, found.sequences) == (24, 4)
    assert same(replace(found, sequences=1), observe([x], "gram", bound, 1))


def test_the_grand_total_fits_int64():
    x = torch.full((1, 2), 3.0)
    for micro_batch_count in (1, 7, 4096):
        exponent = scale_exponent(magnitude_bound([x], "gram"), micro_batch_count)
        sums = observe([x], "gram", 9.0, micro_batch_count)
        assert sums.exponent == exponent
        assert 2**59 <= int(sums.gram[0, 0]) * micro_batch_count < 2**62


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e12])
def test_extreme_sizes(size):
    x = correlated_inputs(50, 6) * size
    bound = magnitude_bound([x], "gram")
    gram = finish(observe([x], "gram", bound, 1)).gram
    torch.testing.assert_close(gram.double(), x.double().T @ x.double(), rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_raise(value):
    batches = micro_batches()
    batches[2][3, 4] = value
    with pytest.raises(ValueError, match="micro-batch 2"):
        magnitude_bound(batches, "sum_squares")
    with pytest.raises(ValueError, match="micro-batch 7"):  # of all workers'
        squares = product.column_squares(batches, frozenset({"gram"}))
        product.magnitude_bound(squares, [1, 4, 7, 10])
    with pytest.raises(ValueError, match="bound"):
        observe(batches, "gram", 1e9, 4)


def test_wrong_use_raises():
    batches = micro_batches()
    with pytest.raises(ValueError, match="beyond the bound"):
        observe(batches, "gram", 1.0, 4)
    with pytest.raises(ValueError, match="of 3 in total"):
        observe(batches, "gram", 1e9, 3)
    with pytest.raises(ValueError, match="no micro-batch"):
        observe([], "gram", 1e9, 3)


def test_inputs_are_not_modified():
    batches = micro_batches()
    before = [batch.clone() for batch in batches]
    bound = magnitude_bound(batches, "gram")
    finish(observe(batches, "gram", bound, 4))
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))


def test_output_error():
    x = correlated_inputs(90, 32)
    (weight,) = random_weights(12, width=32)
    pruned = weight * (torch.rand(12, 32) > 0.5)
    expected = (x.double() @ (weight - pruned).double().T).norm() / (
        x.double() @ weight.double().T
    ).norm()

    def relative(weight, pruned, x):
        error, size, zeros = output_error(weight, pruned, x).tolist()
        assert zeros == (pruned == 0).sum()
        return (error / size) ** 0.5

    assert relative(weight, pruned, x) == pytest.approx(expected.item(), rel=1e-5)
    in_bfloat16 = relative(weight.bfloat16(), pruned.bfloat16(), x.bfloat16())
    assert in_bfloat16 == pytest.approx(expected.item(), rel=0.01)
    assert output_error(weight, weight, x)[0] == 0


def test_full_float32_puts_the_setting_back():
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_sums_of_inputs_are_exact_to_float32():
    batches = micro_batches()
    found = finish(observe(batches, ("sum_squares", "sums"), magnitude_bound(batches, "sums"), 4))
    x = torch.cat(batches).double()
    assert found.sums is not None
    assert (found.sums - x.sum(0)).abs().max() < 1e-6 * x.abs().sum(0).max()
    assert (found.tokens, found.sequences) == (len(x), 4)


@pytest.mark.parametrize("need", [("sum_squares", "sums"), ("gram", "sums")])
def test_the_variance_is_exact_for_means_far_from_zero(need):
    """And has the part between micro-batches: the last has another mean."""
    batches = [batch + 10.0 ** (torch.arange(70) % 5) for batch in micro_batches()]
    batches[3] += 2
    found = finish(observe(batches, need, magnitude_bound(batches, *need), 4))
    x = torch.cat(batches).double()
    assert found.variance is not None
    torch.testing.assert_close(found.variance, x.var(0, unbiased=False).float(), rtol=1e-5, atol=0)
    constant = [torch.full((10, 4), value) for value in (1.0, -1.0)]
    found = finish(observe(constant, need, magnitude_bound(constant, *need), 2))
    assert torch.equal(found.variance, torch.ones(4))


def test_a_micro_batch_larger_than_announced_raises():
    batches = micro_batches()
    squares = product.column_squares(batches, frozenset({"sums"}))
    with pytest.raises(ValueError, match="700 tokens"):
        product.observe(batches, squares, frozenset({"sums"}), 1e9, 4, 699)


@pytest.mark.skipif(not have_bfloat16_products(), reason="this processor multiplies no bfloat16")
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 1, 5), (64, 300, 33), (3, 0, 4)])
@pytest.mark.parametrize("left_transposed", [True, False])
@pytest.mark.parametrize("right_transposed", [True, False])
def test_bfloat16_products_equal_float64(shape, left_transposed, right_transposed):
    m, k, n = shape
    left = torch.randn(k, m + 3).T[3:] if left_transposed else torch.randn(m, k + 2)[:, 2:]
    right = torch.randn(n, k + 1).T[1:] if right_transposed else torch.randn(k, n + 2)[:, 1:-1]
    left, right = left.bfloat16(), right.bfloat16()
    found = multiply_bfloat16(left, right, torch.full((m, n), torch.nan))
    torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-4)
