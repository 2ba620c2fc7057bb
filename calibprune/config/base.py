"""Building blocks of all settings: a frozen section that rejects unknown keys, and types that check their values."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _without_credentials(url: str) -> str:
    """Refuses passwords in any URL, and tokens and signatures in web addresses."""
    password = re.search(r"[\w+.-]+://[^/@]*:[^/@]*@|https?://[^/@]*@", url)
    if password or re.search(
        r"://.*[?&][^=&]*(sig|token|key|secret|credential|password)", url, re.I
    ):
        raise ValueError(
            "URLs must not hold credentials: give them to the store's own library instead"
        )
    return url


def _regular_expression(expression: str) -> str:
    try:
        re.compile(expression)
    except (re.error, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from None
    except RecursionError:
        raise ValueError("not a regular expression: it is nested too deeply") from None
    return expression


def named(value: object) -> object:
    """Turns a plain name into a section of that type with its defaults."""
    return {"type": value} if isinstance(value, str) else value


Url = Annotated[str, AfterValidator(_without_credentials)]
"""A path or an fsspec URL. Settings are copied into records and reports, so they must not hold credentials."""
Regex = Annotated[str, AfterValidator(_regular_expression)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=60)]
"""A name that is used in records, plots and file names."""


class TextSource(Section):
    """A place that documents come from."""

    path: Url
    """A text (one document per line), jsonl or parquet file or folder, local or by URL, or a Hugging Face dataset id.

    An id may be written hf://datasets/org/name, so that it cannot be mistaken for a local folder.
    """
    dataset_name: str | None = None
    """The configuration of a Hugging Face dataset, such as `en`."""
    split: str = "train"
    column: str = "text"
