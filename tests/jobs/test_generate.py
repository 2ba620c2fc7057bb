"""The driver of generate: how it shares out shards, and when it gives up."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from calibprune.calibration.engine import model_and_revision
from calibprune.calibration.prefixes import prefix_units
from calibprune.config import Config
from calibprune.config.generate import GenerateSettings
from calibprune.config.model import ClusterSettings
from calibprune.errors import UserError
from calibprune.events import SET_ASIDE, Event, Tick, UnitDone
from calibprune.process import node
from calibprune.stage import Record, Stage
from cluster.crew import Crew
from cluster.places import Bundle
from cluster.session import connect
from jobs import engines, generate
from jobs.engines import check_engines
from jobs.generate import longest_done, patience
from jobs.run import Run
from tests.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def cluster():
    with connect(ClusterSettings()):
        yield


class Hub(MemoryFileSystem):
    """A hub of models, in memory."""

    protocol = "hf"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("hf://").strip("/")


@pytest.fixture
def hub_run(tmp_path, monkeypatch) -> Run:
    """Makes a run of a model that only the hub has."""
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


def test_prefixes_of_a_model_on_the_hub_are_cut_and_read_where_no_cache_has_it(cluster, hub_run):
    """Runs in this process instead of in an actor; the driver passes on the same."""
    stage, units = hub_run.stage("generate"), prefix_units(hub_run.config.generate)
    config, url = hub_run.config, hub_run.skeleton.checkpoint.url
    list(generate._cut(config.model, url, config.generate, stage.url, units))
    assert stage.done_units() == set(units)
    crew = engines.engines(hub_run, "generate", stage, 1, 100)
    reader = engines.Generator(*crew._arguments)._prefixes
    assert [hub_run.tokenizer.decode(ids) for ids in reader.of(range(2))] == ["<s>so", "<s>mo"]


def test_shards_are_made_while_later_prefixes_are_still_being_cut(tmp_path, monkeypatch, heard):
    """With two samples per prefix and four prefixes per file, the prefixes of five rows are in one file or in two."""
    monkeypatch.setattr("calibprune.calibration.prefixes.PREFIXES_PER_FILE", 4)
    prefixes = {"type": "prompts", "path": "prompts.txt"}
    settings = {"samples": 30, "shard_rows": 5, "samples_per_prefix": 2, "prefixes": prefixes}
    config = {"model": {"path": "m"}, "output": str(tmp_path)}
    made = Run(Config.model_validate(config | {"generate": settings}))
    files = prefix_units(made.config.generate)
    assert files == [f"prefixes-0000{n}" for n in range(4)]  # rows 0-7, 8-15, 16-23, 24-29
    shards = [f"0000{n}" for n in (0, 2, 3, 4, 5)]

    def ready(cutting):
        monkeypatch.setattr(generate._Prefixes, "_cutting", cutting)
        stack = ExitStack()  # the second file of prefixes is done
        made_of = generate._Prefixes(made, made.stage("generate"), set(files[1:]), stack)
        return made_of, made_of.ready(shards)

    def cut(self, poll_seconds):
        for file in files[1:]:
            yield Tick()
            yield UnitDone(Record(file, None, 0, None, {}), 1.0)

    _, given = ready(cut)
    one, two, three, four, five = ([shard] for shard in shards)
    assert list(given) == [one, None, two, None, three, None, four, five]

    def broken(self, poll_seconds):
        yield Tick()
        raise RuntimeError("the source is gone")

    prefixes, given = ready(broken)
    assert list(given) == [one, None] and str(prefixes.trouble) == "the source is gone"
    assert "no more prefixes, the shards that have theirs go on: the source is gone" in heard.text
    shards.pop(0)  # one of them had its prefixes
    _, given = ready(broken)
    with pytest.raises(RuntimeError, match="the source is gone"):
        list(given)


class Scribe:
    """Commits shards without an engine, except for the bad ones."""

    def __init__(self, stage_url: str, bad: set[str]) -> None:
        self._stage, self._bad = Stage(stage_url), bad

    def start(self) -> str:
        return node()

    def complete(self, units: Sequence[str]) -> Iterator[Event]:
        for unit in units:
            if unit in self._bad:
                raise ValueError("poisoned")
            facts = {"rows": 1, "tokens": 5, "seconds": 7.0, "finish_reasons": {"stop": 1}}
            yield UnitDone(self._stage.commit(unit, None, facts))


@pytest.fixture
def driver(cluster, tmp_path, monkeypatch):
    """Lets the driver make 30 shards with a Scribe; returns the ones not done."""
    config = {"model": {"path": "x"}, "output": str(tmp_path)}
    config |= {"generate": {"samples": 30, "shard_rows": 1}}
    made = Run(Config.model_validate(config))
    stage, units = made.stage("generate"), [f"{unit:05d}" for unit in range(30)]

    def go(bad: set[str], most_done: int = 30) -> set[str]:
        missing = stage.plan({}, units)

        def scribes(run, name, stage, count, most):
            return Crew(Scribe, 1, Bundle(0, 0), [stage.url, bad], start_seconds=240, concurrency=3)

        monkeypatch.setattr(generate, "engines", scribes)
        events = generate.work(made, stage, missing)
        try:
            for _ in events:
                if len(stage.done_units()) >= most_done:
                    break
        finally:
            events.close()
        return set(units) - stage.done_units()

    return go


def test_poisoned_shards_at_the_head_of_a_resume_do_not_keep_the_others_from_being_done(
    driver, heard, tmp_path
):
    bad = {"00001", "00003", "00004", "00005"}
    assert len(driver(bad, most_done=8)) in range(18, 23)
    with pytest.raises(
        generate.ShardsFailed, match=r"4 of 30 shards failed 3 times each, the first "
    ):
        driver(bad)
    done = Stage(f"{tmp_path}/generate").done_units()
    assert {f"{unit:05d}" for unit in range(30)} - done == bad
    assert {unit for one in heard.losses if one.kind == SET_ASIDE for unit in one.units} == bad


def test_where_nothing_goes_right_the_driver_soon_gives_up(driver):
    everything = {f"{unit:05d}" for unit in range(30)}
    with pytest.raises(generate.ShardsFailed, match=r"^9 attempts in a row failed, .* poisoned"):
        driver(everything)


def test_a_source_of_prefixes_that_stalls_ends_the_cutting(
    cluster, tmp_path, monkeypatch, heard, tiny_llama
):
    monkeypatch.setattr("calibprune.calibration.prefixes.PREFIXES_PER_FILE", 4)
    monkeypatch.setattr("cluster.queue.SOURCE_SECONDS", 3.0)
    settings = {"samples": 8, "prefixes": {"type": "dataset", "path": "texts.txt"}}
    config = {"model": {"path": str(tiny_llama)}, "output": str(tmp_path)}
    made = Run(Config.model_validate(config | {"generate": settings | {"shard_rows": 4}}))

    def cut_one(*arguments):
        yield UnitDone(Record("prefixes-00000", None, 0, None, {}))
        time.sleep(1000)

    monkeypatch.setattr(generate, "_cut", cut_one)
    uncut = set(prefix_units(made.config.generate))
    with ExitStack() as stack:
        cutting = generate._Prefixes(made, made.stage("generate"), uncut, stack)
        given = filter(None, cutting.ready(["00000", "00001"]))
        assert list(islice(given, 2)) == [["00000"]]
    assert isinstance(cutting.trouble, TimeoutError)
    assert "the work has been silent for 3 s" in heard.text


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
def test_what_vllm_cannot_read_of_the_hub_is_refused_before_work(url, tiny_llama, tmp_path):
    config = Config.model_validate({"model": {"path": str(tiny_llama)}, "output": str(tmp_path)})
    run = Run(config)
    run.skeleton.checkpoint.url = url
    with pytest.raises(UserError, match=re.escape(url)):
        check_engines(run, "generate")


def test_a_resume_knows_how_long_a_shard_takes_and_a_first_shard_gets_time_by_its_tokens(tmp_path):
    stage, units = Stage(str(tmp_path)), ["00000", "00001", "00002"]
    stage.plan({}, units)
    assert longest_done(stage, units) == 0.0
    for unit, seconds in (("00000", 40.0), ("00002", 70.0)):
        stage.commit(unit, None, {"seconds": seconds})
    assert longest_done(stage, ["00001"]) == 70.0
    settings = GenerateSettings(shards_in_flight=2)
    assert patience(settings, {"a": 10 * 100}).seconds("a") == 3600
    assert patience(settings, {"a": 500 * 2048}).seconds("a") == 2 * 500 * 2048 / 100


@pytest.mark.parametrize("samples", [5_000_000_000, 10**23])
def test_more_shards_than_the_driver_can_hold_are_refused(tmp_path, tiny_llama, samples):
    config = {"model": {"path": str(tiny_llama)}, "output": str(tmp_path)}
    run = Run(Config.model_validate(config | {"generate": {"samples": samples}}))
    with pytest.raises(UserError, match=rf"generate.samples {samples:,} in shards of 500 rows"):
        generate.check(run)
