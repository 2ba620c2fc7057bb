"""Reading a configuration: a preset, YAML, `key.path=value` overrides, and what is wrong with it told in one line."""

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from calibprune import storage
from calibprune.config import Config
from calibprune.config.base import named
from calibprune.errors import UserError
from calibprune.redact import holds_credential, one_line

_REFERENCE = re.compile(r"\$\{[\w.\[\]-]+\}")
"""To another setting. OmegaConf knows more, such as `${oc.env:NAME}`: a stranger's file must not read what is in the
environment, nor send it anywhere."""


MOST_VALUES = 100_000
IN_PLAIN_WORDS = {
    **dict.fromkeys(
        ("model_type", "model_attributes_type", "dict_type"), "a section, as in model.path=..."
    ),
    **dict.fromkeys(("tuple_type", "list_type"), "a list, as in [a, b]"),
}
"""What is expected, by pydantic's kind of error, where its own words are about Python."""


class _PlainNumbers(yaml.SafeLoader):
    """YAML whose numbers are what they look like: 2:4 is a pattern, not 124 in base 60, and 1e-3 is a number.

    A key stands once in a section: of two sections of one name, the first would be lost without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        _refuse_repeated_keys(node)
        return node


def _refuse_repeated_keys(node: Any) -> None:
    first: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        line = key.start_mark.line + 1
        if (key.tag, key.value) in first:
            raise yaml.YAMLError(
                f"{key.value} is given in line {first[key.tag, key.value]} and again in line {line}: give it once"
            )
        first[key.tag, key.value] = line


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


class _PlainWriter(yaml.SafeDumper):
    """Quotes every text that `_PlainNumbers` would take for a number."""


_PlainWriter.yaml_implicit_resolvers = _PlainNumbers.yaml_implicit_resolvers


def dump_config(config: Config) -> str:
    """YAML of all settings, defaults and presets written out; `load_config` makes the same settings of it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list):
            return [plain(one) for one in value]
        if isinstance(value, str):  # ${...} stands for another setting unless it is escaped
            return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
        return value

    content = plain(config.model_dump(mode="json"))
    return yaml.dump(content, Dumper=_PlainWriter, sort_keys=False, allow_unicode=True)


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `key.path=value` overrides, puts the preset that they name under it, and validates.

    Raises UserError naming the file, the key, the value and, for an unknown key or preset, the nearest valid one.
    """
    tree = _read(path)
    try:
        pairs = [_parse(override) for override in overrides]
        preset_name = (
            [value for key, value in pairs if key == "preset"] or [tree.pop("preset", None)]
        )[-1]
        tree.pop("preset", None)
        preset = {} if preset_name is None else read_preset(preset_name)
        for key, value in pairs:
            if key != "preset":
                _spell_out(tree, key)
                _take_list_over(tree, preset, key)
                OmegaConf.update(tree, key, value, merge=False, force_add=True)
        own = OmegaConf.to_container(tree, resolve=False)
        content = OmegaConf.to_container(OmegaConf.create(_over(preset, own)), resolve=True)  # type: ignore[arg-type]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        told = explain(error, content)
        problem = error.errors()[0]
        if problem["type"] == "missing" and problem["loc"][0] in preset:
            told += f": the preset {preset_name} leaves it to you, as in {told.split()[0]}=..."
        raise UserError(f"{path}: {told}") from None
    for key, text in _texts(content):
        if holds_credential(text):
            raise UserError(
                f"{path}: {key} holds no credentials: settings stand in records and reports; give them to the store's "
                f"own library instead"
            )
    return config


def presets() -> dict[str, str]:
    """The shipped presets by name, each with what it is in one line."""
    files = resources.files("calibprune").joinpath("presets").iterdir()
    lines = {file.name: file.read_text().splitlines()[0] for file in files}
    names = sorted(name.removesuffix(".yaml") for name in lines if name.endswith(".yaml"))
    return {name: lines[f"{name}.yaml"].removeprefix("# ") for name in names}


def read_preset(name: object) -> dict[str, Any]:
    """A preset's settings. Raises UserError for an unknown name, with the nearest."""
    known = presets()
    if not isinstance(name, str):
        raise UserError("preset is a name and has no settings of its own, as in preset=bos")
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"there is no preset {name!r}: {hint}")
    file = resources.files("calibprune").joinpath("presets", f"{name}.yaml")
    return yaml.load(file.read_text(), _PlainNumbers)


