"""Storage on a real S3 server that, behind a proxy, fails for a moment or refuses."""

import gzip
import io
import json
import random
import time
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibprune import storage
from calibprune.calibration.texts import documents
from calibprune.errors import LeaseExpired, StoreUnavailable, UserError
from calibprune.lease import Lease
from calibprune.retry import is_transient, redacted_url, retrying
from calibprune.stage import Stage
from cluster import probe
from tests.servers import Fault, faulty_proxy, make_bucket, moto, s3_at, web_server


@pytest.fixture(scope="module")
def proxied():
    with moto() as endpoint, faulty_proxy(endpoint) as proxy, s3_at(proxy.endpoint):
        make_bucket("runs")
        yield proxy


@pytest.fixture
def proxy(proxied):
    proxied.faults.clear()
    proxied.seen.clear()
    return proxied


@pytest.fixture
def url():
    return f"s3://runs/run-{uuid.uuid4().hex}"


@pytest.mark.parametrize(("status", "times"), [(500, 4), (503, 4), (429, 2), (None, 4)])
def test_a_stage_commits_exactly_once_through_passing_trouble(proxy, url, status, times):
    stage = Stage(url)
    proxy.faults += [Fault("PUT", "/data/", times, status), Fault("PUT", "/_done/", times, status)]
    stage.plan({}, ["unit"])
    record = stage.commit(
        "unit", stage.put("unit", b"x" * 1000, "bin", "data", "part"), {"rows": 1}
    )
    stage.finish()
    assert stage.records() == [record] and stage.read(record) == b"x" * 1000
    assert storage.names(storage.join(url, "data")) == [record.file.removeprefix("data/")]
    done = "answer lost" if status is None else str(status)
    assert proxy.count("PUT", "/_done/", done) >= min(times, 2)


def test_a_create_whose_answer_was_lost_is_ours_and_another_s_is_not(proxy, url):
    proxy.faults += [Fault("PUT", "/mine", 1), Fault("PUT", "/theirs", 1)]
    assert storage.create(storage.join(url, "mine"), b"mine")
    assert proxy.count("PUT", "/mine", "answer lost") == 1 and proxy.count("PUT", "/mine") == 2
    storage.write(storage.join(url, "theirs"), b"theirs")
    assert not storage.create(storage.join(url, "theirs"), b"mine")
    assert storage.read_bytes(storage.join(url, "theirs")) == b"theirs"


@pytest.mark.parametrize("status", [503, None])
def test_reads_and_listings_are_repeated(proxy, url, status):
    names = [f"file-{n:02d}" for n in range(20)]
    urls = [storage.join(url, name) for name in names]
    for each, name in zip(urls, names, strict=True):
        storage.write(each, name.encode())
    proxy.faults += [Fault("GET", "/file-07", 4, status), Fault("GET", "list-type", 4, status)]
    proxy.seen.clear()
    assert storage.names(url) == names
    assert storage.read_many(urls) == [name.encode() for name in names]
    assert proxy.count("GET", "/file-07") == 5 and proxy.count("GET", "/file-08") == 1


OPERATIONS = {
    "write": lambda url: storage.write(url, b"1"),
    "create": lambda url: storage.create(url, b"1"),
    "read": storage.read_bytes,
    "read many": lambda url: storage.read_many([url]),
    "read range": lambda url: storage.read_range(url, 0, 1),
    "exists": storage.exists,
    "list": storage.names,
    "remove": storage.remove,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_refusal_is_told_at_once_and_not_repeated(proxy, url, operation):
    proxy.faults += [Fault(m, "run-", 99, 403) for m in ("GET", "HEAD", "PUT", "DELETE")]
    with pytest.raises(
        UserError, match=r"access denied: cannot .* check that there are"
    ) as refusal:
        OPERATIONS[operation](f"{url}/file")
    assert url in str(refusal.value) and "\n" not in str(refusal.value)
    assert "tester" not in str(refusal.value)
    assert len(proxy.seen) == 1


def test_what_is_missing_is_not_asked_for_again(proxy, url):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{url}/file")
    assert proxy.count("GET", "/file") + proxy.count("HEAD", "/file") <= 2


def test_trouble_that_lasts_is_told_in_the_end(proxy, url, monkeypatch):
    monkeypatch.setattr("calibprune.retry.RETRY_SECONDS", 3.0)
    proxy.faults.append(Fault("PUT", "run-", 9999, 503))
    with pytest.raises(
        OSError, match=f"cannot write {url}/file: the store answers SlowDown, for 3 s"
    ):
        storage.write(f"{url}/file", b"1")
    assert proxy.count("PUT", "run-") > 3


def test_an_outage_is_nobodys_bad_input(proxy, url, monkeypatch):
    """The exit code decides whether a scheduler tries again."""
    monkeypatch.setattr("calibprune.retry.RETRY_SECONDS", 0.2)
    monkeypatch.setattr(probe, "PATIENCE_SECONDS", 0.2)
    proxy.faults.append(Fault("PUT", "run-", 9999, 503))
    with pytest.raises(StoreUnavailable, match="SlowDown") as trouble:
        storage.check_writable(url)
    assert not isinstance(trouble.value, UserError)
    assert probe.storage_errors(url)["output_transient"]
    proxy.faults[:] = [Fault("PUT", "run-", 9999, 403)]
    assert not probe.storage_errors(url)["output_transient"]


@pytest.mark.slow
def test_a_lease_that_runs_out_tells_the_trouble_of_the_store(proxy, url):
    with Lease(url, heartbeat_seconds=0.2, expire_seconds=1.5) as lease:
        proxy.faults += [Fault(method, "run-", 9999, 503) for method in ("GET", "HEAD", "PUT")]
        deadline = time.monotonic() + 10
        while not lease.lost and time.monotonic() < deadline:
            time.sleep(0.05)
        told = r"for 2 s: cannot .* the store answers (SlowDown|503)"
        with pytest.raises(LeaseExpired, match=told):
            lease.check()


def test_without_credentials_it_is_told_what_to_set(proxy, url, monkeypatch, tmp_path):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"access denied: cannot write .*AWS environment variables"):
        storage.write(f"{url}/file", b"1")
    s3fs.S3FileSystem.clear_instance_cache()


