"""Statistics of a group's inputs for its pruning: raw sums over tokens, exact in any order.

Sums are added as integers, so neither the order of the micro-batches nor their partition over workers
changes a bit. Where the inputs come from and how sums travel between workers is decided elsewhere.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from calibprune.gang import ALONE, Gang
from calibprune.pruning.masks import on_threads
from calibprune.pruning.positions import sequences_of, shapes_of
from calibprune.pruning.products import have_bfloat16_products, multiply_bfloat16
from calibprune.pruning.rows import row_slices

Need = frozenset[str]
"""The sums wanted, of "sums", "sum_squares" and "gram"; the last has the sums of squares as its diagonal."""

# On CPUs a thread computes each tile and each run of columns by itself: their number changes no bit.
TILE, MIN_TILES_ACROSS = 512, 3
COLUMNS_AT_ONCE = 256
CPU_TOKENS_AT_ONCE = 512

GPU_TOKENS_AT_ONCE = 8192
GPU_ROWS_AT_ONCE = 2048

ROWS_SENT = 128

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
    """Sums x_j^2 over the tokens of every micro-batch; none if nothing is needed.

    In float64 on CPUs and beside sums of x, else in float32.
    """
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
    peaks = torch.stack([sums.max() for sums in squares]).to(torch.float32).tolist()
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
    bfloat16_products: bool = False,
) -> IntegerSums:
    """Adds up the micro-batches' sums, each rounded to a multiple of one power of two.

    `squares` are `column_squares` of the inputs; `bound` is the maximum of `magnitude_bound` over all workers,
    `micro_batches` their number and `most_tokens` the most that one of them has, over all workers: together they fix
    the powers of two so that the grand totals fit int64. `most_tokens` matters only where sums of x are wanted. With
    `bfloat16_products`, which all workers have or none, a CPU multiplies inputs in bfloat16 as they are. Raises
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
            peaks.append(_add_gram(total, _rows(batch), 2.0**exponent, bfloat16_products))
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


def finish(sums: IntegerSums, gang: Gang = ALONE) -> Statistics:
    """Adds the sums over all workers' tokens and converts them to float32; uses up `sums`.

    The Gram matrix is exactly symmetric, and its diagonal are the sums of squares. Collective; all workers used the
    same bounds. Takes 12 bytes for every entry of the Gram matrix at its peak, those of `sums` included.
    """
    counts = gang.add(torch.tensor([sums.tokens, sums.sequences], device=gang.device))
    tokens, sequences = counts.tolist()
    squares = gram = totals = variance = None
    for total in (sums.sum_squares, sums.sums):
        if total is not None:
            gang.add(total)
    if sums.gram is not None:
        gram = _finished_gram(sums.gram, 2.0**-sums.exponent, gang)
        squares = gram.diagonal().clone()
    elif sums.sum_squares is not None:
        squares = sums.sum_squares.to(torch.float32).mul_(2.0**-sums.exponent)
    if sums.sums is not None:
        assert sums.sum_squares is not None
        total = sums.sums.double().mul_(2.0**-sums.sums_exponent)
        mean_square = sums.sum_squares.double().mul_(2.0**-sums.exponent) / tokens
        variance = (mean_square - (total / tokens).square()).clamp_(min=0).float()
        totals = total.float()
    return Statistics(tokens, squares, gram, totals, variance, sequences)


def _finished_gram(
    sums: Int64[Tensor, "in in"], scale: float, gang: Gang
) -> Float32[Tensor, "in in"]:
    """Adds up the lower triangles of all workers, in blocks of rows that the workers convert in turn."""
    width = len(sums)
    gram = torch.empty(width, width, dtype=torch.float32, device=sums.device)
    blocks = row_slices([width], ROWS_SENT)
    for first in range(0, len(blocks), gang.size):
        dealt = list(enumerate(blocks[first : first + gang.size]))  # (worker, its block of rows)
        whole = [sums[rows, : rows.stop] for _, rows in dealt]  # the triangle is all there is
        if gang.size > 1:
            whole = [part.contiguous() for part in whole]
            gang.add_at([(part, worker) for part, (worker, _) in zip(whole, dealt, strict=True)])
        finished = [
            part.to(torch.float32).mul_(scale)
            if worker == gang.rank
            else torch.empty(part.shape, dtype=torch.float32, device=part.device)
            for part, (worker, _) in zip(whole, dealt, strict=True)
        ]
        gang.broadcast([(part, worker) for part, (worker, _) in zip(finished, dealt, strict=True)])
        for part, (_, rows) in zip(finished, dealt, strict=True):
            gram[rows, : rows.stop] = part
            gram[: rows.start, rows] = part[:, : rows.start].T
            corner = part[:, rows.start :].tril()
            gram[rows, rows] = corner + corner.tril(-1).T
    return gram