def _read(path: str) -> DictConfig:
    try:
        content = yaml.load(storage.read_bytes(path).decode(), _PlainNumbers) or {}
        _only_references(path, content)
        tree = OmegaConf.create(content)
    except FileNotFoundError:
        raise UserError(f"no configuration at {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give the YAML file of a run") from None
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path} is not a configuration: it holds no sections")
    return tree


def _parse(override: str) -> tuple[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"an override is key.path=value, not {override!r}")
    if key.startswith("preset."):
        raise UserError("preset is a name and has no settings of its own, as in preset=bos")
    if not value.strip():
        raise UserError(
            f"{key}= gives no value: leave it out, or write {key}=null where it may have none"
        )
    try:
        content = yaml.load(value, _PlainNumbers)
    except (yaml.YAMLError, RecursionError) as error:
        problem = one_line(getattr(error, "problem", None) or error)
        raise UserError(f"the value of {key}=... is not valid YAML: {problem}") from None
    _only_references(key, content)
    return key, content


def _only_references(where: str, content: Any) -> None:
    for count, (key, text) in enumerate(_texts(content)):
        if count > MOST_VALUES:
            raise UserError(
                f"{where} holds more than {MOST_VALUES} values: that is no configuration"
            )
        if "${" in _REFERENCE.sub("", text):
            raise UserError(
                f"{where}: {key or 'its value'} holds ${{...}} that is no reference to a setting: the environment is "
                f"not read from a file; let the shell put it into an override, such as output=$HOME/run"
            )


def _texts(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a tree of settings with its dotted key; lists and sections as empty texts."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, Mapping | list):
        yield key, ""
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for name, value in items:
            yield from _texts(value, f"{key}.{name}".removeprefix("."))


def _over(below: Any, above: Any) -> Any:
    """Sections merged, the upper one winning; one of another `type` takes the lower one's place as a whole."""
    if isinstance(below, Mapping) and "type" in below:
        above = named(above)
        if isinstance(above, Mapping) and above.get("type", below["type"]) != below["type"]:
            return above
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    return {
        **below,
        **{
            key: _over(below[key], value) if key in below else value for key, value in above.items()
        },
    }


def _take_list_over(tree: DictConfig, preset: dict[str, Any], key: str) -> None:
    """Copies a preset's list into the tree where a key changes one of its entries: lists are not merged."""
    parts = key.split(".")
    for end, part in enumerate(parts):
        above = ".".join(parts[:end])
        if part.isdigit() and OmegaConf.select(tree, above) is None:
            entries = OmegaConf.select(OmegaConf.create(preset), above)
            if entries is not None:
                OmegaConf.update(tree, above, entries, force_add=True)


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
    key = _written_key(problem["loc"], content, problem["type"] == "missing")
    if problem["type"] == "extra_forbidden":
        valid = sorted(
            _valid_keys(Config, location[:-1]) | ({"preset"} if not location[:-1] else set())
        )
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
    expected = IN_PLAIN_WORDS.get(problem["type"])
    message = expected and f"this is {expected}"
    message = message or problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    if "credentials" in message:
        shown = ""
    return f"{key}: {message}{shown}"


def _written_key(location: Sequence[int | str], content: Any, missing: bool) -> str:
    """The dotted key as it stands in the file: without the tags and kinds that unions put in between and at the end.

    `missing`: the last part does not stand there, and is the one to name.
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
