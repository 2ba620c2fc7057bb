"""evaluate and report: the texts that the pruned model is measured on, and the contents of the report."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from calibprune.config.base import NonNegativeInt, PositiveInt, Section, Url, named


class HeldOutText(Section):
    """A text to measure the perplexity on; `path` is that of a text source, or `python-docs`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    path: Url
    dataset_name: str | None = None
    split: str = "test"
    column: str = "text"
    separator: str = "\n\n"
    """Text put between two documents before the whole is cut into windows."""


class EvaluateSettings(Section):
    perplexity: tuple[HeldOutText, ...] = ()
    sequence_tokens: Annotated[int, Field(ge=2)] = 2048
    sequences: PositiveInt | None = None
    """Maximum number of windows of a text; None: all of it."""
    batch_sequences: PositiveInt = 1
    offload: bool | None = None
    """Whether paused forwards keep their state in host memory; None: if it does not fit the GPU. Ignored on CPUs."""

    @field_validator("perplexity")
    @classmethod
    def _names_differ(cls, texts: tuple[HeldOutText, ...]) -> tuple[HeldOutText, ...]:
        names = [text.name for text in texts]
        if len(set(names)) < len(names):
            raise ValueError(f"every text needs a name of its own, not {', '.join(names)}")
        return texts


class TrackingSettings(Section):
    """Experiment tracking with one of these libraries, which finds its server and credentials in its usual way."""

    type: Literal["mlflow", "wandb", "trackio"]
    project: Annotated[str, Field(min_length=1, max_length=128)] = "calibprune"
    """Name of the project, called experiment in MLflow."""
    name: str | None = None
    """Name of the tracked run; None: the last part of `output`."""


class ReportSettings(Section):
    sample_texts: NonNegativeInt = 3
    tracking: Annotated[TrackingSettings | None, BeforeValidator(named)] = None
