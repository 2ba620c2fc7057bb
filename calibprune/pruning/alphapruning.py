"""AlphaPruning's measure of a linear: the exponent of the power law that the tail of its spectrum follows.

Lu et al. 2024 (NeurIPS, "AlphaPruning"), section 3.2. From the weights alone.
"""

from collections.abc import Generator, Sequence
from statistics import fmean

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from calibprune.events import LayerEntered, emit, show_life
from calibprune.gang import Gang
from calibprune.model import Skeleton
from calibprune.pruning.linears import numbers_of_all

BINS = 100
STARTS_AT_ONCE = 64


def tail_exponents(
    skeleton: Skeleton, chosen: Sequence[Sequence[str]], per: str, gang: Gang
) -> Generator[LayerEntered, None, list[dict[str, float]]]:
    """Returns the exponent for every layer and its linears to prune. Collective.

    `per` "layer" gives all linears of a layer their mean. Every layer is read and measured by its owner. Yields
    LayerEntered for every layer, its own or not.
    """
    count, mine = len(skeleton.layers), {}
    for index in range(count):
        yield emit(LayerEntered(index, count, "measuring the allocation", order=0))
        for path in chosen[index] if gang.owns(index) else ():
            show_life()
            name = skeleton.stored_name(f"{skeleton.layer_prefix(index)}{path}.weight")
            read = skeleton.checkpoint.read([name])
            skeleton.check_finite(read)
            mine[index, path] = tail_exponent(eigenvalues(read[name].to(skeleton.device)))
    exponents = numbers_of_all(chosen, mine, gang)
    if per == "linear":
        return exponents
    return [dict.fromkeys(of, fmean(of.values())) if of else {} for of in exponents]


def eigenvalues(weight: Float[Tensor, "out in"]) -> Float64[Tensor, " rank"]:
    """Computes the eigenvalues of W^T W, ascending, as many as the smaller side.

    From the product of the smaller side in float64, which a GPU decomposes many times faster than singular values are
    found. What is below its rounding is as good as none and 0.
    """
    wide = weight.double()
    wide = wide if len(wide) <= wide.shape[1] else wide.T
    values = torch.linalg.eigvalsh(wide @ wide.T)
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1:]
    return values.masked_fill(values <= rounding, 0)


def tail_exponent(spectrum: Float64[Tensor, " n"]) -> float:
    """Hill's estimate 1 + k / sum_i ln(x_i / x_min) over the k eigenvalues from x_min on.

    x_min is, of those up to one and a half times the peak of the spectrum's histogram in logarithms, the one from
    which the tail is nearest to a power law by the distance of Kolmogorov and Smirnov ("fix-finger"). As the published
    code, which lets x_min go down to log10(0.95 * peak), below any eigenvalue that matters.
    """
    spectrum = spectrum.cpu()
    spectrum = spectrum[spectrum > 0]
    count, logs = len(spectrum), spectrum.log()
    if count < 2 or logs[-1] == logs[0]:
        return 0.0  # no tail at all
    log10 = spectrum.log10().float()
    histogram = torch.histc(log10, BINS, min=log10[0].item(), max=log10[-1].item())
    edges = torch.linspace(log10[0].item(), log10[-1].item(), BINS + 1)
    peak = 10.0 ** edges[histogram.argmax()].item()
    starts = (spectrum[:-1] <= 1.5 * peak) & (spectrum[:-1] >= torch.tensor(0.95 * peak).log10())
    candidates = starts.nonzero().flatten()
    tails = count - torch.arange(count)
    sums = logs.flip(0).cumsum(0).flip(0)  # of the logarithms from each on
    alphas = 1 + tails / (sums - tails * logs)
    places = torch.arange(count)
    best, nearest = torch.inf, alphas[0].item()
    for some in candidates.split(STARTS_AT_ONCE) if len(candidates) else ():
        ranks = (places - some[:, None]) / tails[some, None]
        model = 1 - (spectrum / spectrum[some, None]) ** (1 - alphas[some, None])
        distances = (model - ranks).abs().masked_fill(places < some[:, None], 0).amax(1)
        distances = distances.masked_fill(~(alphas[some] > 1) | alphas[some].isinf(), 1.0)
        least = int(distances.argmin())
        if distances[least] < best:
            best, nearest = distances[least].item(), alphas[some[least]].item()
    return nearest
