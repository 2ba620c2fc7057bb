"""What the driver of generate hands to others, and when it gives up."""

import re
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from ray.exceptions import RayTaskError

from calibprune.calibration.engine import model_and_revision
from calibprune.calibration.prefixes import prefix_units
from calibprune.config import Config
from calibprune.config.generate import GenerateSettings
from calibprune.config.model import ClusterSettings
from calibprune.errors import UserError
from calibprune.failures import Failure
from calibprune.stage import Record, Stage
from cluster.label import Label
from cluster.places import Bundle
from cluster.queue import Queue
from cluster.session import connect
from cluster.tasks import Done, TaskLost
from jobs import generate
from jobs.check import check_vllm
from jobs.generate import first_seconds, longest_done
from jobs.run import Run
from tests.tiny import write_tiny_llama


class Hub(MemoryFileSystem):
    """A hub of models in memory."""

    protocol = "hf"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("hf://").strip("/")


@pytest.fixture
def hub_run(tmp_path, monkeypatch) -> Run:
    """A run of a model that only the hub has."""
    monkeypatch.setitem(_registry, "hf", Hub)
    model = write_tiny_llama(tmp_path / "tiny")
    filesystem = Hub()
    for file in model.iterdir():
        filesystem.pipe_file(f"hf://org/name/{file.name}", file.read_bytes())
    (tmp_path / "texts.txt").write_text("some text here\nmore text there\n")
    return Run(
        Config.model_validate(
            {
                "model": {"path": "org/name"},
                "output": str(tmp_path / "out"),
                "generate": {
                    "samples": 2,
                    "prefixes": {"type": "dataset", "path": str(tmp_path / "texts.txt")},
                },
            }
        )
    )


def test_prefixes_of_a_model_on_the_hub_are_cut_and_read_where_no_cache_has_it(
    hub_run, monkeypatch
):
    """In this process, instead of in Ray's: what the driver hands over is the same."""

    def here(function, arguments, batches, *_, **__):
        for batch in batches:
            yield from (Done(record, 0.0) for record in function(*arguments, batch))

    monkeypatch.setattr(generate, "run_tasks", here)
    monkeypatch.setattr(generate, "worker_bundle", lambda *_, **__: Bundle(1, 0))
    monkeypatch.setattr(generate, "capacity", lambda bundle: 1)
    stage, units = hub_run.stage("generate"), prefix_units(hub_run.config.generate)
    watch: Any = SimpleNamespace(committed=lambda *_: None, lost=None, label=None)
    cutting = generate._Prefixes(hub_run, stage, set(units), watch)
    assert list(cutting.ready_of(["00000"])) == [[], ["00000"]] and str(cutting) == ""
    assert stage.done_units() == set(units)
    crew = generate.engines(hub_run, stage, 1, watch)
    reader = generate.Generator(*crew._arguments)._prefixes
    assert [hub_run.tokenizer.decode(ids) for ids in reader.of(range(2))] == ["<s>so", "<s>mo"]


def test_shards_are_made_while_later_prefixes_are_still_being_cut(tmp_path, monkeypatch):
    """Two samples a prefix, four prefixes a file: shards of five lie in one file or in two."""
    monkeypatch.setattr("calibprune.calibration.prefixes.PREFIXES_PER_FILE", 4)
    prefixes = {"type": "prompts", "path": "prompts.txt"}
    settings = {"samples": 30, "shard_rows": 5, "samples_per_prefix": 2, "prefixes": prefixes}
    config = {"model": {"path": str(write_tiny_llama(tmp_path / "tiny"))}, "output": str(tmp_path)}
    made = Run(Config.model_validate(config | {"generate": settings}))
    files = prefix_units(made.config.generate)
    assert files == [f"prefixes-0000{n}" for n in range(4)]  # rows 0-7, 8-15, 16-23, 24-29

    def cut(*_, **__):
        for file in files[1:]:
            yield None
            yield Done(Record(file, None, 0, None, {}), 1.0)

    monkeypatch.setattr(generate, "run_tasks", cut)
    watch: Any = SimpleNamespace(committed=lambda *_: None, lost=None, label=None)
    shards, uncut = [f"0000{n}" for n in (0, 2, 3, 4, 5)], set(files[1:])  # the second is done
    cutting = generate._Prefixes(made, made.stage("generate"), uncut, watch)
    one, two, three = ["00000"], ["00002"], ["00003"]
    ready = cutting.ready_of(shards)
    assert [next(ready) for _ in range(3)] == [one, [], two]
    assert str(cutting) == "1 of 3 files of prefixes"
    assert list(ready) == [[], three, [], ["00004", "00005"]] and not uncut

    source = OSError("the source is gone")
    told: list[Failure] = []
    watch.failed = told.append
    for error, reason in (
        (TaskLost("again and again"), "again and again"),
        (RayTaskError("cut", "Traceback " * 100, source), "OSError: the source is gone"),
    ):

        def lost(*_, error=error, **__):
            yield None
            raise error

        monkeypatch.setattr(generate, "run_tasks", lost)
        cutting = generate._Prefixes(made, made.stage("generate"), set(files[1:]), watch)
        assert list(cutting.ready_of(shards)) == [one, []] and cutting.trouble is error
        assert reason.endswith(told[-1].message) and told[-1].units == tuple(files[1:])
        with pytest.raises(type(error)):
            generate._generate(made, made.stage("generate"), 6, [], set(files[1:]), watch)


