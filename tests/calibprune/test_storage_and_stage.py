"""Atomic files and the commit protocol, on local disk, in memory and on real servers of S3, weak S3 and gs://."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from calibprune import storage
from calibprune.errors import CorruptionError, DriftError, UserError
from calibprune.stage import Record, Stage
from tests.servers import gcs_server, make_bucket, moto, rclone, s3_at


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Starts the servers: endpoints of S3 servers, each with the bucket `runs`, and the URL of a gs:// bucket."""
    folder = tmp_path_factory.mktemp("objects")
    with moto() as strong, rclone(folder) as weak, gcs_server("runs") as gs:
        for endpoint in (strong, weak):
            with s3_at(endpoint):
                make_bucket("runs")
        yield {"s3": strong, "weak": weak, "gs": gs}


@pytest.fixture(params=["local", "memory", "s3", "weak", "gs"])
def folder(request, tmp_path):
    """A folder on each kind of store; `weak` is an S3 server that ignores conditional writes."""
    name = f"run-{uuid.uuid4().hex}"
    if request.param == "local":
        yield str(tmp_path / "x")
    elif request.param == "memory":
        yield f"memory://{name}"
    else:
        servers = request.getfixturevalue("servers")
        if request.param == "gs":
            yield f"{servers['gs']}/{name}"
        else:
            with s3_at(servers[request.param], weak=request.param == "weak"):
                yield f"s3://runs/{name}"


def is_weak(request):
    return request.node.callspec.params["folder"] == "weak"


def test_files_come_back_and_create_keeps_the_first(folder, request):
    url = storage.join(folder, "aaa", "b.bin")
    storage.write(url, b"one")
    storage.write(url, b"two")
    assert storage.read_bytes(url) == b"two" and storage.read_range(url, 1, 3) == b"wo"
    created = storage.create(url, b"three")
    assert created is is_weak(request)
    assert storage.read_bytes(url) == (b"three" if is_weak(request) else b"two")
    assert storage.create(storage.join(folder, "aaa", "ccc"), b"c")
    assert storage.names(storage.join(folder, "aaa")) == ["b.bin", "ccc"]
    assert storage.tree(folder)["aaa/ccc"] == 1 and storage.tree(storage.join(folder, "none")) == {}
    assert storage.names(storage.join(folder, "nothing")) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "nothing"))
    storage.remove(url)
    storage.remove(url)
    assert not storage.exists(url) and storage.exists(storage.join(folder, "aaa"))


def test_a_refusal_that_is_expected_prints_no_traceback_of_a_library(servers, caplog):
    url = f"{servers['gs']}/run-{uuid.uuid4().hex}/a"
    assert storage.create(url, b"one") and not storage.create(url, b"two")
    assert not [record for record in caplog.records if record.name.startswith("gcsfs")]


def test_every_store_says_how_large_files_are(folder):
    assert storage.sizes(folder) == {}
    for name, data in (("b", b"12345"), ("a", b"")):
        storage.write(storage.join(folder, name), data)
    storage.write(storage.join(folder, "below", "c"), b"x")
    assert list(storage.sizes(folder).items()) == [("a", 0), ("b", 5)]


def test_every_store_says_when_files_were_written(folder):
    begun = time.time()
    for name in ("bbb.json", "aaa.json"):
        storage.write(storage.join(folder, name), b"x")
    storage.write(storage.join(folder, "below", "ccc.json"), b"x")
    found = storage.times(folder)
    assert list(found) == ["aaa.json", "bbb.json"]
    for at in (*found.values(), storage.written_at(storage.join(folder, "aaa.json"))):
        assert at is not None and begun - 2 < at < time.time() + 2
    assert storage.times(storage.join(folder, "nothing")) == {}
    with pytest.raises(FileNotFoundError):
        storage.written_at(storage.join(folder, "nothing"))