@torch.no_grad()
def output_error(
    weight: Float[Tensor, "out in"],
    pruned: Float[Tensor, "out in"],
    inputs: Float[Tensor, "tokens in"],
) -> Float64[Tensor, "3"]:
    """Returns ||(W - W') X||^2 and ||W X||^2 in the Frobenius norm, and the zeros of W', in float32."""
    dense = _outputs(inputs, weight)
    norms = [torch.linalg.vector_norm(m) for m in (dense - _outputs(inputs, pruned), dense)]
    zeros = (pruned == 0).sum()
    return torch.stack([*(norm.double().square() for norm in norms), zeros.double()])


def _outputs(
    inputs: Float[Tensor, "tokens in"], weight: Float[Tensor, "out in"]
) -> Float32[Tensor, "tokens out"]:
    on_cpu = weight.device.type == "cpu"
    if on_cpu and {inputs.dtype, weight.dtype} == {torch.bfloat16} and have_bfloat16_products():
        out = torch.empty(len(inputs), len(weight))
        return multiply_bfloat16(inputs.contiguous(), weight.T, out)
    return inputs.to(torch.float32) @ weight.to(torch.float32).T


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
    if tokens.device.type == "cpu":
        return _column_sums_on_cpu(tokens, square)
    total = torch.zeros(tokens.shape[1], dtype=dtype, device=tokens.device)
    for chunk in tokens.split(GPU_TOKENS_AT_ONCE * 4 // dtype.itemsize):
        total += chunk.to(dtype).square().sum(0) if square else chunk.sum(0, dtype=dtype)
    return total


def _column_sums_on_cpu(tokens: Float[Tensor, "tokens in"], square: bool) -> Float64[Tensor, "in"]:
    total = torch.zeros(tokens.shape[1], dtype=torch.float64)

    def add(columns: slice) -> None:
        sums = total.numpy()[columns]
        if tokens.dtype == torch.bfloat16:
            _add_columns_of_bfloat16(tokens[:, columns].view(torch.uint16).numpy(), square, sums)
            return
        for chunk in tokens[:, columns].split(CPU_TOKENS_AT_ONCE):
            _add_columns(chunk.to(torch.float32).numpy(), square, sums)

    on_threads(add, row_slices([tokens.shape[1]], COLUMNS_AT_ONCE))
    return total


def _add_gram(
    sums: Int64[Tensor, "in in"],
    tokens: Float[Tensor, "tokens in"],
    scale: float,
    bfloat16_products: bool = False,
) -> Float[Tensor, ""]:
    """Adds the scaled, rounded lower triangle of X^T X to `sums`; returns its largest diagonal entry."""
    if tokens.device.type == "cpu":
        return _add_gram_on_cpu(sums, tokens, scale, bfloat16_products)
    peaks = []
    with full_float32():
        for rows in row_slices([tokens.shape[1]], GPU_ROWS_AT_ONCE):
            product = _gram_rows(tokens, rows.start, rows.stop)
            peaks.append(product.diagonal(rows.start).max())
            _adder(tokens.device)(sums, product, scale, rows.start)
    return torch.stack(peaks).max()


def _adder(device: torch.device) -> Callable[[Tensor, Tensor, float, int], None]:
    """One kernel where Triton is at hand, else an operation at a time."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from calibprune.pruning.statistics_triton import add_scaled

        return add_scaled
    return _add_scaled_tensors


def _add_scaled_tensors(
    sums: Int64[Tensor, "in in"],
    product: Float32[Tensor, "rows columns"],
    scale: float,
    first_row: int,
) -> None:
    """Adds rint(product * scale) to some rows of the sums; what it adds above the diagonal nobody reads."""
    rows, columns = product.shape
    sums[first_row : first_row + rows, :columns] += (product * scale).round_().long()


def _gram_rows(
    tokens: Float[Tensor, "tokens in"], start: int, stop: int
) -> Float32[Tensor, "rows stop"]:
    """Computes rows [start, stop) of X^T X, up to and including the diagonal block, summed in float32."""
    left, right = tokens[:, start:stop].T, tokens[:, :stop]
    if not len(tokens):
        return torch.zeros(stop - start, stop, device=tokens.device)
    if tokens.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


def _add_gram_on_cpu(
    sums: Int64[Tensor, "in in"],
    tokens: Float[Tensor, "tokens in"],
    scale: float,
    bfloat16_products: bool,
) -> Float32[Tensor, ""]:
    """Does the same in square tiles of one thread each."""
    as_they_are = bfloat16_products and tokens.dtype == torch.bfloat16
    tokens = tokens.contiguous() if as_they_are else tokens.to(torch.float32)
    multiply = multiply_bfloat16 if as_they_are else torch.mm
    tiles, totals = _tiles(tokens.shape[1]), sums.numpy()
    peaks = torch.zeros(len(tiles))

    def add(part: slice) -> None:
        for index in range(part.start, part.stop):
            rows, columns = tiles[index]
            product = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
            multiply(tokens[:, rows].T, tokens[:, columns], out=product)
            if rows == columns:
                peaks[index] = product.diagonal().max()
            _add_scaled(totals, product.numpy(), np.float32(scale), rows.start, columns.start)

    with full_float32():  # out here: the threads share the setting
        on_threads(add, row_slices([len(tiles)], 1))
    return peaks.max()


def _tiles(width: int) -> list[tuple[slice, slice]]:
    """Cuts the lower triangle into squares of rows and columns, those below the diagonal first."""
    across = max(MIN_TILES_ACROSS, -(-width // TILE))
    cuts = row_slices([width], -(-width // across // 32) * 32)  # 64 bytes of bfloat16
    tiles = [(rows, columns) for i, rows in enumerate(cuts) for columns in cuts[: i + 1]]
    return sorted(tiles, key=lambda tile: tile[0] == tile[1])


@numba.njit(nogil=True, cache=True, error_model="numpy")
@no_type_check  # jaxtyping cannot look into compiled code
def _add_scaled(
    sums: np.ndarray, product: np.ndarray, scale: np.float32, first_row: int, first_column: int
) -> None:
    """Adds rint(product * scale) to a tile of the sums, nothing above the diagonal."""
    for i in range(product.shape[0]):
        row = first_row + i
        columns = min(product.shape[1], row + 1 - first_column)
        # slices are indexed from 0, which is known not to count from the end: the loop is vectorised
        total, added = sums[row, first_column : first_column + columns], product[i, :columns]
        for j in range(columns):
            total[j] += np.int64(np.rint(added[j] * scale))


@numba.njit(nogil=True, cache=True, error_model="numpy")
@no_type_check
def _add_columns(values: np.ndarray, square: bool, sums: np.ndarray) -> None:
    for i in range(values.shape[0]):
        _add_row(values[i], square, sums)


@numba.njit(nogil=True, cache=True, error_model="numpy")
@no_type_check
def _add_columns_of_bfloat16(bits: np.ndarray, square: bool, sums: np.ndarray) -> None:
    """Does the same with numbers that are the upper halves of float32's."""
    whole = np.empty(bits.shape[1], np.uint32)
    for i in range(bits.shape[0]):
        row = bits[i]
        for j in range(len(whole)):
            whole[j] = np.uint32(row[j]) << np.uint32(16)
        _add_row(whole.view(np.float32), square, sums)


@numba.njit(nogil=True, cache=True, error_model="numpy")
@no_type_check
def _add_row(row: np.ndarray, square: bool, sums: np.ndarray) -> None:
    if square:
        for j in range(len(sums)):
            sums[j] += np.float64(row[j]) * np.float64(row[j])
    else:
        for j in range(len(sums)):
            sums[j] += row[j]
