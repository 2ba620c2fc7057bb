"""README.md and docs/ against what they describe: commands, settings, files, links, messages and metrics exist.

Nothing is run here. Command lines are parsed by the command's own parser, overrides are read into a configuration.
"""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import botocore.session
import pytest
import typer
import yaml
from botocore.validate import ParamValidator
from pydantic import BaseModel
from ray.scripts import scripts as ray_scripts

from calibprune.config import Config
from calibprune.config.load import load_config, presets
from calibprune.config.model import ClusterSettings
from calibprune.events import SET_ASIDE, Lost
from jobs.__main__ import app
from jobs.stages import COMMANDS

ROOT = Path(__file__).parents[1]
README, OPERATING = ROOT / "README.md", ROOT / "docs" / "operating.md"
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md")
CHECKED = DOCUMENTS[:-1]
"""Documents in which every command and setting is checked. Figures keep the commands that they were measured with."""
DEMO = str(ROOT / "configs" / "demo.yaml")
PACKAGES = ("calibprune", "cluster", "jobs")
SECTIONS = "|".join(Config.model_fields)


# -- what a document holds ----------------------------------------------------------------------------


def blocks(document: Path, language: str = "") -> list[str]:
    """The contents of the fenced blocks in a language; those without one are commands, listings and trees."""
    found = re.findall(
        r"^( *)```(\w*)\n(.*?)^\1```$", document.read_text(), re.MULTILINE | re.DOTALL
    )
    return [text for _, kind, text in found if kind == language]


def prose(document: Path) -> str:
    """The text outside of fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(document: Path) -> list[str]:
    """Lists what is in backticks, outside of fenced blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


def commands(document: Path) -> list[list[str]]:
    """The command lines in fenced blocks, as words without comments."""
    lines = chain.from_iterable(block.splitlines() for block in blocks(document))
    program = re.compile(r" *(calibprune|python|make|ray|source|export|chmod|aws) ")
    return [shlex.split(line, comments=True) for line in lines if program.match(line)]


def tables(document: Path) -> Iterator[list[list[str]]]:
    """The rows of every table, the heading first, each cell as it is written."""
    for table in re.findall(r"(?:^\|.*\n)+", document.read_text(), re.MULTILINE):
        yield [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()]


def table_of(document: Path, heading: str) -> list[list[str]]:
    """The rows below that heading of the first column. Raises StopIteration where there is no such table."""
    return next(rows[2:] for rows in tables(document) if rows[0][0].strip("| ") == heading)


def named(cell: str) -> str:
    """The first word in backticks of a cell."""
    found = re.search(r"`([^`]+)`", cell)
    assert found, f"{cell} names nothing"
    return found[1]


# -- commands -----------------------------------------------------------------------------------------


def parsed(program: Any, words: list[str]) -> dict[str, Any]:
    """The options and arguments that the innermost command makes of the words.

    Raises UsageError for an option, a value or a number of arguments that it refuses.
    """
    command, rest = program, words
    while hasattr(command, "commands"):
        context = command.make_context(command.name, rest)
        name, *rest = [*context._protected_args, *context.args]
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    return command.make_context(command.name, rest).params


@cache
def calibprune() -> Any:
    return typer.main.get_command(app)


def check_calibprune(words: list[str]) -> None:
    """Parses a command of ours; loads the configuration that it names, or the demo's in the place of CONFIG."""
    params = parsed(calibprune(), words)
    if (path := params.get("config")) is not None:
        assert path == "CONFIG" or (ROOT / path).is_file(), f"there is no {path}"
        load_config(DEMO if path == "CONFIG" else str(ROOT / path), params["overrides"] or ())


def check_command(words: list[str]) -> None:
    """Raises where a command line names a program, option, target or file that does not exist."""
    match words:
        case ["calibprune", *rest] | ["python", "-m", "jobs", *rest]:
            check_calibprune(rest)
        case ["python", script, *rest]:
            assert (ROOT / script).is_file(), f"there is no {script}"
            for option in (word for word in rest if word.startswith("--")):
                assert f'"{option}"' in (ROOT / script).read_text(), f"there is no {option}"
        case ["make", target]:
            known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert target in known, f"there is no target {target}"
        case ["ray", *rest]:
            if "--" in rest:
                place = rest.index("--")
                rest, inner = rest[:place], rest[place + 1 :]
                check_command(inner)
            parsed(ray_scripts.cli, [*rest, "true"] if rest[:2] == ["job", "submit"] else rest)
        case ["source" | "export" | "chmod" | "aws", *_]:
            pass
        case _:
            raise AssertionError(f"not a command that is known here: {words}")


@pytest.mark.parametrize("document", CHECKED, ids=lambda document: document.name)
def test_commands_exist_with_their_options_files_and_overrides(document):
    found = commands(document)
    assert len(found) > 5
    for words in found:
        check_command(words)