def test_many_files_come_in_the_order_asked_for(folder):
    urls = [storage.join(folder, f"file-{n:03d}") for n in range(100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(storage.write, urls, (f"{n}".encode() for n in range(100))))
    shuffled = urls[::-1] + urls[:3]
    assert storage.read_many(shuffled) == [
        url[-3:].lstrip("0").encode() or b"0" for url in shuffled
    ]
    assert storage.read_many([]) == []
    with pytest.raises(FileNotFoundError, match="file-none"):
        storage.read_many([*urls, storage.join(folder, "file-none")])


def test_what_another_process_writes_is_seen(folder):
    if folder.startswith("memory"):
        pytest.skip("memory is not shared")
    first, second = storage.join(folder, "aaa", "one"), storage.join(folder, "aaa", "two")
    storage.write(first, b"1")
    assert storage.names(storage.join(folder, "aaa")) == ["one"] and not storage.exists(second)
    code = f"from calibprune import storage; storage.write({second!r}, b'2'); storage.remove({first!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert storage.exists(second) and not storage.exists(first)
    assert storage.names(storage.join(folder, "aaa")) == ["two"]
    assert list(storage.tree(folder)) == ["aaa/two"]


def test_a_range_beyond_the_end_is_an_error(folder):
    storage.write(storage.join(folder, "xxx"), b"12")
    with pytest.raises(EOFError, match="0 to 5"):
        storage.read_range(storage.join(folder, "xxx"), 0, 5)
    with pytest.raises(EOFError, match="7 to 9"):
        storage.read_range(storage.join(folder, "xxx"), 7, 9)


def finished_stage(folder, identity=None):
    stage = Stage(folder)
    stage.plan(identity or {"seed": 1}, ["00000", "00001"])
    for unit in ("00000", "00001"):
        stage.commit(unit, stage.put(unit, unit.encode(), "txt", "data", "part"), {"rows": 2})
    stage.finish({"seconds": 1.0})
    return stage


def test_a_stage_commits_and_is_read_back(folder):
    stage = finished_stage(folder)
    assert stage.finished and [r.unit for r in stage.records()] == ["00000", "00001"]
    assert [stage.read(record) for record in stage.records()] == [b"00000", b"00001"]
    assert stage.manifest()["facts"] == {"seconds": 1.0, "drivers": []}
    assert stage.content_id() == finished_stage(folder + "2").content_id()


def test_a_stage_with_a_hole_does_not_finish(folder):
    stage = Stage(folder)
    stage.plan({}, ["a", "b"])
    stage.commit("a", None, {})
    with pytest.raises(RuntimeError, match=r"1 units are missing: \['b'\]"):
        stage.finish()
    assert not stage.finished
    with pytest.raises(UserError, match="not finished"):
        stage.manifest()


def test_the_first_commit_of_a_unit_wins(folder, request):
    stage = Stage(folder)
    first = stage.commit("u", stage.put("u", b"first", "bin", "data", "part"), {"attempt": 1})
    second = stage.commit("u", stage.put("u", b"second", "bin", "data", "part"), {"attempt": 2})
    assert stage.record("u") == (second if is_weak(request) else first)
    assert stage.read(stage.record("u")) == (b"second" if is_weak(request) else b"first")


def test_racing_commits_end_with_a_record_that_is_true(folder):
    stage, barrier = Stage(folder), threading.Barrier(6)
    stage.plan({}, ["unit"])

    def attempt(n):
        published = stage.put("unit", f"attempt {n}".encode() * 100, "bin", "data", "part")
        barrier.wait()
        return stage.commit("unit", published, {"attempt": n})

    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(attempt, range(6)))
    stage.finish()
    (record,) = stage.records()
    assert record in outcomes
    assert stage.read(record) == f"attempt {record.facts['attempt']}".encode() * 100


def test_a_resume_is_held_to_the_plan_on_every_store(folder):
    stage = Stage(folder)
    assert stage.plan({"seed": 1}, ["aaa", "bbb"]) == ["aaa", "bbb"]
    stage.commit("aaa", None, {})
    assert stage.plan({"seed": 1}, ["aaa", "bbb"]) == ["bbb"]
    with pytest.raises(DriftError, match="seed was 1, now 2"):
        stage.plan({"seed": 2}, ["aaa", "bbb"])


@pytest.mark.parametrize("content", [b"", b'{"unit": "aaa", "fi', b"[]", b'{"unit": "aaa"}'])
def test_a_damaged_done_record_is_named_with_what_to_do(tmp_path, content):
    stage = Stage(str(tmp_path))
    stage.plan({}, ["aaa", "bbb"])
    for unit in ("aaa", "bbb"):
        stage.commit(unit, None, {})
    (tmp_path / "_done" / "aaa.json").write_bytes(content)
    for reading in (stage.done, stage.finish):
        with pytest.raises(
            CorruptionError, match=r"_done/aaa\.json is damaged.*remove it; `calibprune run` with"
        ):
            reading()
    assert list(stage.done(["bbb"])) == ["bbb"]


def test_the_record_of_another_unit_does_not_pass(tmp_path):
    stage = Stage(str(tmp_path))
    stage.plan({}, ["aaa", "bbb"])
    stage.commit("aaa", None, {})
    (tmp_path / "_done" / "bbb.json").write_bytes((tmp_path / "_done" / "aaa.json").read_bytes())
    with pytest.raises(CorruptionError, match="not the done record of unit bbb"):
        stage.finish()


def test_units_beyond_the_plan_stay_out_of_the_manifest(tmp_path):
    stage = Stage(str(tmp_path))
    stage.plan({}, ["bbb", "aaa"])
    for unit in ("aaa", "bbb", "extra"):
        stage.commit(unit, None, {})
    assert set(stage.done()) == {"aaa", "bbb", "extra"}
    stage.finish()
    assert [record.unit for record in stage.records()] == ["bbb", "aaa"]


