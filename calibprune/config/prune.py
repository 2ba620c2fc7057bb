"""prune: the methods, how the sparsity is shared out, and the engine."""

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
    """Of the norm of the inputs."""
    per_row: bool = False
    """Compare within every row instead of within the whole matrix."""


class DSnoT(Section):
    type: Literal["dsnot"]
    initial: Literal["wanda", "magnitude"] = "wanda"
    max_swaps: PositiveInt = 50
    """Most exchanges in one row."""
    variance_power: Annotated[float, Field(ge=0)] = 1.0
    faithful: bool = False
    """As the published code does: the MLP is left as it starts, and a row ends below the threshold, which is in units
    of a sequence's sum. (The variance has the part between sequences all the same, which that code leaves out.)
    Otherwise every linear takes part and a row ends when no exchange lowers its error."""
    threshold: Annotated[float, Field(ge=0)] = 0.1
    """Of the expected output error summed over one sequence's tokens; only if `faithful`."""


class SparseGPT(Section):
    type: Literal["sparsegpt"]
    blocksize: PositiveInt = 128
    damping: Annotated[float, Field(gt=0)] = 0.01
    """Fraction of the Gram matrix's mean diagonal that is added to its diagonal."""
    per_row: bool = False
    """Remove equally many weights of every row instead of comparing all rows of a block."""


class ALPS(Section):
    type: Literal["alps"]
    damping: Annotated[float, Field(gt=0)] = 0.01
    """Fraction of the Gram matrix's mean diagonal that is added to its diagonal."""
    rho: Annotated[float, Field(gt=0)] = 0.1
    """Penalty at the start; it grows as the support settles."""
    max_iterations: PositiveInt = 300
    """Of the search for the support."""
    refit_iterations: PositiveInt = 100
    """Most steps of conjugate gradients that refit the weights that stay."""
    per_row: bool = False
    """Compare within every row instead of within the whole matrix."""


Method = Annotated[
    Magnitude | Wanda | RIA | DSnoT | SparseGPT | ALPS,
    Field(discriminator="type"),
    BeforeValidator(named),
]


class Swaps(Section):
    """Any method's mask refined by the best exchanges of one kept and one pruned weight of a row."""

    type: Literal["swaps"]
    max_swaps: PositiveInt = 100
    """Most exchanges in one row."""


class UniformAllocation(Section):
    """Every layer the same sparsity."""

    type: Literal["uniform"]


class OWL(Section):
    """Denser where more weights stand out from their layer's mean; takes a dense sweep of its own first."""

    type: Literal["owl"]
    lam: Annotated[float, Field(ge=0, le=0.5)] = 0.08
    """Lambda: half the range of the sparsities."""
    m: Annotated[float, Field(gt=0)] = 5.0
    """M: a weight stands out if its score is more than M times the mean."""
    per: Literal["layer", "linear"] = "layer"


class AlphaPruning(Section):
    """Denser where the weights' spectrum has the heavier tail. No calibration data."""

    type: Literal["alphapruning"]
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Sparsities go from 1 - epsilon to 1 + epsilon, times a common factor."""
    per: Literal["layer", "linear"] = "layer"


class ListAllocation(Section):
    """A sparsity of your own for every layer."""

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
    """Fraction of weights removed; None: 0.5, or what the pattern says."""
    pattern: str = "unstructured"
    """`unstructured`, or "N:M": N of every M consecutive input weights are kept."""
    allocation: Allocation = UniformAllocation(type="uniform")
    """How the sparsity is shared out over layers; its mean over parameters is `sparsity` all the same."""
    refine: Annotated[Swaps | None, BeforeValidator(named)] = None
    """What makes the method's mask better; None: nothing."""
    inputs: Literal["pruned", "dense"] = "pruned"
    """What a layer is calibrated on: outputs of the pruned layers before it, or of the dense ones."""
    layers: Regex | None = None
    """Only layers whose path, such as `model.layers.7`, this regular expression is found in; None: all."""
    keep: tuple[Regex, ...] = ()
    """Linears whose path, such as `model.layers.7.mlp.down_proj`, one of these is found in are left dense."""
    batch_sequences: PositiveInt = 4
    """Sequences in one micro-batch, the unit that is dealt to the workers."""
    offload: bool | None = None
    """Keep what paused forwards hold in host memory; None: where it does not fit the GPU. Without effect on CPUs."""
    snapshot_layers: PositiveInt | None = None
    """Keep the hidden states every so many layers, for a resume to start from; None: it sweeps through what is done."""
    layer_timeout_seconds: PositiveInt | None = None
    """A worker that takes longer over a layer is held to hang; None: derived from the layers measured so far."""
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
                    f"sparsity says {self.sparsity:g}: leave sparsity out"
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
        if self.pattern != "unstructured":
            kept, group = parse_pattern(self.pattern)
            return 1 - kept / group
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(kept, group) of an N:M pattern, None when unstructured."""
        return None if self.pattern == "unstructured" else parse_pattern(self.pattern)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """(kept, group) of "N:M". Raises ValueError unless 0 < N < M."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None:
        raise ValueError(f'pattern is "unstructured" or "N:M" such as "2:4", not "{pattern}"')
    kept, group = int(match[1]), int(match[2])
    if not 0 < kept < group:
        raise ValueError(
            f'pattern "{pattern}": N weights of every M are kept, so 0 < N < M, as in "2:4"'
        )
    return kept, group