def test_a_source_of_prefixes_that_stalls_ends_the_cutting(tmp_path, monkeypatch):
    monkeypatch.setattr("calibprune.calibration.prefixes.PREFIXES_PER_FILE", 4)
    monkeypatch.setattr(generate, "STALL_SECONDS", 1.0)
    settings = {"samples": 8, "prefixes": {"type": "dataset", "path": "texts.txt"}}
    config = {"model": {"path": str(write_tiny_llama(tmp_path / "tiny"))}, "output": str(tmp_path)}
    made = Run(Config.model_validate(config | {"generate": settings | {"shard_rows": 4}}))

    def cut_one(*arguments):
        yield Record("prefixes-00000", None, 0, None, {})
        time.sleep(1000)

    monkeypatch.setattr(generate, "_cut", cut_one)
    told: list[Failure] = []
    watch: Any = SimpleNamespace(
        committed=lambda *_: None, failed=told.append, lost=print, label=Label("run", "generate")
    )
    uncut = set(prefix_units(made.config.generate))
    cutting = generate._Prefixes(made, made.stage("generate"), uncut, watch)
    with connect(ClusterSettings()):
        ready = [shard for some in cutting.ready_of(["00000", "00001"]) for shard in some]
    assert ready == ["00000"] and isinstance(cutting.trouble, TaskLost)
    (failure,) = told
    assert failure.units == ("prefixes-00001",) and "gave nothing for 1 s" in failure.message


@pytest.mark.parametrize(
    ("url", "model", "revision"),
    [
        ("hf://org/name", "org/name", None),
        ("hf://org/name@v1.0", "org/name", "v1.0"),
        ("hf://org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("s3://bucket/org@1/name", "s3://bucket/org@1/name", None),
        ("/models/name@2", "/models/name@2", None),
    ],
)
def test_vllm_gets_a_model_of_the_hub_by_id_and_revision(url, model, revision):
    assert model_and_revision(url) == (model, revision)


@pytest.mark.parametrize("url", ["hf://org/name/inside", "hf://datasets/org/name", "hf://org"])
def test_what_vllm_cannot_read_of_the_hub_is_refused_before_work(url):
    with pytest.raises(UserError, match=re.escape(url)):
        check_vllm("generate", url)


class Steps:
    """Shows nothing."""

    def __init__(self, *_): ...
    def __enter__(self):
        return self

    def __exit__(self, *_): ...
    def add(self, *_): ...
    def still(self, *_): ...


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Has the driver go through 30 shards with one engine that fails at the bad ones; returns what is not done."""
    config = {"model": {"path": "x"}, "output": str(tmp_path)}
    config |= {"generate": {"samples": 30, "shard_rows": 1}}
    made = Run(Config.model_validate(config))
    stage, watch = made.stage("generate"), SimpleNamespace(committed=print, failed=print, lost=None)
    units = [f"{unit:05d}" for unit in range(30)]

    def go(bad: set[str], most_done: int = 30) -> set[str]:
        def dispatched(run, crew, method, tokens, set_aside, in_a_row, longest, more):
            queue = Queue([], run.config.generate.attempts, set_aside, in_a_row, more)
            queue.refill(), queue.refill()
            while queue and len(stage.done_units()) < most_done:
                unit = queue.take([])
                if unit in bad:
                    queue.failed([unit], ValueError("poisoned"))
                else:
                    queue.succeeded()
                    yield stage.commit(unit, None, {"tokens": 5, "seconds": 7.0})

        monkeypatch.setattr(generate, "dispatched", dispatched)
        monkeypatch.setattr(
            generate, "engines", lambda *_: nullcontext(SimpleNamespace(ready_at=0.0, count=1))
        )
        monkeypatch.setattr(generate, "Steps", Steps)
        done = stage.done_units()
        missing: Any = [unit for unit in units if unit not in done]
        try:
            generate._generate(made, stage, 30, missing, set(), watch)  # type: ignore[arg-type]
        except generate.ShardsFailed as error:
            print(error)
        return set(units) - stage.done_units()

    return go


def test_poisoned_shards_at_the_head_of_a_resume_do_not_keep_the_others_from_being_done(driver):
    bad = {"00001", "00003", "00004", "00005"}
    assert len(driver(bad, most_done=8)) == 22
    assert driver(bad) == bad


def test_where_nothing_goes_right_the_driver_soon_gives_up(driver, capsys):
    everything = {f"{unit:05d}" for unit in range(30)}
    assert driver(everything) == everything
    assert "9 attempts at shards failed in a row" in capsys.readouterr().out


def test_a_resume_knows_how_long_a_shard_takes_and_a_first_shard_gets_time_by_its_tokens(tmp_path):
    stage = Stage(str(tmp_path))
    assert longest_done(stage, 3, ["00000", "00001", "00002"]) == 0.0
    for unit, seconds in (("00000", 40.0), ("00002", 70.0)):
        stage.commit(unit, None, {"seconds": seconds})
    assert longest_done(stage, 3, ["00001"]) == 70.0
    settings = GenerateSettings(shards_in_flight=2)
    assert first_seconds(settings, 10 * 100) == 3600
    assert first_seconds(settings, 500 * 2048) == 2 * 500 * 2048 / 100
