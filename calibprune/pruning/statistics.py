"""Statistics of a group's inputs for its pruning: raw sums over tokens, exact in any order.

Sums are added as integers, so neither the order of the micro-batches nor their partition over workers
changes a bit. Where the inputs come from and how sums travel between workers is decided elsewhere.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from calibprune.gang import Gang
from calibprune.pruning.positions import sequences_of, shapes_of

Need = frozenset[str]
"""The sums wanted, of "sums", "sum_squares" and "gram"; the last has the sums of squares as its diagonal."""

# More than 512 tokens in one product, and MKL's last bits depend on the number of threads.
TOKENS_AT_ONCE = {"cpu": 512}
COLUMNS_AT_ONCE = {"cpu": 256}
GPU_TOKENS_AT_ONCE = 8192
GPU_COLUMNS_AT_ONCE = 4096

ROWS_SENT = 512

INTEGER_BITS = 62  # of int64's 63, so that rounding never overflows


@dataclass(frozen=True)
class Statistics:
    """Raw sums over the calibration tokens of one input: sum of x_j^2, of x x^T and of x_j, in float32."""

    tokens: int
    sum_squares: Float32[Tensor, "in"] | None = None
    gram: Float32[Tensor, "in in"] | None = None
    sums: Float32[Tensor, "in"] | None = None
    variance: Float32[Tensor, "in"] | None = None
    """Variance of every input over all tokens, within and between micro-batches; present if `sums` is."""
    sequences: int = 1
    """Number of sequences that the tokens came from."""


@dataclass(frozen=True)
class IntegerSums:
    """The same sums times a power of two, as integers, with only the lower triangle of the Gram matrix filled.

    With sums of x there are sums of x^2 beside a Gram matrix too: their difference matters, so both come from float64.

    Sums of one exponent add up exactly, over micro-batches and over workers.
    """

    tokens: int
    sequences: int
    exponent: int = 0
    sum_squares: Int64[Tensor, "in"] | None = None
    gram: Int64[Tensor, "in in"] | None = None
    sums_exponent: int = 0
    sums: Int64[Tensor, "in"] | None = None


def column_squares(
    inputs: Sequence[Float[Tensor, "... in"]], need: Need
) -> list[Float[Tensor, "in"]]:
    """Sums x_j^2 over the tokens of every micro-batch, in float64 beside sums of x; none if nothing is needed."""
    dtype = torch.float64 if "sums" in need else torch.float32
    return [_column_sums(_rows(batch), dtype, square=True) for batch in inputs] if need else []


def magnitude_bound(
    squares: list[Float[Tensor, "in"]], numbers: Sequence[int] | None = None
) -> float:
    """Finds the largest sum of x_j^2 that any column reaches in any one of these micro-batches, from `column_squares`.

    Take the maximum over all workers and pass it to `observe`: by Cauchy-Schwarz it bounds every entry of
    every micro-batch's Gram matrix. Raises ValueError for an input that is not finite, with the number of its
    micro-batch, which is its place among these without `numbers`.
    """
    if not squares:
        return 0.0
    peaks = torch.stack([sums.max() for sums in squares]).tolist()
    for index, peak in zip(numbers or range(len(peaks)), peaks, strict=True):
        if not math.isfinite(peak):
            raise ValueError(
                f"the inputs of micro-batch {index} are not finite: a sum of squares is {peak}. Forwards overflow most "
                f"easily in float16: try model.dtype=bfloat16 or float32"
            )
    return max(peaks)


def observe(
    inputs: Sequence[Float[Tensor, "... in"]],
    squares: list[Float[Tensor, "in"]],
    need: Need,
    bound: float,
    micro_batches: int,
    most_tokens: int = 0,
) -> IntegerSums:
    """Adds up the micro-batches' sums, each rounded to a multiple of one power of two.

    `squares` are `column_squares` of the inputs; `bound` is the maximum of `magnitude_bound` over all workers,
    `micro_batches` their number and `most_tokens` the most that one of them has, over all workers: together they fix
    the powers of two so that the grand totals fit int64. `most_tokens` matters only where sums of x are wanted. Raises
    ValueError on no input at all, on inputs beyond the bound and on more or larger micro-batches than announced.
    """
    if not inputs:
        raise ValueError("no micro-batch to observe")
    if len(inputs) > micro_batches:
        raise ValueError(f"{len(inputs)} micro-batches observed, of {micro_batches} in total")
    shapes = shapes_of(inputs)
    tokens = [math.prod(shape[:-1]) for shape in shapes]
    observed = IntegerSums(sum(tokens), sequences_of(inputs))
    if not need:
        return observed

    exponent = scale_exponent(bound, micro_batches)
    width, device = squares[0].shape[0], squares[0].device
    shape = (width, width) if "gram" in need else (width,)
    total = torch.zeros(shape, dtype=torch.int64, device=device)
    peaks = []
    for batch, sum_squares in zip(inputs, squares, strict=True):
        if "gram" in need:
            peaks.append(_add_gram(total, _rows(batch), 2.0**exponent))
        else:
            peaks.append(sum_squares.max())
            total += (sum_squares * 2.0**exponent).round_().long()
    peak = torch.stack(peaks).max().item()
    if not peak <= bound * 1.001:  # the two are rounded differently
        raise ValueError(f"inputs reach {peak:g}, beyond the bound {bound:g} of all micro-batches")
    name = "gram" if "gram" in need else "sum_squares"
    observed = replace(observed, exponent=exponent, **{name: total})
    if "sums" not in need:
        return observed

    if max(tokens) > most_tokens:
        raise ValueError(f"a micro-batch of {max(tokens)} tokens, of at most {most_tokens}")
    exponent = scale_exponent(math.sqrt(bound * most_tokens), micro_batches)  # Cauchy-Schwarz
    sums, sum_squares = torch.zeros(2, width, dtype=torch.int64, device=device)
    for batch, of_batch in zip(inputs, squares, strict=True):
        sums += (_column_sums(_rows(batch), torch.float64) * 2.0**exponent).round_().long()
        sum_squares += (of_batch * 2.0**observed.exponent).round_().long()
    return replace(observed, sums_exponent=exponent, sums=sums, sum_squares=sum_squares)


def scale_exponent(bound: float, micro_batches: int) -> int:
    """Returns the largest e for which `micro_batches` sums of at most 2 * bound, times 2^e, stay below 2^62."""
    if not (math.isfinite(bound) and bound >= 0):
        raise ValueError(f"bound is a finite number of at least 0, not {bound}")
    _, total = math.frexp(2 * bound * micro_batches)
    return min(INTEGER_BITS - total, 126)  # 2^126 is still a float32


def add_up(sums: IntegerSums, gang: Gang) -> IntegerSums:
    """Adds the sums over all workers' tokens, in place. Collective; all workers used the same bounds."""
    counts = gang.add(torch.tensor([sums.tokens, sums.sequences], device=gang.device))
    for total in (sums.sum_squares, sums.sums):
        if total is not None:
            gang.add(total)
    if sums.gram is not None and gang.size > 1:
        for start in range(0, len(sums.gram), ROWS_SENT):  # the lower triangle is all there is
            stop = min(start + ROWS_SENT, len(sums.gram))
            sums.gram[start:stop, :stop] = gang.add(sums.gram[start:stop, :stop].contiguous())
    tokens, sequences = counts.tolist()
    return replace(sums, tokens=tokens, sequences=sequences)


