"""curate: sources side by side, filters, reference corpora for a comparison, and the packing of the pool."""

import posixpath
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from calibprune.config.base import (
    NonNegativeInt,
    PositiveInt,
    Section,
    SourceName,
    TextSource,
    Url,
)

Share = Annotated[float, Field(ge=0, lt=1)]
MAX_FILTERS = 63
"""Number of filters, with four clauses each, that a mark of one byte can distinguish (calibration/filters.py)."""


class Sharing(Section):
    """The part of the pool that a source contributes."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the pool, relative to the other sources without `budget_tokens`."""
    budget_tokens: PositiveInt | None = None
    """Tokens of this source in the pool, regardless of the weights."""


class GeneratedSource(Sharing):
    """Samples that `generate` made."""

    type: Literal["generated"]
    name: SourceName = "self-generated"
    path: Url | None = None
    """The `generate` folder of another run of the same model; None: that of this run."""


class NaturalSource(TextSource, Sharing):
    """Documents that people wrote."""

    type: Literal["text"]
    name: SourceName
    documents: PositiveInt = 5000
    """Maximum number of documents to read, from the start of the source."""
    document_tokens: PositiveInt | None = None
    """Maximum tokens to take of one document, from its start; None: those of one sequence."""
    bos: bool = True
    """Whether a start-of-text token goes in front of every document."""


Source = Annotated[GeneratedSource | NaturalSource, Field(discriminator="type")]


class PerplexityFilter(Section):
    """Drops the samples that the model itself finds least likely (Ji et al. 2025, section 4) or most likely.

    Shares apply to each source separately."""

    type: Literal["perplexity"]
    drop_worst: Share = 0.2
    """Share of samples to drop, those with the highest perplexity."""
    drop_best: Share = 0.0
    """Share of samples to drop, those with the lowest perplexity: often repetitions."""
    least: Annotated[float, Field(ge=1)] | None = None
    """Lowest perplexity of a sample that is kept; None: any."""
    most: Annotated[float, Field(ge=1)] | None = None
    """Highest perplexity of a sample that is kept; None: any."""

    @model_validator(mode="after")
    def _something_stays(self) -> Self:
        if self.drop_worst + self.drop_best >= 1:
            raise ValueError(
                "drop_worst and drop_best leave nothing: their sum must be less than 1"
            )
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"least {self.least:g} is above most {self.most:g}")
        return self


class LengthFilter(Section):
    """Drops samples with fewer than `min_tokens` or more than `max_tokens`, prefix included."""

    type: Literal["length"]
    min_tokens: PositiveInt = 32
    max_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens {self.max_tokens} is under min_tokens {self.min_tokens}")
        return self


class RepetitionFilter(Section):
    """Drops samples that repeat themselves."""

    type: Literal["repetition"]
    ngram: PositiveInt = 4
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Largest share of a sample's n-grams that may have occurred in it before."""
    max_repeat_tokens: PositiveInt | None = None
    """Maximum tokens of a passage that occurs twice in a sample; None: any number."""


class DuplicateFilter(Section):
    """Drops all but the first of equal samples and, by MinHash, of nearly equal ones."""

    type: Literal["duplicates"]
    near: bool = True
    similarity: Annotated[float, Field(ge=0.5, lt=1)] = 0.8
    """Jaccard similarity of n-grams from which on samples count as nearly equal. Prefixes and prompts do not count, nor
    do they for repetitions."""
    ngram: PositiveInt = 5
    permutations: Annotated[int, Field(ge=64, le=512)] = 128


Filter = Annotated[
    PerplexityFilter | LengthFilter | RepetitionFilter | DuplicateFilter,
    Field(discriminator="type"),
]


class Reference(TextSource):
    """A corpus to compare the sources with, such as the model's training data."""

    name: SourceName


class AnalysisSettings(Section):
    """The comparison of the sources with the reference corpora."""

    documents: PositiveInt = 500
    """Number of documents of every source and of every reference that are compared."""
    ngram: PositiveInt = 3
    min_k: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the least likely tokens that Min-K%++ (Zhang et al. 2025) averages, such as 0.5; None: not measured,
    since it takes forwards of the model."""
    min_k_documents: PositiveInt = 64
    min_k_tokens: Annotated[int, Field(ge=2)] = 512


class CurateSettings(Section):
    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = (
        GeneratedSource(type="generated"),
    )
    filters: Annotated[tuple[Filter, ...], Field(max_length=MAX_FILTERS)] = (
        PerplexityFilter(type="perplexity"),
    )
    references: tuple[Reference, ...] = ()
    analysis: AnalysisSettings = AnalysisSettings()
    sequences: PositiveInt = 128
    sequence_tokens: Annotated[int, Field(ge=2)] = 2048
    tokens: PositiveInt | None = None
    """Tokens of the whole pool, rounded up to whole sequences; None: those of `sequences`."""
    pack: Literal["concat", "document"] = "concat"
    """`concat`: kept samples, joined in random order and cut; `document`: the first tokens of long enough samples."""
    positions: Literal["all", "generated"] = "all"
    """Positions that statistics include: with `generated` not those of prefixes and prompts, which the model did not
    write, nor of the start-of-text token in front of a document."""
    seed: NonNegativeInt = 0

    @field_validator("sources", "references")
    @classmethod
    def _names_differ(cls, named: tuple) -> tuple:
        names = [one.name for one in named]
        if len(set(names)) < len(names):
            raise ValueError(f"each needs a name of its own, not {', '.join(names)}")
        return named

    @field_validator("sources")
    @classmethod
    def _each_once(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        generated = [one.path for one in sources if isinstance(one, GeneratedSource)]
        paths = [path and posixpath.normpath(path) for path in generated]
        if len(set(paths)) < len(paths):
            raise ValueError(
                "two generated sources take the same samples: give each a path of its own"
            )
        return sources

    @property
    def pool_sequences(self) -> int:
        """Number of sequences in the pool."""
        if self.tokens is None:
            return self.sequences
        return -(-self.tokens // self.sequence_tokens)
