"""Reads a configuration: a preset, a YAML file on top of it, and `key.path=value` overrides on top of both.

Files and the values of overrides are YAML 1.2: 2:4 and yes are strings, 1e-3 is a number, and a key may occur only
once in a section. Nothing in them is substituted or executed.
"""

import copy
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError

from calibprune import storage
from calibprune.config import Config
from calibprune.config.explain import explain, suggestion
from calibprune.errors import UserError
from calibprune.redact import holds_credential, one_line

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
MAX_DIGITS = 40
"""Maximum bytes of a file, values in it, and digits of an integer: limits for untrusted input."""


def dump_config(config: Config) -> str:
    """Writes all settings as YAML, defaults and presets included; `load_config` reads the same settings from it."""
    yaml, stream = _yaml(), io.StringIO()
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `key.path=value` overrides, fills in the preset that these name, and validates.

    `path` may be a pipe. Raises UserError naming the file, the key, the value and, for an unknown key or preset, the
    nearest valid one.
    """
    tree = _read(path)
    pairs = [_parse_override(override) for override in overrides]
    presets_named = [tree.pop("preset", None), *(value for key, value in pairs if key == "preset")]
    preset_name = presets_named[-1]
    try:
        preset = {} if preset_name is None else read_preset(preset_name)
        for key, value in pairs:
            if key != "preset":
                _set(tree, preset, key, value)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    content = _over(preset, tree)
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        explained = explain(error, content)
        problem = error.errors()[0]
        if problem["type"] == "missing" and problem["loc"][0] in preset:
            key = explained.split()[0]
            explained += f": the preset {preset_name} leaves it to you, as in {key}=..."
        raise UserError(f"{path}: {explained}") from None
    for key, text in _texts(content):
        if holds_credential(text):
            raise UserError(
                f"{path}: {key} must not hold credentials, since settings are copied into records and reports: give "
                f"them to the store's own library instead"
            )
    return config


def presets() -> dict[str, str]:
    """Lists the shipped presets by name, each with a one-line description."""
    files = resources.files("calibprune").joinpath("presets").iterdir()
    lines = {file.name: file.read_text().splitlines()[0] for file in files}
    names = sorted(name.removesuffix(".yaml") for name in lines if name.endswith(".yaml"))
    return {name: lines[f"{name}.yaml"].removeprefix("# ") for name in names}


def read_preset(name: object) -> dict[str, Any]:
    """Reads a preset's settings. Raises UserError for an unknown name, suggesting the nearest one."""
    known = presets()
    if not isinstance(name, str):
        raise UserError("preset is a name and has no settings of its own, as in preset=bos")
    if name not in known:
        raise UserError(f"there is no preset {name!r}: {suggestion(name, known, 'there are ')}")
    file = resources.files("calibprune").joinpath("presets", f"{name}.yaml")
    return _yaml().load(file.read_text())


class _Settings(SafeConstructor):
    """Constructs plain values from YAML: dates as strings, integers of bounded length; refuses duplicate keys."""

    def check_mapping_key(
        self, node: Any, key_node: Any, mapping: Any, key: Any, value: Any
    ) -> bool:
        if key in mapping:
            first = next(one for one, _ in node.value if one.value == key_node.value)
            lines = first.start_mark.line + 1, key_node.start_mark.line + 1
            raise ConstructorError(
                problem=f"{key} is given in line {lines[0]} and again in line {lines[1]}: give it once"
            )
        return True

    def construct_yaml_int(self, node: Any) -> int:
        digits = len(node.value)
        if digits > MAX_DIGITS:
            raise ConstructorError(
                problem=f"a number of {digits} digits is too large for any setting",
                problem_mark=node.start_mark,
            )
        return super().construct_yaml_int(node)


