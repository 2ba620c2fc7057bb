"""Reading pools: ours, and folders of the user's own."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from calibprune.calibration.pool import pool_identity, read_pool, read_positions
from calibprune.errors import CorruptionError, UserError
from tests.calibprune.calibration.samples import curated, generated, repeated, settings


@pytest.fixture
def own(tmp_path):
    stage = generated(tmp_path / "generate", repeated([12] * 10))
    return curated(tmp_path / "curate", settings(), own=stage).stage


def test_a_run_in_a_pools_place_is_told_where_its_pool_is(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=rf"it is a run, whose pool is {tmp_path}/curate$"):
        pool_identity(str(tmp_path))


def test_a_pool_of_ones_own_is_a_folder_of_parquet_files(tmp_path):
    pq.write_table(pa.table({"token_ids": [[1, 2], [3, 4]]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"token_ids": [[5, 6]]}), tmp_path / "b.parquet")
    assert read_pool(str(tmp_path)).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert read_pool(str(tmp_path)).dtype == torch.int64 and read_positions(str(tmp_path)) is None
    for odd in ([[1, 2, 3]], [[1, 2], [3]], [[]]):
        pq.write_table(
            pa.table({"token_ids": pa.array(odd, pa.list_(pa.int32()))}), tmp_path / "odd.parquet"
        )
        with pytest.raises(UserError, match="same length"):
            read_pool(str(tmp_path))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "odd.parquet")
    with pytest.raises(UserError, match="needs a column token_ids"):
        read_pool(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no calibration pool"):
        read_pool(str(tmp_path / "empty"))


def test_positions_of_ones_own_pool(tmp_path):
    table = pa.table({"token_ids": [[1, 2], [3, 4]], "generated": [[False, True], [True, True]]})
    pq.write_table(table, tmp_path / "a.parquet")
    positions = read_positions(str(tmp_path))
    assert positions is not None and positions.dtype == torch.bool
    assert positions.tolist() == [[False, True], [True, True]]


def test_a_damaged_pool_is_named(own):
    record = own.record("pool-00000")
    with Path(own.url, str(record.file)).open("ab") as file:
        file.write(b"more")
    with pytest.raises(CorruptionError, match=str(record.file)):
        read_pool(own.url)


def test_a_pools_identity_is_that_of_its_content(own, tmp_path):
    other = generated(tmp_path / "b", repeated([12] * 10, first=2000))
    same = generated(tmp_path / "c", repeated([12] * 10), shard_rows=3)
    pools = [curated(tmp_path / f"of-{name}", settings(), own=stage).stage.url
             for name, stage in (("b", other), ("c", same))]  # fmt: skip
    assert pool_identity(own.url) == pool_identity(pools[1]) != pool_identity(pools[0])
    foreign = pool_identity(f"{own.url}/data")
    assert foreign == pool_identity(f"{pools[1]}/data") != pool_identity(f"{pools[0]}/data")
