"""prune: the methods, the allocation of the sparsity, and how the work is done."""

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from calibprune.config.base import PositiveInt, Regex, Section, Url, named


class Magnitude(Section):
    type: Literal["magnitude"]


class Wanda(Section):
    type: Literal["wanda"]


class RIA(Section):
    type: Literal["ria"]
    power: Annotated[float, Field(ge=0)] = 0.5
    """Exponent of the norm of the inputs."""
    per_row: bool = False
    """Whether weights are compared within every row instead of within the whole matrix."""


class DSnoT(Section):
    type: Literal["dsnot"]
    initial: Literal["wanda", "magnitude"] = "wanda"
    max_swaps: PositiveInt = 50
    """Maximum number of exchanges in one row."""
    variance_power: Annotated[float, Field(ge=0)] = 1.0
    faithful: bool = False
    """Whether to work as the published code does, which leaves the MLP at its initial mask, and stops a row below the
    threshold, in units of a sequence's sum. (The variance still includes the part between sequences, which that code
    omits.) Otherwise every linear takes part, and a row stops when no exchange lowers its error."""
    threshold: Annotated[float, Field(ge=0)] = 0.1
    """Expected output error, summed over one sequence's tokens, at which a row stops; only if `faithful`."""


class SparseGPT(Section):
    type: Literal["sparsegpt"]
    blocksize: PositiveInt = 128
    damping: Annotated[float, Field(gt=0)] = 0.01
    """Fraction of the Gram matrix's mean diagonal that is added to its diagonal."""
    per_row: bool = False
    """Whether every row loses the same number of weights; otherwise all rows of a block are compared."""


class ALPS(Section):
    type: Literal["alps"]
    damping: Annotated[float, Field(gt=0)] = 0.01
    """Fraction of the Gram matrix's mean diagonal that is added to its diagonal."""
    rho: Annotated[float, Field(gt=0)] = 0.1
    """Initial penalty, which grows as the support settles."""
    max_iterations: PositiveInt = 300
    """Maximum number of iterations of the search for the support."""
    refit_iterations: PositiveInt = 100
    """Maximum number of conjugate gradient steps to refit the weights that stay."""
    per_row: bool = False
    """Whether weights are compared within every row instead of within the whole matrix."""


Method = Annotated[
    Magnitude | Wanda | RIA | DSnoT | SparseGPT | ALPS,
    Field(discriminator="type"),
    BeforeValidator(named),
]


class Swaps(Section):
    """Refines any method's mask by the best exchanges of one kept and one pruned weight of a row."""

    type: Literal["swaps"]
    max_swaps: PositiveInt = 100
    """Maximum number of exchanges in one row."""


class UniformAllocation(Section):
    """Gives every layer the same sparsity."""

    type: Literal["uniform"]


class OWL(Section):
    """Keeps layers denser where more weights stand out from the layer's mean; first takes a dense sweep of its own."""

    type: Literal["owl"]
    lam: Annotated[float, Field(ge=0, le=0.5)] = 0.08
    """Half the range of the sparsities, lambda in the paper."""
    m: Annotated[float, Field(gt=0)] = 5.0
    """Multiple of the mean score above which a weight stands out, M in the paper."""
    per: Literal["layer", "linear"] = "layer"


class AlphaPruning(Section):
    """Keeps layers denser where the spectrum of the weights has the heavier tail; needs no calibration data."""

    type: Literal["alphapruning"]
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Half the range of the sparsities before a common factor: from 1 - epsilon to 1 + epsilon."""
    per: Literal["layer", "linear"] = "layer"


class ListAllocation(Section):
    """Uses the given sparsity of every layer."""

    type: Literal["list"]
    sparsities: tuple[Annotated[float, Field(ge=0, lt=1)], ...]


Allocation = Annotated[
    UniformAllocation | OWL | AlphaPruning | ListAllocation,
    Field(discriminator="type"),
    BeforeValidator(named),
]


class PruneSettings(Section):
    method: Method = SparseGPT(type="sparsegpt")
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of weights removed; None: 0.5, or that of the pattern."""
    pattern: str = "unstructured"
    """`unstructured`, or "N:M": N of every M consecutive input weights are kept."""
    allocation: Allocation = UniformAllocation(type="uniform")
    """Distribution of the sparsity over layers; its mean over parameters is always `sparsity`."""
    refine: Annotated[Swaps | None, BeforeValidator(named)] = None
    """Refinement of the method's mask; None: off."""
    inputs: Literal["pruned", "dense"] = "pruned"
    """Inputs that a layer is calibrated on: outputs of the pruned layers before it, or of the dense ones."""
    layers: Regex | None = None
    """Regular expression, searched in the paths of the layers to prune, such as `model.layers.7`; None: all layers."""
    keep: tuple[Regex, ...] = ()
    """Regular expressions, searched in the paths of linears to keep dense, such as `model.layers.7.mlp.down_proj`."""
    batch_sequences: PositiveInt = 4
    """Number of sequences in one micro-batch, the unit that is distributed to the workers."""
    offload: bool | None = None
    """Whether paused forwards keep their state in host memory; None: if it does not fit the GPU. Ignored on CPUs."""
    snapshot_layers: PositiveInt | None = None
    """Number of layers between two snapshots of the hidden states, from which a resumed run starts; None: no snapshots,
    so that a resumed run sweeps through all finished layers again."""
    layer_timeout_seconds: PositiveInt | None = None
    """Longest time that a worker may take for a layer before it is treated as hung; None: as long as it makes progress,
    and without any, ten times the longest layer so far."""
    pool: Url | None = None
    """A calibration pool of your own (parquet folder with token_ids); None: the one `curate` made."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pattern != "unstructured":
            kept, group = parse_pattern(self.pattern)
            implied = 1 - kept / group
            if self.sparsity is not None and abs(self.sparsity - implied) > 1e-9:
                raise ValueError(
                    f'pattern "{self.pattern}" removes {implied:g} of the weights, '
                    f"sparsity is {self.sparsity:g}: leave sparsity out"
                )
            blocksize = getattr(self.method, "blocksize", group)
            if blocksize % group:
                raise ValueError(
                    f"method.blocksize {blocksize} is not a multiple of {group}, "
                    f'as pattern "{self.pattern}" needs'
                )
        return self

    @property
    def target_sparsity(self) -> float:
        """Fraction of weights to remove, from the pattern or from `sparsity`."""
        if self.pattern != "unstructured":
            kept, group = parse_pattern(self.pattern)
            return 1 - kept / group
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(kept, group) of an N:M pattern; None if unstructured."""
        return None if self.pattern == "unstructured" else parse_pattern(self.pattern)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Parses "N:M" into (kept, group). Raises ValueError unless 0 < N < M."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None:
        raise ValueError(f'pattern is "unstructured" or "N:M" such as "2:4", not "{pattern}"')
    kept, group = int(match[1]), int(match[2])
    if not 0 < kept < group:
        raise ValueError(
            f'pattern "{pattern}": N weights of every M are kept, so 0 < N < M, as in "2:4"'
        )
    return kept, group