def test_twenty_thousand_units_take_seconds_and_tens_of_megabytes(tmp_path):
    stage, units = Stage(str(tmp_path)), [f"{n:05d}" for n in range(20_000)]
    stage.plan({"seed": 1}, units)
    (tmp_path / "_done").mkdir()
    for unit in units:
        record = Record(
            unit, f"data/part-{unit}-0.parquet", 9, "0" * 64, {"rows": 500, "tokens": 9}, 1.0
        )
        (tmp_path / "_done" / f"{unit}.json").write_bytes(storage.json_bytes(record.__dict__))
    code = """
import resource, sys, time
from calibprune.stage import Stage
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
stage = Stage(sys.argv[1])
assert stage.plan({"seed": 1}, stage.read_plan()["units"]) == [] and len(stage.done_units()) == 20_000
stage.finish()
print(time.process_time() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, megabytes = map(float, out.split())
    assert seconds < 60 and megabytes < 80
    assert len(stage.records()) == 20_000


@pytest.mark.parametrize("damage", ["other bytes", "missing"])
def test_a_damaged_file_is_named_with_what_to_do(folder, damage):
    stage = finished_stage(folder)
    record = stage.records()[1]
    url = storage.join(folder, record.file)
    storage.remove(url)
    if damage == "other bytes":
        storage.write(url, b"0000X")
    with pytest.raises(CorruptionError, match=record.file) as error:
        stage.read(record)
    assert f"_done/{record.unit}.json; `calibprune run` with" in str(error.value)
    storage.remove(storage.join(folder, "_done", f"{record.unit}.json"))
    assert stage.plan({"seed": 1}, ["00000", "00001"]) == [record.unit]


def test_a_changed_setting_is_refused_by_name(tmp_path):
    settings = {"generate": {"temperature": 1.0, "seed": 1}}
    stage = finished_stage(str(tmp_path), settings)
    assert stage.plan(settings, ["00000", "00001"]) == []
    with pytest.raises(DriftError, match=r"generate\.temperature was 1\.0, now 0\.8"):
        stage.plan({"generate": {"temperature": 0.8, "seed": 1}}, ["00000", "00001"])


def test_versions_matter_only_while_units_are_missing(tmp_path):
    stage = Stage(str(tmp_path))
    stage.plan({"versions": {"torch": "1"}}, ["a"])
    with pytest.raises(DriftError, match=r"versions\.torch"):
        stage.plan({"versions": {"torch": "2"}}, ["a"])
    stage.commit("a", None, {})
    assert stage.plan({"versions": {"torch": "2"}}, ["a"]) == []


def test_sigkill_between_data_and_done_loses_only_that_unit(tmp_path):
    code = (
        f"from calibprune.stage import Record, Stage; s = Stage({str(tmp_path)!r}); s.plan({{}}, ['a']); "
        f"s.commit('a', s.put('a', b'x' * 100, 'bin', 'data', 'part'), {{}})"
    )
    (orders := tmp_path.parent / "failpoints").mkdir()
    (orders / "between-data-and-done-a").touch()
    environment = os.environ | {"CALIBPRUNE_FAILPOINTS": str(orders)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert killed.returncode == -9
    stage = Stage(str(tmp_path))
    assert stage.done_units() == set() and len(storage.names(f"{tmp_path}/data")) == 1
    subprocess.run([sys.executable, "-c", code], check=True)
    assert stage.done_units() == {"a"} and len(storage.names(f"{tmp_path}/data")) == 1


def test_a_half_written_file_never_shows(tmp_path, monkeypatch):
    def full(_):
        raise OSError("disk full")

    target = str(tmp_path / "file")
    storage.write(target, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        storage.write(target, b"new")
    assert storage.read_bytes(target) == b"old" and storage.names(str(tmp_path)) == ["file"]


def test_what_a_killed_driver_tried_a_folder_with_is_cleared_away(folder):
    folder = storage.join(folder, "tried")
    kept = [f"{folder}/run.json", f"{folder}/prune/.calibprune-1.tmp", f"{folder}/other.tmp"]
    probe = storage.probe_url(folder, "0123abcd")
    for url in (*kept, probe):
        storage.write(url, b"x")
    storage.remove_probes(folder)
    assert [storage.exists(url) for url in kept] == [True] * 3 and not storage.exists(probe)
    storage.remove_probes(f"{folder}/nowhere")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch, number):
    def fail(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    path = tmp_path / "data" / "part.bin"
    for publish in (storage.write, storage.create):
        with pytest.raises(UserError, match=rf"cannot write {path}: no space left on its disk"):
            publish(str(path), b"data")
    assert list(path.parent.iterdir()) == []


def test_an_unwritable_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        storage.check_writable(str(tmp_path / "file"))


def test_a_run_on_the_hub_is_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"calibprune publish RUN_URL STAGE hf://datasets/org/name"):
        storage.check_writable("hf://datasets/org/name")


def test_records_are_plain_json(tmp_path):
    finished_stage(str(tmp_path))
    record = json.loads((tmp_path / "_done" / "00001.json").read_text())
    assert record["bytes"] == 5 and record["facts"] == {"rows": 2} and len(record["sha256"]) == 64
