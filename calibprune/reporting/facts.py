"""Types of the contents of report.json, section by section. A section is None where its stage has not finished."""

from typing import Any, NotRequired, TypedDict


class StageFacts(TypedDict):
    """A finished stage, over all drivers that worked on it."""

    seconds: float
    """Working time of all drivers together."""
    drivers: int
    """Number of drivers that worked on it: more than one where the run was resumed."""
    losses: list[str]
    """One line for every engine, worker, node or unit of work that was lost."""


class ModelFacts(TypedDict):
    """The dense model."""

    path: str
    architecture: str
    parameters: int
    prunable_parameters: int
    layers: int
    dtype: str


class SetAside(TypedDict):
    """A shard of samples that failed repeatedly and was given up."""

    reason: str
    rows: list[int]
    """The first row, and the row after the last."""


class GenerateFacts(TypedDict):
    """The samples that the model wrote."""

    samples: int
    tokens: int
    tokens_per_second: float | None
    """Speed while engines were ready; None where it is unknown."""
    finish_reasons: dict[str, int]
    """Number of samples by the reason for which their generation ended, as vLLM names it."""
    set_aside: list[SetAside]


class SampleText(TypedDict):
    """One generated sample to read."""

    row: int
    perplexity: float
    tokens: int
    prefix: str
    """The text that the model was given."""
    text: str
    """The text that the model wrote after it."""


class Histogram(TypedDict):
    """Number of values between consecutive `edges`; both lists are empty where there are no values."""

    edges: list[float]
    counts: list[int]


class PerplexityHistogram(Histogram):
    """Perplexity of samples; the edges have equal ratios."""

    median: float | None


class CutHistogram(PerplexityHistogram):
    """Perplexity of all samples before any filter."""

    cut: float | None
    """Perplexity above which the filter dropped samples; infinite where it dropped only those without one."""


class BeforeAfter(TypedDict):
    """Two histograms of the samples over the same edges: before and after all filters."""

    edges: list[float]
    before: list[int]
    after: list[int]


class FilterStep(TypedDict):
    """The samples that a filter kept and dropped."""

    filter: str | None
    """Type of the filter; None for the first step, before any."""
    kept: int
    dropped: int
    perplexity: PerplexityHistogram


class SourceFacts(TypedDict):
    """The contribution of one source to the calibration pool."""

    samples: int
    tokens: int
    kept: int
    """Samples that passed all filters."""
    used: int
    """Samples that fill the pool, in whole or in part."""
    used_tokens: int
    sequences: int


class Duplicates(TypedDict):
    """Samples that equal an earlier one."""

    exact: int
    near: int | None
    """Samples that nearly equal an earlier one; None where no filter looked for them."""


class Vocabulary(TypedDict):
    """Size of the text that was read of one source or reference, in documents, tokens and n-grams."""

    documents: int
    tokens: int
    distinct_tokens: int
    ngrams: int
    distinct_ngrams: int


class Likeness(TypedDict):
    """Similarity of a source to a reference."""

    jaccard: float
    """Jaccard similarity of the two sets of n-grams."""
    coverage: float
    """Share of the source's n-grams that the reference contains."""
    unigram_js: float
    """Jensen-Shannon divergence of the two token distributions, in bits."""


class Scores(TypedDict):
    """Min-K%++ scores of one source's or reference's documents."""

    documents: int
    mean: float
    median: float
    values: Histogram
    """Histogram over edges that all sources and references share."""


class MinKFacts(TypedDict):
    share: float
    """Share of a document's tokens, the least expected ones, whose mean score is the document's score."""
    sources: dict[str, Scores]
    references: dict[str, Scores]


class AnalysisFacts(TypedDict):
    """The sources compared with reference corpora."""

    ngram: int
    vocabulary: dict[str, dict[str, Vocabulary]]
    """Sizes by "sources" or "references", then by name."""
    similarity: dict[str, dict[str, Likeness]]
    """Similarities by source, then by reference; empty without references."""
    similarity_tokens: int
    """Number of tokens, from the start of each source and reference, that were compared."""
    min_k: MinKFacts | None


class CurateFacts(TypedDict):
    """The calibration pool and the samples that it was selected from."""

    samples: int
    kept: int
    """Samples that passed all filters."""
    used: int
    """Samples that fill the pool, in whole or in part."""
    dropped: dict[str, int]
    """Number of dropped samples by type of filter."""
    sequences: int
    sequence_tokens: int
    tokens: int
    sources: dict[str, SourceFacts]
    steps: list[FilterStep]
    """The samples before any filter, then after each."""
    perplexity: CutHistogram
    lengths: BeforeAfter
    """Number of tokens of a sample."""
    repetition: BeforeAfter
    """Share of a sample's n-grams that occurred in it before."""
    repeats: BeforeAfter
    """Number of tokens of the longest passage that occurs twice in a sample."""
    duplicates: Duplicates
    analysis: NotRequired[AnalysisFacts]


class LinearFacts(TypedDict):
    """One pruned linear."""

    parameters: int
    sparsity: float
    relative_error: float
    """Norm of its output's change on calibration text, over that of the output; infinite where only the latter is 0."""
    unrefined_error: NotRequired[float]
    """The relative error before the refinement; absent without one."""
    damping: NotRequired[float]
    """The damping that the method took, where it had to be raised; absent elsewhere."""


class LayerFacts(TypedDict):
    """One pruned decoder layer."""

    layer: int
    worker: int
    """Rank of the worker that wrote the layer."""
    workers: int
    seconds: dict[str, float]
    """That worker's seconds by kind of work."""
    bytes_read: int
    bytes_written: int
    peak_memory_bytes: int
    peak_reserved_bytes: NotRequired[int]
    """Peak memory of a GPU including the gaps between allocations; absent on CPUs."""
    linears: dict[str, LinearFacts]
    kept_dense: list[str]


class PruneFacts(TypedDict):
    """The pruned model, with the settings and totals of the pruning."""

    method: str
    pattern: str
    allocation: str
    refine: str | None
    parameters: int
    """Parameters of the linears that were pruned."""
    workers: int | None
    bytes_read: int | None
    bytes_written: int
    layers: list[LayerFacts]


class EvaluateFacts(TypedDict):
    """Held-out perplexity on one text."""

    dense: float
    pruned: float
    sequence_tokens: int
    sequences: int


class Report(TypedDict):
    """All of report.json."""

    calibprune: str
    """Version of calibprune."""
    created_at: str
    """Time in ISO 8601."""
    config: dict[str, Any]
    versions: dict[str, str] | None
    """Versions that the results depend on; None where an older run did not record them."""
    model: ModelFacts | None
    """The dense model; None where an older run did not record these facts and the model is gone."""
    stages: dict[str, StageFacts]
    """Every finished stage by its name."""
    generate: GenerateFacts | None
    curate: CurateFacts | None
    samples: list[SampleText]
    prune: PruneFacts | None
    sparsity: float | None
    """Share of the pruned linears' weights that are zero."""
    perplexity: dict[str, EvaluateFacts]
    """Held-out perplexities by the name of the text."""
