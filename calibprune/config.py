"""Every setting of a run: frozen pydantic models, one per stage, read from YAML plus `key.path=value` overrides.

`sparsity` is always the fraction of weights removed. In a pattern "N:M", N of every M consecutive
input weights are kept. Defaults are the ones we would use ourselves; `None` means "off" or "decide by itself".
"""

import re
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)


def _without_credentials(url: str) -> str:
    if re.match(r"[\w+.-]+://[^/@]*:[^/@]*@", url):
        raise ValueError("no credentials in URLs: give them to the store's own library instead")
    return url


def _regular_expression(expression: str) -> str:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return expression


def _named(value: object) -> object:
    """A name alone stands for that type with its defaults."""
    return {"type": value} if isinstance(value, str) else value


Url = Annotated[str, AfterValidator(_without_credentials)]
"""A path or an fsspec URL. Settings are written to records and reports, so credentials have no place in them."""
Regex = Annotated[str, AfterValidator(_regular_expression)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(Section):
    """The causal language model: a local folder, an fsspec URL (s3://, gs://, hf://) or a hub id `org/name`."""

    path: Url
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the forwards; `auto` is the checkpoint's own. The pruned checkpoint keeps the input's dtype."""
    trust_remote_code: bool = False


class ClusterSettings(Section):
    """What to ask of Ray. Without an address: RAY_ADDRESS if set, else a Ray of its own on this machine."""

    address: str | None = None
    workers: PositiveInt = 1
    gpus_per_worker: NonNegativeInt | None = None
    """None: one where the cluster has GPUs, else none."""
    cpus_per_worker: PositiveInt | None = None
    """None: 1 beside a GPU; without GPUs an equal share of the largest node's CPUs."""
    start_timeout_seconds: PositiveInt = 600
    verbose: bool = False
    """Show the workers' own logs in the driver's output."""


class BosPrefixes(Section):
    """Every sample starts from nothing but the model's start-of-text token."""

    type: Literal["bos"]


class VocabularyPrefixes(Section):
    """Every sample starts from `tokens` ordinary tokens drawn uniformly from the vocabulary."""

    type: Literal["vocabulary"]
    tokens: PositiveInt = 1
    bos: bool = True


class DatasetPrefixes(Section):
    """Every sample starts from the first `tokens` tokens of one document of a text source."""

    type: Literal["dataset"]
    path: Url
    """A text (one document a line), jsonl or parquet file or folder, local or by URL, or a Hugging Face dataset id."""
    name: str | None = None
    split: str = "train"
    column: str = "text"
    tokens: PositiveInt = 2
    """Tokens of the document itself; a start-of-text token in front is not counted."""
    bos: bool = True


Prefixes = Annotated[
    BosPrefixes | VocabularyPrefixes | DatasetPrefixes, Field(discriminator="type")
]


class GenerateSettings(Section):
    prefixes: Prefixes = BosPrefixes(type="bos")
    samples: PositiveInt = 5000
    max_tokens: PositiveInt = 2048
    """Most new tokens of a sample; one may end sooner with the end-of-text token."""
    min_tokens: NonNegativeInt = 0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: PositiveInt | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    seed: NonNegativeInt = 0
    shard_rows: PositiveInt = 500
    """Samples in one unit of work: what a crash can cost."""
    engines: PositiveInt | None = None
    """vLLM engines; None: as many as the cluster section's workers have room for."""
    tensor_parallel: PositiveInt = 1
    max_concurrent: PositiveInt = 256
    """Samples that one engine continues at the same time."""
    shards_in_flight: PositiveInt = 2
    attempts: PositiveInt = 3
    shard_timeout_seconds: PositiveInt | None = None
    """None: derived from the shards measured so far."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    cpu_kvcache_gib: PositiveInt = 2
    enforce_eager: bool | None = None
    """None: compiled on GPUs, eager on CPUs, where compiling costs more than it saves on short runs."""


class PerplexityFilter(Section):
    """Drops the fraction of samples that the model itself finds least likely (Ji et al. 2025, section 4)."""

    type: Literal["perplexity"]
    drop_worst: Annotated[float, Field(ge=0, lt=1)] = 0.2


class LengthFilter(Section):
    """Drops samples with fewer tokens than this, prefix included."""

    type: Literal["length"]
    min_tokens: PositiveInt = 32


Filter = Annotated[PerplexityFilter | LengthFilter, Field(discriminator="type")]


class CurateSettings(Section):
    filters: tuple[Filter, ...] = (PerplexityFilter(type="perplexity"),)
    sequences: PositiveInt = 128
    sequence_tokens: Annotated[int, Field(ge=2)] = 2048
    pack: Literal["concat", "document"] = "concat"
    """concat: kept samples joined in random order and cut; document: the first tokens of long enough samples."""
    seed: NonNegativeInt = 0


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
    BeforeValidator(_named),
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
    BeforeValidator(_named),
]


class PruneSettings(Section):
    method: Method = SparseGPT(type="sparsegpt")
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of weights removed; None: 0.5, or what the pattern says."""
    pattern: str = "unstructured"
    """`unstructured`, or "N:M": N of every M consecutive input weights are kept."""
    allocation: Allocation = UniformAllocation(type="uniform")
    """How the sparsity is shared out over layers; its mean over parameters is `sparsity` all the same."""
    refine: Annotated[Swaps | None, BeforeValidator(_named)] = None
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


class HeldOutText(Section):
    """A text that the perplexity is measured on; `path` as in the dataset prefixes, or `python-docs`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    path: Url
    dataset_name: str | None = None
    split: str = "test"
    column: str = "text"
    separator: str = "\n\n"
    """Put between documents before the text is cut into windows."""


class EvaluateSettings(Section):
    perplexity: tuple[HeldOutText, ...] = ()
    sequence_tokens: Annotated[int, Field(ge=2)] = 2048
    sequences: PositiveInt | None = None
    """Most windows per text; None: all of it."""
    batch_sequences: PositiveInt = 1

    @field_validator("perplexity")
    @classmethod
    def _names_differ(cls, texts: tuple[HeldOutText, ...]) -> tuple[HeldOutText, ...]:
        names = [text.name for text in texts]
        if len(set(names)) < len(names):
            raise ValueError(f"every text needs a name of its own, these were given: {names}")
        return texts


class ReportSettings(Section):
    sample_texts: NonNegativeInt = 3


class Config(Section):
    model: ModelSettings
    output: Url
    """URL of the run folder; everything a run makes lies in there."""
    cluster: ClusterSettings = ClusterSettings()
    generate: GenerateSettings = GenerateSettings()
    curate: CurateSettings = CurateSettings()
    prune: PruneSettings = PruneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    report: ReportSettings = ReportSettings()


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
