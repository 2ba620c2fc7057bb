"""What opening a run does to its folder."""

from collections.abc import Iterator

import fsspec
import pytest

from calibprune.config import Config
from jobs.run import Run
from tests.servers import Fault, faulty_proxy, make_bucket, moto, rclone, s3_at


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto() as endpoint:
        with s3_at(endpoint):
            make_bucket("runs")
        yield endpoint


def opened(output: str) -> Run:
    run = Run(Config.model_validate({"model": {"path": "m"}, "output": output}))
    run.open()
    return run


def begin_upload(key: str) -> None:
    """An upload in parts that nobody will end."""
    call = fsspec.filesystem("s3").call_s3
    upload = call("create_multipart_upload", Bucket="runs", Key=key)["UploadId"]
    call("upload_part", Bucket="runs", Key=key, UploadId=upload, PartNumber=1, Body=b"x")


def uploads() -> list[str]:
    found = fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket="runs")
    return sorted(one["Key"] for one in found.get("Uploads", []))


def test_uploads_that_were_left_below_the_run_are_ended_and_no_others(endpoint):
    others = ["a/other/part", "a/run", "a/run-2/prune/part", "a/run/published/part"]
    with s3_at(endpoint):
        for key in ("a/run/prune/part", "a/run/generate/part", "a/run/generate/part", *others):
            begin_upload(key)
        assert len(uploads()) == 7
        run = opened("s3://runs/a/run")
        assert uploads() == others and run.begun


@pytest.mark.parametrize(("status", "said"), [(403, 1), (501, 0)])
def test_a_store_that_does_not_tell_of_uploads_ends_no_run(endpoint, caplog, status, said):
    with faulty_proxy(endpoint) as proxy, s3_at(proxy.endpoint):
        proxy.faults.append(Fault("GET", "uploads", 9, status))
        assert opened(f"s3://runs/{status}").begun
        assert proxy.count("GET", "uploads", str(status))
    assert len(caplog.messages) == said
    assert all(f"left of uploads below s3://runs/{status}" in line for line in caplog.messages)


def test_a_store_that_has_none_and_says_so_with_an_error_is_as_good(tmp_path, caplog):
    with rclone(tmp_path) as endpoint, s3_at(endpoint, weak=True):
        make_bucket("runs")
        assert opened("s3://runs/a").begun
    assert caplog.messages == []
