"""What the driver of generate hands to others, and when it gives up."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from calibprune.calibration.engine import model_and_revision
from calibprune.calibration.prefixes import prefix_units
from calibprune.config import Config
from calibprune.errors import UserError
from cluster.room import Bundle
from cluster.tasks import Done
from jobs import generate
from jobs.check import check_vllm
from jobs.run_folder import Run
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
    generate._cut_prefixes(hub_run, stage, set(units), watch)
    assert stage.done_units() == set(units)
    crew = generate.engines(hub_run, stage, 1, watch)
    reader = generate.Generator(*crew._arguments)._prefixes
    assert [hub_run.tokenizer.decode(ids) for ids in reader.of(range(2))] == ["<s>so", "<s>mo"]


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
