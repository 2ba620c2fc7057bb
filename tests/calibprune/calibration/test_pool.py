"""Reading pools: ours, and folders of the user's own."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from calibprune import storage
from calibprune.calibration.pool import describe_pool, read_pool
from calibprune.errors import CorruptionError, UserError
from tests.calibprune.calibration.samples import curated, generated, repeated, settings


@pytest.fixture
def own(tmp_path):
    stage = generated(tmp_path / "generate", repeated([12] * 10))
    return curated(tmp_path / "curate", settings(), own=stage).stage


def write(folder, name="a", **columns):
    folder.mkdir(exist_ok=True)
    types = {"token_ids": pa.list_(pa.int32()), "generated": pa.list_(pa.bool_())}
    arrays = {key: pa.array(rows, types.get(key)) for key, rows in columns.items()}
    pq.write_table(pa.table(arrays), folder / f"{name}.parquet")


def test_a_run_in_a_pools_place_is_told_where_its_pool_is(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=rf"it is a run, whose pool is {tmp_path}/curate$"):
        describe_pool(str(tmp_path))


def test_a_pool_of_ones_own_is_a_folder_of_parquet_files(tmp_path):
    write(tmp_path, "a", token_ids=[[1, 2], [3, 4]])
    write(tmp_path, "b", token_ids=[[5, 6]])
    pool, facts = read_pool(str(tmp_path)), describe_pool(str(tmp_path))
    assert pool.token_ids.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert pool.token_ids.dtype == torch.int64 and pool.generated is None
    assert (facts.sequences, facts.tokens) == (3, 2)
    # as it stands in the plans of runs that are under way
    assert facts.identity == "241f04461ce27ec7f56fc2b339a43cff149d0178e243a99630d0095749907bd5"
    write(tmp_path, "b", token_ids=[[5, 7]])
    assert describe_pool(str(tmp_path)).identity != facts.identity


@pytest.mark.parametrize("read", [read_pool, describe_pool])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"token_ids": [[1, 2, 3]]}, "the same length, .* some have 2, 3 tokens$"),
        ({"token_ids": [[1, 2], [3]]}, r"odd\.parquet: .* the same length, .* 1, 2 tokens$"),
        ({"token_ids": [[]]}, r"odd\.parquet: .* of at least one token; here some have 0 tokens$"),
        ({"token_ids": []}, r"odd\.parquet has no sequence"),
        ({"text": ["a"]}, r"odd\.parquet: a pool needs a column token_ids, it has \['text'\]$"),
        ({"token_ids": [[1, 2]], "generated": [[True, True]]}, "only some of the pool's files"),
        ({"token_ids": [[1, 2]], "generated": [[True]]}, r"rows of 2 and 1 values: they must have"),
    ],
)
def test_what_is_wrong_with_a_pool_of_ones_own(tmp_path, read, columns, message):
    write(tmp_path, "a", token_ids=[[1, 2], [3, 4]])
    write(tmp_path, "odd", **columns)
    with pytest.raises(UserError, match=message) as error:
        read(str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_no_pool(tmp_path):
    with pytest.raises(UserError, match="holds no calibration pool"):
        read_pool(str(tmp_path))


def test_positions_of_ones_own_pool(tmp_path):
    write(tmp_path, token_ids=[[1, 2], [3, 4]], generated=[[False, True], [True, True]])
    pool, facts = read_pool(str(tmp_path)), describe_pool(str(tmp_path))
    assert pool.generated is not None and pool.generated.dtype == torch.bool
    assert pool.generated.tolist() == [[False, True], [True, True]]
    assert facts.identity == "419899677160a6fb97369b3fbe444503cfe969e4c68e2e46653311a71eec3254"


def test_a_pool_is_read_once_and_described_a_file_at_a_time(tmp_path, monkeypatch):
    rows = np.arange(1 << 18, dtype=np.int32).reshape(1 << 8, -1)
    for number in range(12):
        write(tmp_path, f"part-{number:02}", token_ids=list(rows + number))
    files, read_bytes = [], storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda url: (files.append(url), read_bytes(url))[1])

    def peak(read):
        files.clear()
        tracemalloc.start()
        read(str(tmp_path))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(files) == len(set(files)) == 12
        return most

    read_pool(str(tmp_path))
    assert 2 * peak(describe_pool) < peak(read_pool)


def test_a_damaged_pool_is_named_with_advice_that_helps(own, tmp_path):
    record = own.record("pool-00000")
    with Path(own.url, str(record.file)).open("ab") as file:
        file.write(b"more")
    with pytest.raises(CorruptionError, match=str(record.file)) as error:
        read_pool(own.url)
    done = Path(own.url, "_done", "pool-00000.json")
    assert f"remove it and {done}; `calibprune curate`" in str(error.value)
    Path(own.url, str(record.file)).unlink()
    with pytest.raises(CorruptionError, match="is damaged or missing"):
        read_pool(own.url)
    done.unlink()
    curated(own.url, settings(), own=generated(tmp_path / "again", repeated([12] * 10)))
    assert read_pool(own.url).token_ids.shape[1] == describe_pool(own.url).tokens


def test_a_pools_identity_is_that_of_its_content(own, tmp_path):
    other = generated(tmp_path / "b", repeated([12] * 10, first=2000))
    same = generated(tmp_path / "c", repeated([12] * 10), shard_rows=3)
    pools = [curated(tmp_path / f"of-{name}", settings(), own=stage).stage.url
             for name, stage in (("b", other), ("c", same))]  # fmt: skip

    def identity(url: str) -> str:
        return describe_pool(url).identity

    assert identity(own.url) == identity(pools[1]) != identity(pools[0])
    foreign = identity(f"{own.url}/data")
    assert foreign == identity(f"{pools[1]}/data") != identity(f"{pools[0]}/data")
    ours, theirs = describe_pool(own.url), describe_pool(f"{own.url}/data")
    assert (ours.sequences, ours.tokens) == (theirs.sequences, theirs.tokens)