@pytest.mark.parametrize("document", CHECKED, ids=lambda document: document.name)
def test_commands_named_in_sentences_exist(document):
    for span in spans(document):
        words = shlex.split(span) if span.startswith(("calibprune ", "make ", "ray ")) else []
        if len(words) == 2 and words[0] == "calibprune":
            assert words[1] in calibprune().commands or words[1].startswith("--"), span
        elif words[:1] in (["calibprune"], ["make"]):
            check_command(words)
        elif words:
            assert words[1] in ray_scripts.cli.commands, span


def test_benchmarks_that_made_the_figures_exist_with_their_options():
    found = [span for span in spans(DOCUMENTS[-1]) if span.startswith("python benchmarks/")]
    assert len(found) > 8
    for span in found:
        check_command(shlex.split(span))


@pytest.mark.parametrize(
    "line",
    [
        "calibprune chek configs/demo.yaml",
        "calibprune check configs/demo.yaml --clutser",
        "calibprune run configs/gone.yaml",
        "calibprune run configs/demo.yaml prune.sparsty=0.6",
        "calibprune status",
        "make demos",
        "python benchmarks/gone.py",
        "python benchmarks/sizing.py --mgu 0.4",
        "ray start --heads",
        "ray job submit --address x -- calibprune run configs/gone.yaml",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line):
    with pytest.raises(Exception, match=r"there is no|[Nn]o such|unknown key|Missing"):
        check_command(shlex.split(line))


# -- settings -----------------------------------------------------------------------------------------


def models(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes in a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inner = get_args(annotation)[: 1 if get_origin(annotation) is Annotated else None]
    return [model for one in inner for model in models(one)]


def fields(key: str) -> list[Any]:
    """The types of the settings with that dotted key. Raises AssertionError for one that does not exist."""
    found: list[Any] = [Config]
    for part in key.split("."):
        of_models = [model.model_fields for one in found for model in models(one)]
        found = [known[part].annotation for known in of_models if part in known]
        assert found, f"there is no setting {key}"
    return found


def kinds(key: str) -> dict[str, type[BaseModel]]:
    """The classes that a section or list may be of, by their `type`."""
    of_key = [model for one in fields(key) for model in models(one)]
    return {get_args(model.model_fields["type"].annotation)[0]: model for model in of_key}


@pytest.mark.parametrize("document", CHECKED, ids=lambda document: document.name)
def test_settings_exist_and_take_the_values_shown(document):
    found = [span for span in spans(document) if re.match(rf"(?:{SECTIONS})\.[a-z_]", span)]
    assert len(found) > 5
    for span in found:
        fields(span.partition("=")[0])
        if "=" in span:
            load_config(DEMO, shlex.split(span) if "'" in span else [span])


@pytest.mark.parametrize(
    ("heading", "key"),
    [
        ("`prune.method.type`", "prune.method"),
        ("`prune.allocation.type`", "prune.allocation"),
        ("`generate.prefixes.type`", "generate.prefixes"),
        ("`curate.filters`", "curate.filters"),
    ],
)
def test_tables_of_types_are_complete_and_name_settings_that_exist(heading, key):
    known, rows = kinds(key), table_of(README, heading)
    assert [named(row[0]) for row in rows] == list(known)
    for row in rows:
        settings = known[named(row[0])].model_fields
        for span in re.findall(r"`(\w+)(?:: \w+)?`", " ".join(row[1:])):
            assert span in settings, f"{named(row[0])} has no {span}"


def test_the_cluster_section_is_described_whole():
    rows = table_of(OPERATING, "setting")
    described = {named(row[0]).removeprefix("cluster.") for row in rows}
    assert described == ClusterSettings.model_fields.keys()


def test_presets_are_named():
    (paragraph,) = re.findall(r"^`calibprune presets`.*?\n\n", README.read_text(), re.M | re.S)
    for name in presets():
        assert f"`{name}`" in paragraph


def test_stages_are_drawn_in_order():
    assert re.findall(r"^  \| (\w+) ", README.read_text(), re.MULTILINE) == list(COMMANDS)


# -- files and links ----------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in words}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(document))
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_programs_and_configurations_that_are_named_exist(document):
    named_files = re.findall(
        r"(?:configs|benchmarks|calibprune|cluster|jobs|tests)/[\w/.-]+\.(?:py|yaml|sbatch|txt|png)\b",
        document.read_text(),
    )
    assert named_files
    for name in named_files:
        assert (ROOT / name).is_file(), name


def tree() -> dict[str, str]:
    """The files and folders that the README's tree names, by path, with the line that names them."""
    (text,) = (block for block in blocks(README) if block.startswith("calibprune/"))
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r" {2,}", line.strip())[0].split()
        parent = "".join(folders[:depth])
        if names[0].endswith("/"):
            folders[depth:] = [names[0]]
        for name in names:
            found[parent + name] = line
    return found


def test_the_tree_names_every_module_and_nothing_else():
    found = tree()
    for path, line in found.items():
        assert (ROOT / path).exists(), f"{path} is not there: {line}"
    for package in PACKAGES:
        for module in (ROOT / package).rglob("*.py"):
            path = str(module.relative_to(ROOT))
            assert path in found or module.name == "__init__.py", f"{path} is not in the tree"
        for folder in (path for path in (ROOT / package).iterdir() if path.is_dir()):
            name = f"{folder.relative_to(ROOT)}/"
            is_named = any(path.startswith(name) for path in found)
            assert is_named or folder.name == "__pycache__", f"{name} is not in the tree"


def test_deploy_files_are_listed():
    deploy = ROOT / "cluster" / "deploy"
    listed = [
        name for row in table_of(OPERATING, "file") for name in re.findall(r"`([^`]+)`", row[0])
    ]
    there = {str(path.relative_to(deploy)) for path in deploy.rglob("*") if path.is_file()}
    assert set(listed) == there - {"constraints.txt"}


def test_the_method_shown_is_the_one_in_the_code():
    (block,) = blocks(README, "python")
    code = [line.split("#")[0].strip() for line in block.splitlines()]
    source = "".join(
        (ROOT / "calibprune" / name).read_text()
        for name in ("config/prune.py", "pruning/methods.py")
    )
    for line in filter(None, code):
        assert line in source, line
    lines = (ROOT / "calibprune" / "pruning" / "ria.py").read_text().splitlines()
    assert f"({len(lines)} lines)" in README.read_text()


def test_extras_exist():
    project = (ROOT / "pyproject.toml").read_text()
    for document in DOCUMENTS:
        for extra in re.findall(r"(?:calibprune|\.)\[(\w+)\]", document.read_text()):
            assert re.search(rf"^{extra} = ", project, re.MULTILINE), extra


# -- what is printed and measured ---------------------------------------------------------------------


def texts_in_code() -> list[str]:
    """Every text in the code of the packages; a line break stands for what an f-string puts in."""
    found = []
    for package in PACKAGES:
        for module in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(module.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else "\n" for p in node.values)
                    found.append("".join(map(str, parts)))
    return found


def fragments(message: str) -> list[str]:
    """The parts of a message that are the same each time: three words or more, with nothing variable in them."""
    words = re.sub(r"^(?:\w+: )?(?:(?:error|failed): )?(?:[A-Z]\w+: )?", "", message).split(" ")
    variable = re.compile(r"\.\.\.|[A-Z]{2}|\d|\w\.\w")
    kept = " ".join("\n" if variable.search(word) else word for word in words)
    parts = re.split(r"\n|; ", kept)
    return [part for one in parts if len((part := one.strip(" ;,:.()`")).split()) > 2]


def is_printed(part: str, texts: list[str]) -> bool:
    """Returns whether a part of a message is in the code; its last word may be a value that the code puts in."""
    shorter = part.rsplit(" ", 1)[0]
    parts = [part, shorter] if len(shorter.split()) > 2 else [part]
    return any(one in text for one in parts for text in texts)


def test_messages_are_those_of_the_code():
    texts = texts_in_code()
    messages = [
        message
        for row in table_of(OPERATING, "what happens")
        for message in re.findall(r"`([^`]+)`", row[1])
    ]
    told = [part for message in messages for part in fragments(message)]
    assert len(told) > 25
    for part in told:
        assert is_printed(part, texts), part


def test_losses_are_shown_as_they_are_logged():
    losses = [
        Lost("engine", "...", ("00002", "00003"), 1, "NODE", "engine 0"),
        Lost(SET_ASIDE, "...", ("00002",), 3),
        Lost("worker", "at layer 2: ...", ("layer-00002",), 1, "NODE", "worker 1"),
    ]
    for lost in losses:
        assert f": {lost}`" in OPERATING.read_text()


def test_a_message_that_changed_is_noticed():
    gave_up, losses = fragments("failed: WorkFailed: gave up after 3 losses in a row: ...")
    assert (gave_up, losses) == ("gave up after", "losses in a row")
    assert is_printed(losses, texts_in_code())
    assert not is_printed("losses in one row", texts_in_code())


def test_metrics_exist():
    source = (ROOT / "cluster" / "metrics.py").read_text()
    metrics = dict(re.findall(r'_metric\(\s*label, (\w+), "(\w+)"', source))
    kinds_of = {name: kind for kind, name in re.findall(r'label, (\w+), "(\w+)"', source)}
    assert metrics.keys() == {"Counter", "Gauge"}
    served = {f"{n}_total" if kind == "Counter" else n for n, kind in kinds_of.items()}
    named_here = [s for s in spans(OPERATING) if s.startswith("ray_calibprune_")]
    assert len(named_here) > 4
    for name in named_here:
        assert name.removeprefix("ray_calibprune_") in served, name


def test_the_lifecycle_rule_is_one_that_s3_takes():
    (rule,) = blocks(OPERATING, "json")
    operation = (
        botocore.session.get_session()
        .get_service_model("s3")
        .operation_model("PutBucketLifecycleConfiguration")
    )
    given = {"Bucket": "b", "LifecycleConfiguration": json.loads(rule)}
    problems = ParamValidator().validate(given, operation.input_shape)
    assert not problems.has_errors(), problems.generate_report()
    assert "AbortIncompleteMultipartUpload" in yaml.safe_load(rule)["Rules"][0]
