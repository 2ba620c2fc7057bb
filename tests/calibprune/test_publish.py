"""Publishing each stage to folders, buckets and repositories of the hub."""

import json
import subprocess
import sys

import pytest

from calibprune import storage
from calibprune.checkpoint import INDEX
from calibprune.errors import CorruptionError, UserError
from calibprune.publish import Item, batches, check_folders, check_nothing_else, publish
from calibprune.stage import Stage
from tests.hub import hub
from tests.servers import Fault, faulty_proxy, make_bucket, moto, s3_at

MODEL = {"folder": "checkpoint", "closing": (INDEX,)}
PAGE = {"recorded": False, "closing": ("report.json", "index.html")}


def make_run(url):
    """Makes a run with a finished generate and prune, a report, and the remains of crashes and races."""
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


def test_of_generate_the_committed_files_then_the_manifest(run, tmp_path):
    url, generate, _ = run
    target = str(tmp_path / "there")
    outcome = publish(f"{url}/generate", target)
    named = sorted(record.file for record in generate.records())
    assert list(storage.tree(target)) == ["_SUCCESS", *named, "manifest.json"]
    assert outcome.copied == 7 and outcome.skipped == 0
    copy = Stage(target)
    assert [copy.read(record) for record in copy.records()] == [
        generate.read(record) for record in generate.records()
    ]
    publish(target, str(tmp_path / "copy-of-copy"))
    assert storage.tree(str(tmp_path / "copy-of-copy")) == storage.tree(target)


def test_of_prune_the_checkpoint_alone(run, tmp_path):
    url, _, layer = run
    name = layer.file.removeprefix("checkpoint/")
    publish(f"{url}/prune", str(tmp_path / "model"), **MODEL)
    assert storage.read_bytes(str(tmp_path / "model" / name)) == b"weights"
    expected = sorted([name, "config.json", "pruning.json", INDEX])
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == expected


def test_of_report_the_page(run, tmp_path):
    publish(f"{run[0]}/report", str(tmp_path / "page"), **PAGE)
    assert list(storage.tree(str(tmp_path / "page"))) == ["index.html", "report.json"]


def test_again_only_what_is_missing_or_differs(run, tmp_path):
    url, target = run[0], tmp_path / "there"
    publish(f"{url}/generate", str(target))
    publish(f"{url}/prune", str(tmp_path / "model"), **MODEL)
    first = sorted((target / "data").iterdir())[0]
    first.unlink()
    (tmp_path / "model" / "config.json").write_text('{\n "name": "CONFIG.json"\n}\n')
    assert publish(f"{url}/generate", str(target))[:2] == (3, 4)
    assert publish(f"{url}/prune", str(tmp_path / "model"), **MODEL)[:2] == (2, 2)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["name"] == "config.json"


@pytest.mark.parametrize(
    ("stage", "how", "message"),
    [
        ("curate", {}, "curate is not finished: run the stage curate first"),
        ("prune", MODEL, f"is not finished: checkpoint/{INDEX} is not there"),
        ("report", PAGE, r"is not finished: index\.html is not there; run the stage report first"),
    ],
)
def test_an_unfinished_stage_is_refused(run, tmp_path, stage, how, message):
    for path in (f"prune/checkpoint/{INDEX}", "report/index.html"):
        storage.remove(storage.join(run[0], path))
    with pytest.raises(UserError, match=message):
        publish(f"{run[0]}/{stage}", str(tmp_path / "there"), **how)
    assert not (tmp_path / "there").exists()


