"""evaluate and report: what the pruned model is held against, and what is shown."""

from typing import Annotated

from pydantic import Field, field_validator

from calibprune.config.base import NonNegativeInt, PositiveInt, Section, Url


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
