"""Events: their text, their handlers, and a notebook that sees them through logging alone."""

import logging
import subprocess
import sys

import pytest
import torch

from calibprune.events import (
    SET_ASIDE,
    Event,
    EventHandler,
    LayerEntered,
    Lost,
    Note,
    Pace,
    UnitDone,
    emit,
    listening,
    note,
    result_of,
)
from calibprune.stage import Record

NOTEBOOK = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO)
from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.model import build_skeleton
from calibprune.pruning.loop import prune_layers
from calibprune.stage import Stage
skeleton = build_skeleton(ModelSettings(path=sys.argv[1]))
settings = PruneSettings.model_validate({"method": "wanda", "batch_sequences": 2})
for _ in prune_layers(skeleton, torch.zeros(4, 16, dtype=torch.int64), settings, Stage(sys.argv[2])):
    pass
"""


def test_a_notebook_sees_progress_by_basic_config_alone(tiny_llama, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, str(tiny_llama), str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in ran.stderr.splitlines() if line.startswith("INFO:calibprune:")]
    said = [line.removeprefix("INFO:calibprune:") for line in lines]
    assert [line for line in said if line.startswith("pruning")] == [
        f"pruning: layer {index} of 3" for index in range(4)
    ]
    assert {"rest is committed", "layer-00002 is committed"} <= set(said)


def test_importing_the_library_does_nothing_else(tmp_path):
    """It makes no folder, sets no variable and changes no logging."""
    code = (
        "import os, logging; before = dict(os.environ); import calibprune, calibprune.events, calibprune.stage; "
        "assert dict(os.environ) == before; assert not logging.getLogger('calibprune').handlers"
    )
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=home)
    assert not list(tmp_path.iterdir())


def test_handlers_hear_events_while_they_listen_and_no_other_lines(heard):
    class Units(EventHandler):
        def __init__(self):
            super().__init__()
            self.units = []

        def handle_event(self, event: Event) -> None:
            if isinstance(event, UnitDone):
                self.units.append(event.record.unit)
            else:
                raise ValueError("a handler's own trouble")

    units = Units()
    logging.raiseExceptions, before = False, logging.raiseExceptions
    try:
        with listening(units):
            assert emit(UnitDone(Record("a", None, 0, None))).record.unit == "a"
            note("what it raises of this reaches nobody")
            logging.getLogger("calibprune.retry").warning("a plain line")
        emit(UnitDone(Record("b", None, 0, None)))
    finally:
        logging.raiseExceptions = before
    assert units.units == ["a"]
    assert [type(event) for event in heard.events] == [UnitDone, Note, UnitDone]
    assert "a plain line" in heard.lines


def test_what_was_lost_is_described_in_one_harmless_line(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2-hunter2")
    lost = Lost(
        "worker", "at layer 2:\x07\nhunter2-hunter2", ("layer-00002",), 3, "host", "worker 1"
    )
    assert str(lost) == "lost worker 1 with layer-00002 on host, attempt 3: at layer 2:\\x07 ***"
    aside = Lost(SET_ASIDE, "it is poisoned", ("00003",), 3)
    assert str(aside) == "set aside 00003, attempt 3: it is poisoned"
    assert str(Note("a\x07b")) == r"a\x07b"


def test_positions_grow_from_the_first_sweep_to_the_last():
    first, second = LayerEntered(9, 10, order=0), LayerEntered(0, 10)
    assert first.position < second.position < LayerEntered(1, 10, full=False).position


def test_the_pace_is_that_of_recent_steps(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("calibprune.events.time.monotonic", lambda: now)
    pace = Pace(200, 10)
    assert pace.seconds_each is pace.seconds_left is None
    for seconds in [100.0] * 30 + [2.0] * 60:
        now += seconds
        pace.add()
    assert pace.done == 100
    assert pace.seconds_each == pytest.approx(2.0) and pace.seconds_left == pytest.approx(200.0)


def test_a_generator_of_events_is_run_to_its_value():
    def work():
        yield emit(LayerEntered(0, 1))
        return torch.ones(1)

    assert result_of(work()).item() == 1
