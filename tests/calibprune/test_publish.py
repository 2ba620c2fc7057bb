"""What is published of each stage, into folders and buckets; of the hub, which tests cannot reach, the planning."""

import json
import subprocess
import sys

import pytest

from calibprune import storage
from calibprune.checkpoint import INDEX
from calibprune.errors import CorruptionError, UserError
from calibprune.publish import (
    Item,
    batches,
    check_folders,
    check_nothing_else,
    listing,
    publish,
    seconds_between_commits,
)
from calibprune.stage import Stage
from tests.servers import Fault, faulty_proxy, make_bucket, moto, s3_at


def make_run(url):
    """A run with a finished generate and prune, a report, and what crashes and races left behind."""
    generate = Stage(storage.join(url, "generate"))
    units = [f"{n:05d}" for n in range(5)]
    generate.plan({}, units)
    for unit in units:
        generate.commit(unit, generate.put(unit, unit.encode() * 99, "parquet", "data", "part"), {})
    generate.put("00003", b"of an attempt that lost", "parquet", "data", "part")
    generate.finish({"seconds": 1.0})
    prune = Stage(storage.join(url, "prune"))
    prune.plan({}, ["00000", "allocation"])
    layer = prune.put("00000", b"weights", "safetensors", "checkpoint", "layer")
    prune.commit("00000", layer, {})
    prune.commit("allocation", prune.put("allocation", b"{}", "json", "data", "scores"), {})
    for name in ("config.json", "pruning.json", INDEX):
        storage.write_json(storage.join(prune.url, "checkpoint", name), {"name": name})
    prune.finish()
    for name in ("report.json", "index.html"):
        storage.write(storage.join(url, "report", name), name.encode())
    return url, generate, layer


@pytest.fixture
def run(tmp_path):
    return make_run(str(tmp_path / "run"))


def paths(items):
    return [item.path for item in items]


def test_of_generate_the_committed_files_then_the_manifest(run, tmp_path):
    url, generate, _ = run
    target = str(tmp_path / "there")
    outcome = publish(url, "generate", target)
    named = sorted(record.file for record in generate.records())
    assert list(storage.tree(target)) == ["_SUCCESS", *named, "manifest.json"]
    assert outcome.copied == 7 and outcome.skipped == 0
    copy = Stage(target)
    assert [copy.read(record) for record in copy.records()] == [
        generate.read(record) for record in generate.records()
    ]


def test_of_prune_the_checkpoint_alone_with_its_index_last(run, tmp_path):
    url, _, layer = run
    body, last = listing(url, "prune")
    name = layer.file.removeprefix("checkpoint/")
    assert sorted(paths(body)) == sorted([name, "config.json", "pruning.json"])
    assert paths(last) == [INDEX]
    publish(url, "prune", str(tmp_path / "model"))
    assert storage.read_bytes(str(tmp_path / "model" / name)) == b"weights"
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == sorted([*paths(body), INDEX])


def test_of_report_the_page(run):
    assert [paths(part) for part in listing(run[0], "report")] == [["report.json"], ["index.html"]]


def test_again_only_what_is_missing_or_differs(run, tmp_path):
    url, target = run[0], tmp_path / "there"
    publish(url, "generate", str(target))
    publish(url, "prune", str(tmp_path / "model"))
    first = sorted((target / "data").iterdir())[0]
    first.unlink()
    (tmp_path / "model" / "config.json").write_text('{\n "name": "CONFIG.json"\n}\n')
    assert publish(url, "generate", str(target))[:2] == (3, 4)
    assert publish(url, "prune", str(tmp_path / "model"))[:2] == (2, 2)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["name"] == "config.json"


def test_an_unfinished_stage_and_an_unknown_one_are_refused(run, tmp_path):
    for stage, message in (("curate", "is not finished"), ("generat", "it is one of generate,")):
        with pytest.raises(UserError, match=message):
            publish(run[0], stage, str(tmp_path / "there"))
    assert not (tmp_path / "there").exists()