def finish(sums: IntegerSums) -> Statistics:
    """Converts the sums to float32, with an exactly symmetric Gram matrix whose diagonal is the sums of squares."""
    squares = gram = totals = variance = None
    if sums.gram is not None:
        lower = sums.gram.to(torch.float32).mul_(2.0**-sums.exponent).tril_()
        squares, gram = lower.diagonal().clone(), lower + lower.tril(-1).T
    elif sums.sum_squares is not None:
        squares = sums.sum_squares.to(torch.float32).mul_(2.0**-sums.exponent)
    if sums.sums is not None:
        assert sums.sum_squares is not None
        total = sums.sums.double().mul_(2.0**-sums.sums_exponent)
        mean_square = sums.sum_squares.double().mul_(2.0**-sums.exponent) / sums.tokens
        variance = (mean_square - (total / sums.tokens).square()).clamp_(min=0).float()
        totals = total.float()
    return Statistics(sums.tokens, squares, gram, totals, variance, sums.sequences)


@torch.no_grad()
def output_error(
    weight: Float[Tensor, "out in"],
    pruned: Float[Tensor, "out in"],
    inputs: Float[Tensor, "tokens in"],
) -> Float64[Tensor, "3"]:
    """Returns ||(W - W') X||^2 and ||W X||^2 in the Frobenius norm, and the zeros of W', in float32."""
    dense, inputs = weight.to(torch.float32), inputs.to(torch.float32)
    difference = dense - pruned
    norms = [torch.linalg.vector_norm(inputs @ matrix.T) for matrix in (difference, dense)]
    zeros = pruned.numel() - pruned.count_nonzero()
    return torch.stack([*(norm.double().square() for norm in norms), zeros.double()])