def test_over_plain_http_passing_trouble_is_not_absence(tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    with web_server(tmp_path) as endpoint, faulty_proxy(endpoint) as proxy:
        proxy.faults.append(Fault("GET", "/file", 2, 503))
        assert storage.exists(f"{proxy.endpoint}/file") and proxy.count("GET", "/file") == 3
        assert not storage.exists(f"{proxy.endpoint}/none")
        assert storage.read_bytes(f"{proxy.endpoint}/file") == b"1"
        proxy.faults[:] = [Fault("GET", "/file", 99, 403)]
        with pytest.raises(UserError, match="access denied"):
            storage.read_bytes(f"{proxy.endpoint}/file")


def test_errors_of_the_libraries_are_told_apart():
    import aiohttp
    import google.auth.exceptions
    import httpx2
    from gcsfs.retry import HttpError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    def hub(status):
        request = httpx2.Request("GET", "https://huggingface.co/x")
        return HfHubHTTPError("x", response=httpx2.Response(status, request=request))

    passing = [
        hub(429), hub(503), HttpError({"code": 500}), HttpError({"code": "429"}), TimeoutError(),
        aiohttp.ServerDisconnectedError(), httpx2.ReadTimeout("x"), ConnectionResetError(),
        google.auth.exceptions.TransportError("x"),
    ]  # fmt: skip
    final = [
        hub(403), hub(401), hub(404), hub(412), HttpError({"code": 403}), OSError("Forbidden: b/o"),
        FileNotFoundError("x"), FileExistsError("x"), PermissionError("x"), ValueError("x"),
        OfflineModeIsEnabled("x"), KeyboardInterrupt(),
    ]  # fmt: skip
    assert [e for e in passing if not is_transient(e)] == [] and [
        e for e in final if is_transient(e)
    ] == []


@pytest.mark.parametrize("error", [OSError("Forbidden: bucket/o"), PermissionError("secret")])
def test_a_denial_of_any_store_is_the_users_to_mend(error):
    def refuse():
        raise error

    with pytest.raises(UserError, match=r"cannot read gs://b/o .*gcloud") as refusal:
        retrying("gs://b/o", "read", refuse)
    assert "secret" not in str(refusal.value)


def test_a_signed_address_is_not_shown():
    assert redacted_url("https://user:pw@host/a/b?X-Signature=1") == "https://host/a/b"


def test_patience_is_bounded():
    tried = []

    def fail():
        tried.append(1)
        raise ConnectionResetError

    with pytest.raises(OSError, match="ConnectionResetError, for 1 s"):
        retrying("s3://b/o", "read", fail, patience_seconds=1.0)
    assert 2 <= len(tried) <= 4


@pytest.fixture
def texts(url, monkeypatch) -> list[str]:
    """Returns the contents of three files that are larger than what is read at once."""
    monkeypatch.setattr(storage.resolve(url)[0], "default_block_size", 50_000)
    found = [f"{row} " + random.randbytes(500).hex() for row in range(400)]
    table = io.BytesIO()
    pq.write_table(pa.table({"text": found}), table, row_group_size=50, compression="none")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in found)
    storage.write(storage.join(url, "a.jsonl"), lines.encode())
    storage.write(storage.join(url, "b.parquet"), table.getvalue())
    storage.write(storage.join(url, "c.txt.gz"), gzip.compress("\n".join(found).encode(), 1))
    return found


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", *(pytest.param(n, marks=pytest.mark.slow) for n in ("b.parquet", "c.txt.gz"))],
)
def test_texts_are_read_through_passing_trouble_wherever_it_comes(proxy, url, texts, name):
    opened = name == "b.parquet"  # small enough to be read as a whole
    proxy.faults += [Fault("HEAD", name, 7, 503)] if opened else []
    found = []
    for text in documents(storage.join(url, name)):
        if len(found) == 200 and not opened:
            proxy.faults.append(Fault("GET", name, 7, 503))
        found.append(text)
    assert found == texts and proxy.count("HEAD" if opened else "GET", name, "503") == 7


@pytest.mark.parametrize(("name", "later"), [("", 0), ("a.jsonl", 0), ("", 500), ("a.jsonl", 1)])
def test_texts_that_may_not_be_read_are_named_with_what_to_do(proxy, url, texts, name, later):
    there = storage.join(url, name).rstrip("/")
    denials = [Fault(method, "", 10_000, 403) for method in ("HEAD", "GET")]
    proxy.faults += [] if later else denials
    with pytest.raises(UserError, match=rf"access denied: cannot \w+ {url}.*AWS environment"):
        for number, _ in enumerate(documents(there)):
            if number == later:
                proxy.faults += denials