def test_data_of_something_else_is_not_mixed_with(run, tmp_path):
    (tmp_path / "there" / "data").mkdir(parents=True)
    (tmp_path / "there" / "data" / "old.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"data/old\.parquet, which is not of this stage"):
        publish(run[0], "generate", str(tmp_path / "there"))


@pytest.mark.parametrize("damage", ["other bytes", "missing"])
def test_damaged_data_is_not_published(run, tmp_path, damage):
    url, generate, _ = run
    file = storage.join(generate.url, generate.records()[2].file)
    storage.write(file, b"?" * 495) if damage == "other bytes" else storage.remove(file)
    with pytest.raises(CorruptionError, match=r"part-00002-\w+\.parquet"):
        publish(url, "generate", str(tmp_path / "there"))
    assert not (tmp_path / "there" / "manifest.json").exists()


def test_to_a_bucket_that_fails_in_between(run):
    with moto() as endpoint, faulty_proxy(endpoint) as proxy, s3_at(proxy.endpoint):
        make_bucket("public")
        proxy.faults += [Fault("PUT", "part-00001", 4, 503), Fault("PUT", "manifest", 99, 403)]
        with pytest.raises(UserError, match="access denied"):
            publish(run[0], "generate", "s3://public/pool")
        assert "manifest.json" not in storage.tree("s3://public/pool")
        proxy.faults.clear()
        assert publish(run[0], "generate", "s3://public/pool")[:2] == (2, 5)
        written = [path for method, path, _ in proxy.seen if method == "PUT"]
        assert [path.rsplit("/", 1)[1] for path in written[-2:]] == ["manifest.json", "_SUCCESS"]
        copy = Stage("s3://public/pool")
        assert len([copy.read(record) for record in copy.records()]) == 5


def test_the_command(run, tmp_path):
    command = [sys.executable, "-m", "jobs", "publish", run[0]]
    there = str(tmp_path / "there")
    done = subprocess.run([*command, "generate", there], capture_output=True, text=True, check=True)
    assert f"{there}: 7 files of" in done.stdout and Stage(there).finished
    refused = subprocess.run(
        [*command, "curate", there], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")


def items(sizes):
    return [Item(f"s/{n}", f"data/{n}", size) for n, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "cut"),
    [
        ([], []),
        ([1] * 7, [3, 3, 1]),
        ([6, 5, 5, 1], [1, 2, 1]),
        ([50, 1, 50], [1, 1, 1]),
        ([10], [1]),
    ],
)
def test_batches_hold_so_many_files_and_bytes_at_most(sizes, cut):
    made = batches(items(sizes), most_files=3, most_bytes=10)
    assert [len(batch) for batch in made] == cut
    assert [item for batch in made for item in batch] == items(sizes)
    assert all(len(b) == 1 or sum(i.bytes for i in b) <= 10 for b in made)


def test_commits_keep_within_the_hubs_hour():
    for commits in (1, 60, 128, 200, 1000):
        pause = seconds_between_commits(commits)
        within_an_hour = commits if not pause else min(commits, 3600 / pause)
        assert within_an_hour < 128
    assert seconds_between_commits(10) == 0


def test_a_folder_too_large_for_the_hub_is_refused_with_the_way_out():
    many = [f"data/{n}.parquet" for n in range(10_000)]
    check_folders([*many, "manifest.json"])
    with pytest.raises(UserError, match=r"folder data would hold 10001 files.*shard_rows"):
        check_folders([*many, "data/one-more.parquet"])


def test_what_may_lie_beside():
    ours = [Item("s", "data/a.parquet", 1)]
    check_nothing_else(ours, ["README.md", "data/a.parquet", "other/b.parquet", "data/x.txt"], "t")
    with pytest.raises(UserError, match="t holds data/b"):
        check_nothing_else(ours, ["data/b.parquet"], "t")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("hf://datasets/org/name", "HF_HUB_OFFLINE is set"),
        ("hf://name", "is no repository of the hub"),
        ("hf://spaces/org/name", "is a space: publish to a model or dataset"),
        ("hf://buckets/org/name", "is a bucket: publish to a model or dataset"),
    ],
)
def test_hub_targets_that_cannot_be(run, target, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        publish(run[0], "generate", target)