def test_data_of_something_else_is_not_mixed_with(run, tmp_path):
    (tmp_path / "there" / "data").mkdir(parents=True)
    (tmp_path / "there" / "data" / "old.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"data/old\.parquet, which is not part of this stage"):
        publish(f"{run[0]}/generate", str(tmp_path / "there"))


@pytest.mark.parametrize("damage", ["other bytes", "fewer bytes", "missing"])
@pytest.mark.parametrize("target", ["folder", "hf://datasets/org/name"])
def test_damaged_data_is_not_published(run, tmp_path, damage, target):
    url, generate, _ = run
    file = storage.join(generate.url, generate.records()[2].file)
    if damage == "missing":
        storage.remove(file)
    else:
        storage.write(file, b"?" * (495 if damage == "other bytes" else 9))
    target = str(tmp_path / "there") if target == "folder" else target
    with hub() as there, pytest.raises(CorruptionError, match=r"part-00002-\w+\.parquet") as error:
        publish(f"{url}/generate", target)
    assert f"{generate.url}/_done/00002.json; `calibprune run` with the configuration" in str(
        error.value
    )
    assert not (tmp_path / "there" / "manifest.json").exists() and not there.files


def test_to_a_bucket_that_fails_in_between(run):
    with moto() as endpoint, faulty_proxy(endpoint) as proxy, s3_at(proxy.endpoint):
        make_bucket("public")
        proxy.faults += [Fault("PUT", "part-00001", 4, 503), Fault("PUT", "manifest", 99, 403)]
        with pytest.raises(UserError, match="access denied"):
            publish(f"{run[0]}/generate", "s3://public/pool")
        assert "manifest.json" not in storage.tree("s3://public/pool")
        proxy.faults.clear()
        assert publish(f"{run[0]}/generate", "s3://public/pool")[:2] == (2, 5)
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
        [*command, "generat", there], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and "it is one of generate, curate," in refused.stderr


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
def test_batches_are_limited_in_files_and_bytes(sizes, cut):
    made = batches(items(sizes), most_files=3, most_bytes=10)
    assert [len(batch) for batch in made] == cut
    assert [item for batch in made for item in batch] == items(sizes)
    assert all(len(b) == 1 or sum(i.bytes for i in b) <= 10 for b in made)


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


@pytest.mark.parametrize("place", ["local", "bucket"])
def test_to_the_hub_with_the_closing_files_in_the_last_commit(tmp_path, monkeypatch, place):
    monkeypatch.setattr("calibprune.publish.COMMIT_FILES", 2)
    target = "hf://datasets/org/name"
    with moto() as endpoint, s3_at(endpoint), hub() as there:
        make_bucket("runs")
        url, generate, _ = make_run("s3://runs/one" if place == "bucket" else str(tmp_path / "run"))
        assert publish(f"{url}/generate", target, card=True)[:2] == (7, 0)
        data = {record.file: generate.read(record) for record in generate.records()}
        closing = ["manifest.json", "_SUCCESS", "README.md"]
        assert there.files.keys() == {*data, *closing}
        assert {path: there.files[path] for path in data} == data
        assert [len(paths) for _, paths in there.commits] == [2, 2, 1, 3]
        assert there.commits[-1] == ("calibprune: generate, complete", closing)

        gone = sorted(data)[0]
        for path in (gone, "manifest.json", "_SUCCESS"):
            del there.files[path]
        there.uploads.clear()
        there.files["README.md"] = b"their own"
        assert publish(f"{url}/generate", target, card=True)[:2] == (3, 4)
        assert len(there.uploads) == 1 and there.files[gone] == data[gone]
        assert there.files["README.md"] == b"their own"

        assert publish(f"{url}/prune", f"{target}/model", **MODEL)[:2] == (4, 0)
        assert there.commits[-1] == ("calibprune: prune, complete", [f"model/{INDEX}"])
        there.files["data/old.parquet"] = b""
        with pytest.raises(
            UserError, match=r"holds data/old\.parquet, which is not part of this stage"
        ):
            publish(f"{url}/generate", target)


def test_a_hub_that_fails_for_the_moment_is_tried_again(run):
    with hub() as there:
        there.failures |= {"/commit/main": 2, "/tree/main": 1}
        publish(f"{run[0]}/generate", "hf://datasets/org/name")
        assert not any(there.failures.values()) and "_SUCCESS" in there.files
        assert len(there.commits) == 2


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
        publish(f"{run[0]}/generate", target)
