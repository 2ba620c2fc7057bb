"""Explains an invalid setting in one line: its key as in the file, the problem, and what would be right."""

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from calibprune.config import Config
from calibprune.redact import one_line

MAX_SHOWN = 100
"""Maximum characters of a value in a message."""
_IN_PLAIN_WORDS = {
    **dict.fromkeys(
        ("model_type", "model_attributes_type", "dict_type"),
        "this is a section, as in model.path=...",
    ),
    **dict.fromkeys(("tuple_type", "list_type"), "this is a list, as in [a, b]"),
    "too_short": "this list has {actual_length} entries, at least {min_length} is needed",
    "too_long": "this list has {actual_length} entries, at most {max_length} are possible",
}
"""Messages by pydantic's kind of error, where its own words are about Python."""


def explain(error: ValidationError, content: Any) -> str:
    """Describes the first problem of a validation of `content` in one line."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = _written_key(problem["loc"], content, problem["type"] == "missing")
    context = problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            valid = _valid_keys(Config, location[:-1]) | (set() if location[1:] else {"preset"})
            hint = suggestion(location[-1], sorted(valid), "valid here: ")
            return f"unknown key {key}: {hint}"
        case "missing":
            return f"{key} is missing"
        case "union_tag_invalid":
            tag, valid = context["tag"], context["expected_tags"].replace("'", "").split(", ")
            return f"{key}: there is no {tag!r}: {suggestion(tag, valid, 'it is one of ')}"
        case "union_tag_not_found":
            return f"{key}: its type is missing, as in {key}.type=..."
    message = _IN_PLAIN_WORDS.get(problem["type"], "").format(**context)
    message = message or problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = ""
    if isinstance(given, str | int | float | bool) and "credentials" not in message:
        shown = f" (given: {one_line(repr(given), MAX_SHOWN)})"
    return f"{key}: {message}{shown}"


def suggestion(given: str, known: Iterable[str], otherwise: str) -> str:
    """Suggests the nearest of the known names or, where none is near, lists them all after `otherwise`."""
    known = list(known)
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else otherwise + ", ".join(known)


def _written_key(location: Sequence[int | str], content: Any, missing: bool) -> str:
    """Returns the dotted key as in the file, without the tags and types that pydantic's unions insert.

    With `missing`, the last part is kept although it is not in the file.
    """
    parts = []
    for position, part in enumerate(location):
        last = position == len(location) - 1
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            if not (last and missing):
                continue
        parts.append(str(part))
    return ".".join(parts)


def _valid_keys(annotation: Any, location: Sequence[str]) -> set[str]:
    models = list(_models_in(annotation))
    if not location:
        return {name for model in models for name in model.model_fields}
    head, *tail = location
    keys: set[str] = set()
    for model in models:
        if head in model.model_fields:
            keys |= _valid_keys(model.model_fields[head].annotation, tail)
        elif "type" in model.model_fields and head in typing.get_args(
            model.model_fields["type"].annotation
        ):  # a discriminated union puts the tag into the location
            keys |= _valid_keys(model, tail)
    if head.isdigit():  # an index into a list
        keys |= _valid_keys(annotation, tail)
    return keys


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for argument in typing.get_args(annotation):
            yield from _models_in(argument)
