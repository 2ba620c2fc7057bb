"""Events as text and as JSON lines, by the real handlers on the project's logger."""

import json
import logging

import pytest

from calibprune.events import (
    LayerEntered,
    Lost,
    Note,
    Resumed,
    StageBegun,
    StageEnded,
    StageSkipped,
    UnitDone,
    emit,
    note,
)
from calibprune.stage import Record
from jobs import output


def unit(name: str, **facts: object) -> UnitDone:
    return UnitDone(Record(name, None, 0, None, facts))


@pytest.fixture
def lines(capsys, monkeypatch):
    """Emits events and returns the lines that they make, without waiting between two lines of progress."""
    monkeypatch.setattr(output, "LOG_SECONDS", 0.0)
    loggers = logging.getLogger("calibprune")
    before = loggers.handlers[:], loggers.level, loggers.propagate

    def shown(log_format, *events):
        output.set_up(log_format)
        capsys.readouterr()
        for event in events:
            emit(event) if not isinstance(event, logging.LogRecord) else loggers.handle(event)
        return capsys.readouterr().err.splitlines()

    yield shown
    loggers.handlers[:], loggers.level, loggers.propagate = before


def test_lines_of_a_stage_have_its_name_and_steps_their_count(lines):
    told = lines(
        "text",
        Note("before any stage"),
        StageSkipped("generate", "done already"),
        StageBegun("run", "prune", 4, 1, "layers and rest"),
        Note("wanda takes half"),
        unit("layer-00000"),
        Lost("worker", "at layer 1: it died", ("layer-00001",), 1, "node-7", "worker 1"),
        Resumed(3),
        unit("layer-00002"),
        StageEnded("prune", 12.0, True),
        Note("after it"),
    )
    assert told[:4] == [
        "before any stage",
        "generate: done already",
        "prune: 1 of 4 layers and rest done already",
        "prune: wanda takes half",
    ]
    assert told[4].startswith("prune: 2 of 4 layers and rest, ")
    assert told[4].endswith(" left, layer-00000")
    assert told[5] == (
        "prune: lost worker 1 with layer-00001 on node-7, attempt 1: at layer 1: it died"
    )
    assert told[6] == "prune: going on, 3 units are committed"
    assert told[7].startswith("prune: 4 of 4 layers and rest, ") and told[8:] == ["after it"]


def test_layers_are_counted_over_all_sweeps_and_a_sweep_that_begins_again_replaces_itself(lines):
    told = lines(
        "text",
        StageBegun("run", "evaluate", 2, 0, "layers", layers=6),
        *(LayerEntered(layer, 3, "dense") for layer in (1, 2, 1, 3)),
        unit("dense"),
        LayerEntered(2, 3, "pruned"),
    )
    assert [line.split(" layers")[0] for line in told] == [
        f"evaluate: {done} of 6" for done in (1, 2, 1, 3, 5)
    ]


def test_tokens_a_second_are_shown_of_samples(lines):
    facts = {"tokens": 500, "seconds": 2.0, "finish_reasons": {"stop": 5}}
    *_, last = lines("text", StageBegun("run", "generate", 2, 0, "shards"), unit("00000", **facts))
    assert last.endswith(" tokens/s") and 200 <= float(last.split()[-2]) <= 250


def test_warnings_of_the_library_are_shown_without_secrets_and_control_characters(
    lines, monkeypatch
):
    monkeypatch.setenv("SOME_TOKEN", "hunter2-hunter2")
    warning = logging.makeLogRecord(
        {"name": "calibprune.retry", "levelno": logging.WARNING, "msg": "\x1b[2J hunter2-hunter2"}
    )
    assert lines("text", warning, Note("a\x07 hunter2-hunter2")) == [r"\x1b[2J ***", r"a\x07 ***"]


def test_json_lines_count_what_was_committed_without_a_word(lines):
    told = lines(
        "json",
        StageBegun("run", "prune", 4, 1, "layers"),
        unit("layer-00000", layer=0),
        LayerEntered(1, 3),
        Lost("worker", "it died", ("layer-00001",), 1),
        Resumed(3),
        unit("layer-00002"),
    )
    found = [json.loads(line) for line in told]
    assert [one["event"] for one in found] == ["unit", "failure", "line", "unit"]
    assert [one.get("done") for one in found] == [2, None, None, 4]
    assert all(one.get("stage", "prune") == "prune" for one in found)
    assert found[0]["layer"] == 0 and found[1]["level"] == "warning"


def test_a_later_set_up_replaces_the_former(lines):
    lines("json"), lines("text")
    assert not output.is_json()
    handlers = logging.getLogger("calibprune").handlers
    assert sum(isinstance(one, output.Terminal | output.JsonLines) for one in handlers) == 1
    note("shown once")
