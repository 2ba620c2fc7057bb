"""evaluate and report: what the pruned model is held against, and what is shown."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from calibprune.config.base import NonNegativeInt, PositiveInt, Section, Url, named


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


class TrackingSettings(Section):
    """Experiment tracking by one of these libraries, which finds its server and credentials where it always does."""

    type: Literal["mlflow", "wandb", "trackio"]
    project: Annotated[str, Field(min_length=1, max_length=128)] = "calibprune"
    """MLflow calls it experiment."""
    name: str | None = None
    """Of the run there; None: the last part of `output`."""


class ReportSettings(Section):
    sample_texts: NonNegativeInt = 3
    tracking: Annotated[TrackingSettings | None, BeforeValidator(named)] = None