@contextmanager
def full_float32() -> Iterator[None]:
    """Keeps TF32 and bfloat16 out of float32 matrix products while it is open."""
    on_cpu = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    backends = torch.backends.cuda.matmul, on_cpu
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _rows(batch: Float[Tensor, "... in"]) -> Float[Tensor, "tokens in"]:
    return batch.detach().reshape(-1, batch.shape[-1])


def _column_sums(
    tokens: Float[Tensor, "tokens in"], dtype: torch.dtype, square: bool = False
) -> Float[Tensor, "in"]:
    """Sums x_j, or x_j^2, over the rows, by chunks of rows so that no large temporary is made."""
    at_once = TOKENS_AT_ONCE.get(tokens.device.type, GPU_TOKENS_AT_ONCE)
    total = torch.zeros(tokens.shape[1], dtype=dtype, device=tokens.device)
    for chunk in tokens.split(at_once * 4 // dtype.itemsize):
        total += chunk.to(dtype).square().sum(0) if square else chunk.sum(0, dtype=dtype)
    return total


def _add_gram(
    sums: Int64[Tensor, "in in"], tokens: Float[Tensor, "tokens in"], scale: float
) -> Float32[Tensor, ""]:
    """Adds the scaled, rounded lower triangle of X^T X to `sums`; returns its largest diagonal entry."""
    on_cpu = tokens.device.type == "cpu"
    if on_cpu:
        tokens = tokens.to(torch.float32)
    width = tokens.shape[1]
    columns = COLUMNS_AT_ONCE.get(tokens.device.type, GPU_COLUMNS_AT_ONCE)
    peaks = []
    with full_float32():
        for start in range(0, width, columns):
            stop = min(start + columns, width)
            product = _gram_rows(tokens, start, stop)
            peaks.append(product.diagonal(start).max())
            sums[start:stop, :stop] += product.mul_(scale).round_().long()
    return torch.stack(peaks).max()


def _gram_rows(
    tokens: Float[Tensor, "tokens in"], start: int, stop: int
) -> Float32[Tensor, "rows stop"]:
    """Computes rows [start, stop) of X^T X, up to and including the diagonal block, summed in float32."""
    left, right = tokens[:, start:stop].T, tokens[:, :stop]
    if not len(tokens):
        return torch.zeros(stop - start, stop, device=tokens.device)
    if tokens.device.type == "cpu":
        at_once = TOKENS_AT_ONCE["cpu"]
        product = torch.zeros(stop - start, stop)
        for first in range(0, len(tokens), at_once):
            product.addmm_(left[:, first : first + at_once], right[first : first + at_once])
        return product
    if tokens.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)
