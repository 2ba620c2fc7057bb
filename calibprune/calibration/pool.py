"""The files of samples and of the calibration pool: their schemas, and how a pool is read, ours or the user's own."""

import io
import json
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from calibprune import storage
from calibprune.errors import CorruptionError, UserError
from calibprune.redact import one_line
from calibprune.stage import Record, Stage

SAMPLE_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "token_ids": pa.list_(pa.int32()),
        "prefix_length": pa.int32(),
        "cumulative_logprob": pa.float64(),
        "finish_reason": pa.string(),
        "seed": pa.int64(),
        "source": pa.string(),
    }
)
POOL_SCHEMA = pa.schema(
    {"sequence": pa.int64(), "token_ids": pa.list_(pa.int32()), "source": pa.string()}
)
GENERATED = pa.field("generated", pa.list_(pa.bool_()))
"""A further column of the pool with positions=generated: False where prefixes and prompts stand."""


def parquet_bytes(table: pa.Table) -> bytes:
    """A parquet file; equal tables give equal bytes under one version of pyarrow."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    return pq.read_table(io.BytesIO(data), columns=None if columns is None else list(columns))


def sample_records(generate: Stage) -> list[Record]:
    """The shards of a finished generate stage: neither files of prefixes nor shards that were set aside."""
    return [
        record
        for record in generate.records()
        if record.file is not None and not record.unit.startswith("prefixes-")
    ]


def read_samples(stage: Stage, record: Record) -> pa.Table:
    """One verified shard of samples."""
    return read_parquet(stage.read(record))


def pool_unit(number: int) -> str:
    return f"pool-{number:05d}"


def _pool_records(stage: Stage) -> list[Record]:
    """Of a finished curate stage. Raises UserError for any other stage."""
    records = [record for record in stage.records() if record.unit.startswith("pool-")]
    if not records:
        raise UserError(f"{stage.url} is a stage without a calibration pool: name a curate folder")
    return records


def read_pool(url: str) -> Int[Tensor, "sequences tokens"]:
    """Token ids of a pool: a stage folder made by `curate`, or any folder of parquet files with `token_ids`.

    Raises CorruptionError for a damaged file, UserError for a folder without sequences of one length.
    """
    parts = []
    for data in _pool_data(url):
        table = _read_foreign(data, url)
        if "token_ids" not in table.column_names:
            raise UserError(f"{url}: a pool needs a column token_ids, it has {table.column_names}")
        parts.append(_rows_of_one_length(table["token_ids"], url))
    if not parts:
        expected = "a folder of parquet files is expected"
        if storage.exists(storage.join(url, "run.json")):
            expected = f"it is a run, whose pool is {storage.join(url, 'curate')}"
        raise UserError(f"{url} holds no calibration pool: {expected}")
    lengths = {part.shape[1] for part in parts}
    if len(lengths) > 1:
        raise _lengths_differ(url, lengths)
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def read_positions(url: str) -> Bool[Tensor, "sequences tokens"] | None:
    """Which positions of a pool statistics are taken from; None where the pool has no column `generated`: from all.

    Raises as `read_pool` does.
    """
    parts, without = [], 0
    for data in _pool_data(url):
        table = _read_foreign(data, url)
        if GENERATED.name not in table.column_names:
            without += 1
            continue
        parts.append(_rows_of_one_length(table[GENERATED.name], url))
    if parts and without:
        raise UserError(f"{url}: only some of the pool's files have the column {GENERATED.name}")
    return torch.from_numpy(np.concatenate(parts)) if parts else None


def pool_identity(url: str) -> str:
    """A hash of a pool's content; of one that `curate` finished, of the recorded hashes of its files."""
    stage = Stage(url)
    if stage.finished:
        hashes = [record.sha256 for record in _pool_records(stage)]
        return storage.sha256(json.dumps(hashes).encode())
    pool, positions = read_pool(url), read_positions(url)
    counted = None if positions is None else storage.sha256(positions.numpy().tobytes())
    content = [list(pool.shape), storage.sha256(pool.numpy().tobytes()), counted]
    return storage.sha256(json.dumps(content).encode())


def pool_shape(url: str) -> tuple[int, int]:
    """(sequences, tokens of each), without reading a pool that `curate` finished. Raises as `read_pool` does."""
    stage = Stage(url)
    if stage.finished:
        facts = [record.facts for record in _pool_records(stage)]
        counts = [(one.get("sequences"), one.get("tokens")) for one in facts]
        if not all(isinstance(n, int) and 0 < n < 1 << 53 for count in counts for n in count):
            raise CorruptionError(f"{url} is damaged: its records do not say how large the pool is")
        sequences, tokens = map(sum, zip(*counts, strict=True))
        return sequences, tokens // sequences
    sequences, tokens = read_pool(url).shape
    return sequences, tokens


def _pool_data(url: str) -> Iterator[bytes]:
    stage = Stage(url)
    if stage.finished:
        yield from map(stage.read, _pool_records(stage))
        return
    for name in storage.names(url):
        if name.endswith(".parquet"):
            yield storage.read_bytes(storage.join(url, name))


def _read_foreign(data: bytes, url: str) -> pa.Table:
    """The columns of a pool that somebody else may have made. Raises UserError for what is no parquet file."""
    try:
        names = [
            n for n in pq.read_schema(io.BytesIO(data)).names if n in ("token_ids", GENERATED.name)
        ]
        return read_parquet(data, names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{url}: one of its parquet files cannot be read: {one_line(error)}"
        ) from None


def _rows_of_one_length(column: pa.ChunkedArray, url: str) -> np.ndarray:
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists or not (
        pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type)
    ):
        raise UserError(
            f"{url}: a pool's columns hold lists of whole numbers, here: {one_line(kind)}"
        )
    if column.null_count or column.combine_chunks().flatten().null_count:
        raise UserError(f"{url}: a pool has no empty values")
    rows = column.combine_chunks()
    lengths = set(rows.value_lengths().to_pylist())
    if len(lengths) != 1 or not all(lengths):
        raise _lengths_differ(url, lengths)
    return rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1)


def _lengths_differ(url: str, lengths: set[int]) -> UserError:
    shown = sorted(length or 0 for length in lengths)[:5]
    return UserError(f"{url}: every sequence of a pool has the same length, here: {shown}")
