"""Atomic files and the commit protocol, on local disk, in memory and on a real S3 server."""

import json
import os
import subprocess
import sys
import uuid

import pytest

from calibprune import storage
from calibprune.errors import CorruptionError, DriftError, UserError
from calibprune.run import Stage
from tests.servers import s3_server


@pytest.fixture(scope="module")
def s3_bucket():
    with s3_server("runs") as url:
        yield url


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"
    return str(tmp_path / "x") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_files_come_back_and_create_keeps_the_first(folder):
    url = storage.join(folder, "a", "b.bin")
    storage.write(url, b"one")
    storage.write(url, b"two")
    assert storage.read_bytes(url) == b"two" and storage.read_range(url, 1, 3) == b"wo"
    assert not storage.create(url, b"three") and storage.read_bytes(url) == b"two"
    assert storage.create(storage.join(folder, "a", "c"), b"c")
    assert storage.names(storage.join(folder, "a")) == ["b.bin", "c"]
    assert storage.names(storage.join(folder, "nothing")) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "nothing"))


def test_a_range_beyond_the_end_is_an_error(folder):
    storage.write(storage.join(folder, "x"), b"12")
    with pytest.raises(EOFError, match="0 to 5"):
        storage.read_range(storage.join(folder, "x"), 0, 5)


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
    assert stage.manifest()["facts"] == {"seconds": 1.0}
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


def test_the_first_commit_of_a_unit_wins(folder):
    stage = Stage(folder)
    first = stage.commit("u", stage.put("u", b"first", "bin", "data", "part"), {"attempt": 1})
    second = stage.commit("u", stage.put("u", b"second", "bin", "data", "part"), {"attempt": 2})
    assert second == first and stage.read(stage.record("u")) == b"first"


@pytest.mark.parametrize("damage", ["other bytes", "missing"])
def test_a_damaged_file_is_named(folder, damage):
    stage = finished_stage(folder)
    record = stage.records()[1]
    url = storage.join(folder, record.file)
    storage.remove(url)
    if damage == "other bytes":
        storage.write(url, b"0000X")
    with pytest.raises(CorruptionError, match=record.file):
        stage.read(record)


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
        f"from calibprune.run import Stage; s = Stage({str(tmp_path)!r}); s.plan({{}}, ['a']); "
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


def test_an_unwritable_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        storage.check_writable(str(tmp_path / "file"))


def test_records_are_plain_json(tmp_path):
    finished_stage(str(tmp_path))
    record = json.loads((tmp_path / "_done" / "00001.json").read_text())
    assert record["bytes"] == 5 and record["facts"] == {"rows": 2} and len(record["sha256"]) == 64