_Settings.add_constructor("tag:yaml.org,2002:int", _Settings.construct_yaml_int)
_Settings.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Settings
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def _read(path: str) -> dict[str, Any]:
    try:
        text = _read_bytes(path).decode()
        content = _yaml().load(text)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no configuration at {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give the YAML file of a run") from None
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {one_line(error)}") from None
    except UserError:
        raise
    except Exception as error:  # untrusted input raises anything
        raise UserError(f"{path} is not valid YAML: {_problem(error)}") from None
    content = _plain({} if content is None else content, path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a configuration: it holds no sections")
    return content


def _read_bytes(path: str) -> bytes:
    """Reads the file once, from start to end, since it may be a pipe."""
    if storage.is_local(path):
        with Path(storage.resolve(path)[1]).open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    else:
        data = storage.read_bytes(path)
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES:,} bytes: that is not a configuration")
    return data


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"an override is key.path=value, not {one_line(repr(override))}")
    if key.startswith("preset."):
        raise UserError("preset is a name and has no settings of its own, as in preset=bos")
    if not value.strip():
        raise UserError(
            f"{key}= has no value: leave it out, or write {key}=null for a setting that may have none"
        )
    try:
        content = _yaml().load(value)
    except Exception as error:  # untrusted input raises anything
        raise UserError(
            f"the value of {key}=... is not valid YAML: {_problem(error, line=False)}"
        ) from None
    return key, _plain(content, key)


def _problem(error: Exception, line: bool = True) -> str:
    """Describes what a parser found wrong, without the lines that it quotes."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not isinstance(error, MarkedYAMLError):
        return one_line(error)
    where = f"line {error.problem_mark.line + 1}: " if line and error.problem_mark else ""
    return where + one_line(error.problem)


def _plain(content: Any, where: str) -> Any:
    """Copies parsed YAML into dicts with strings as keys, lists and single values, without sharing any.

    Raises UserError for too many values, as aliases of aliases create, and for `${...}`, which other tools replace.
    """
    count = itertools.count(1)

    def copied(value: Any, key: str) -> Any:
        if next(count) > MAX_VALUES:
            raise UserError(
                f"{where} holds more than {MAX_VALUES:,} values: that is not a configuration"
            )
        if isinstance(value, Mapping):
            return {
                str(name): copied(one, f"{key}.{name}".removeprefix("."))
                for name, one in value.items()
            }
        if isinstance(value, list | tuple | set):
            return [copied(one, f"{key}.{place}") for place, one in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            raise UserError(
                f"{where}: {key or 'its value'} holds ${{...}}, which is not replaced here: write the value itself, or "
                f"let the shell insert it into an override, as in output=$HOME/run"
            )
        return value

    try:
        return copied(content, "")
    except RecursionError:
        raise UserError(f"{where} is not valid YAML: it is nested too deeply") from None


def _texts(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted key, value) of every string in a tree of settings."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, Mapping | list):
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for name, value in items:
            yield from _texts(value, f"{key}.{name}".removeprefix("."))


def _over(below: Any, above: Any) -> Any:
    """Merges two trees of settings; `above` wins, and replaces a section of another `type` as a whole."""
    if isinstance(below, Mapping) and "type" in below:
        above = _as_section(above)
        if isinstance(above, Mapping) and above.get("type", below["type"]) != below["type"]:
            return above
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    merged = {key: _over(below[key], one) if key in below else one for key, one in above.items()}
    return {**below, **merged}


def _set(tree: dict[str, Any], preset: Mapping[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in the tree, and creates the sections on the way.

    A plain name on the way becomes `type: name`, so that a setting can be added to it. A preset's list of which an
    entry is changed is copied into the tree first, since lists are not merged.
    """
    *way, last = key.split(".")
    here: Any = tree
    below: Any = preset
    for depth, part in enumerate(way):
        above, following = ".".join(way[: depth + 1]), [*way, last][depth + 1]
        place = _place(here, part, key)
        below = below.get(part) if isinstance(below, Mapping) else None
        child = _as_section(here[place] if isinstance(here, list) else here.get(place))
        if child is None and following.isdigit():
            if not isinstance(below, list):
                raise UserError(
                    f"{key}: {above} has no entries to change yet: give the list, as in {above}=[...]"
                )
            child = copy.deepcopy(below)
        child = {} if child is None else child
        if not isinstance(child, dict | list):
            raise UserError(f"{key}: {above} is {child!r} and has no settings of its own")
        here[place] = here = child
    here[_place(here, last, key)] = value


def _place(here: dict[str, Any] | list[Any], part: str, key: str) -> Any:
    """Interprets a part of a key as a name in a section or an index into a list."""
    if isinstance(here, dict):
        return part
    if not (part.isascii() and part.isdigit() and len(part) < 9 and int(part) < len(here)):
        raise UserError(
            f"{key}: there is no entry {part}: the list has {len(here)}, numbered from 0"
        )
    return int(part)


def _as_section(value: Any) -> Any:
    """Turns a plain name into a section of that type with its defaults."""
    return {"type": value} if isinstance(value, str) else value
