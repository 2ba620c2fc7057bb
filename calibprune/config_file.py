"""Reading a configuration: YAML plus `key.path=value` overrides, and what is wrong with it told in one line."""

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from calibprune import storage
from calibprune.config import Config
from calibprune.errors import UserError


class _PlainNumbers(yaml.SafeLoader):
    """YAML whose numbers are what they look like: 2:4 is a pattern, not 124 in base 60, and 1e-3 is a number."""


_PlainNumbers.yaml_implicit_resolvers = {
    sign: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":int", ":float"))]
    for sign, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainNumbers.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9][0-9_]*$"), list("-+0123456789")
)
_PlainNumbers.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$",
        re.I,
    ),
    list("-+.0123456789"),
)


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `key.path=value` overrides and validates.

    Raises UserError naming the file, the key, the value and, for an unknown key, the nearest valid one.
    """
    try:
        tree = OmegaConf.create(yaml.load(storage.read_bytes(path).decode(), _PlainNumbers) or {})
    except FileNotFoundError:
        raise UserError(f"no configuration at {path}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    try:
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not key:
                raise UserError(f"an override is key.path=value, not {override!r}")
            _spell_out(tree, key)
            OmegaConf.update(
                tree, key, yaml.load(value, _PlainNumbers), merge=False, force_add=True
            )
        content = OmegaConf.to_container(tree, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, content)}") from None


def _spell_out(tree: Any, key: str) -> None:
    """Makes `type: name` of names that stand alone on the way to the key, so that a setting can go beside them."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        above = ".".join(parts[:end])
        name = OmegaConf.select(tree, above)
        if isinstance(name, str):
            OmegaConf.update(tree, above, {"type": name}, merge=False)


def explain(error: ValidationError, content: Any) -> str:
    """The first problem of a validation in one line: key, what is wrong, what would be right."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = _written_key(problem["loc"], content)
    if problem["type"] == "extra_forbidden":
        valid = sorted(_valid_keys(Config, location[:-1]))
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(valid)}"
        return f"unknown key {key}: {hint}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    context = problem.get("ctx", {})
    if problem["type"] == "union_tag_invalid":
        tag, valid = context["tag"], context["expected_tags"].replace("'", "")
        near = difflib.get_close_matches(tag, valid.split(", "), n=1, cutoff=0.5)
        return f"{key}: there is no {tag!r}: " + (
            f"did you mean {near[0]}?" if near else f"it is one of {valid}"
        )
    if problem["type"] == "union_tag_not_found":
        return f"{key}: its type is missing, as in {key}.type=..."
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    if "credentials" in message:
        shown = ""
    return f"{key}: {message}{shown}"


def _written_key(location: Sequence[int | str], content: Any) -> str:
    """The dotted key as it stands in the file: without the tags that discriminated unions put in between."""
    parts = []
    for position, part in enumerate(location):
        last = position == len(location) - 1
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            if not last:
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
