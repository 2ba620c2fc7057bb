"""Files of samples and of the calibration pool: their schemas, and reading a pool, made by `curate` or by the user."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Int, Int64
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
"""Additional column of the pool with positions=generated: False for prefixes and prompts."""


def parquet_bytes(table: pa.Table) -> bytes:
    """Writes a parquet file; equal tables give equal bytes under one version of pyarrow."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    return pq.read_table(io.BytesIO(data), columns=None if columns is None else list(columns))


def sample_records(generate: Stage) -> list[Record]:
    """Lists the shards of a finished generate stage, without files of prefixes and shards that were set aside."""
    return [
        record
        for record in generate.records()
        if record.file is not None and not record.unit.startswith("prefixes-")
    ]


def read_samples(stage: Stage, record: Record) -> pa.Table:
    """Reads and verifies one shard of samples."""
    return read_parquet(stage.read(record))


def pool_unit(number: int) -> str:
    return f"pool-{number:05d}"


@dataclass(frozen=True)
class PoolFacts:
    """Facts of a pool that a run needs before any work."""

    sequences: int
    tokens: int
    """Tokens of each sequence."""
    identity: str
    """Hash of the content; for a pool that `curate` finished, of the recorded hashes of its files."""


@dataclass(frozen=True)
class Pool:
    """A calibration pool in memory."""

    token_ids: Int[Tensor, "sequences tokens"]
    generated: Bool[Tensor, "sequences tokens"] | None
    """Positions that statistics are taken from; None, for all, where the pool has no such column."""


def describe_pool(url: str) -> PoolFacts:
    """Measures and identifies a pool: from its records if `curate` finished it, else by reading it once.

    Holds one file in memory. Raises as `read_pool` does.
    """
    stage = Stage(url)
    if stage.finished:
        records = _pool_records(stage)
        counts = [(one.facts.get("sequences"), one.facts.get("tokens")) for one in records]
        if not all(isinstance(n, int) and 0 < n < 1 << 53 for count in counts for n in count):
            raise CorruptionError(
                f"{url} is damaged: its records do not have the size of the pool: remove that folder; "
                f"{_HOW_TO_RECREATE}"
            )
        sequences, tokens = map(sum, zip(*counts, strict=True))
        identity = json.dumps([record.sha256 for record in records])
        return PoolFacts(sequences, tokens // sequences, storage.sha256(identity.encode()))
    sequences = tokens = 0
    hashes, counted = (hashlib.sha256(), hashlib.sha256()), False
    for token_ids, generated in _parts(url):
        sequences, tokens = sequences + len(token_ids), token_ids.shape[1]
        hashes[0].update(token_ids.tobytes())
        if generated is not None:
            counted = True
            hashes[1].update(generated.tobytes())
    content = [
        [sequences, tokens], hashes[0].hexdigest(), hashes[1].hexdigest() if counted else None,
    ]  # fmt: skip
    return PoolFacts(sequences, tokens, storage.sha256(json.dumps(content).encode()))


def read_pool(url: str) -> Pool:
    """Reads a pool: a stage folder made by `curate`, or any folder of parquet files with `token_ids`.

    Raises CorruptionError for a damaged file, UserError for a folder without sequences of one length.
    """
    parts = list(_parts(url))
    token_ids = torch.from_numpy(np.concatenate([part for part, _ in parts]))
    generated = [part for _, part in parts if part is not None]
    return Pool(token_ids, torch.from_numpy(np.concatenate(generated)) if generated else None)


def _parts(
    url: str,
) -> Iterator[tuple[Int64[np.ndarray, "_ tokens"], Bool[np.ndarray, "_ tokens"] | None]]:
    """Yields token ids, and the positions that count if the pool has them, file by file, checked against each other."""
    lengths, columns = set[int](), set[bool]()
    for file, data in _files(url):
        table = _read_untrusted(data, file)
        if "token_ids" not in table.column_names:
            raise UserError(f"{file}: a pool needs a column token_ids, it has {_names(data)}")
        token_ids = _rows_of_one_length(table["token_ids"], pa.types.is_integer, file)
        generated = None
        if GENERATED.name in table.column_names:
            generated = _rows_of_one_length(table[GENERATED.name], pa.types.is_boolean, file)
            if generated.shape != token_ids.shape:
                raise UserError(
                    f"{file}: its columns token_ids and {GENERATED.name} have rows of {token_ids.shape[1]} and "
                    f"{generated.shape[1]} values: they must have the same length"
                )
        lengths.add(token_ids.shape[1])
        columns.add(generated is not None)
        if len(lengths) > 1:
            raise _lengths_differ(url, lengths)
        if len(columns) > 1:
            raise UserError(
                f"{url}: only some of the pool's files have the column {GENERATED.name}"
            )
        yield token_ids.astype(np.int64), generated
    if not lengths:
        expected = "a folder of parquet files is expected"
        if storage.exists(storage.join(url, "run.json")):
            expected = f"it is a run, whose pool is {storage.join(url, 'curate')}"
        raise UserError(f"{url} holds no calibration pool: {expected}")


def _files(url: str) -> Iterator[tuple[str, bytes]]:
    """Yields the URL and the bytes of every file, verified where `curate` recorded its hash."""
    stage = Stage(url)
    if not stage.finished:
        for name in storage.names(url):
            if name.endswith(".parquet"):
                file = storage.join(url, name)
                yield file, storage.read_bytes(file)
        return
    for record in _pool_records(stage):
        file = storage.join(url, str(record.file))
        try:
            yield file, stage.read(record)
        except CorruptionError:
            raise CorruptionError(
                f"{file} is damaged or missing: it does not match its record: remove it and "
                f"{storage.join(url, '_done', record.unit)}.json; {_HOW_TO_RECREATE}"
            ) from None


_HOW_TO_RECREATE = "`calibprune curate` with the configuration of its run makes it again; a copy must be copied again"


def _pool_records(stage: Stage) -> list[Record]:
    """Lists the records of a finished curate stage. Raises UserError for any other stage."""
    records = [record for record in stage.records() if record.unit.startswith("pool-")]
    if not records:
        raise UserError(f"{stage.url} is a stage without a calibration pool: give a curate folder")
    return records


def _read_untrusted(data: bytes, file: str) -> pa.Table:
    """Reads the columns of an untrusted file. Raises UserError where it is not a parquet file."""
    try:
        return read_parquet(data, [n for n in _names(data) if n in ("token_ids", GENERATED.name)])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a parquet file: {one_line(error)}") from None


def _names(data: bytes) -> list[str]:
    return pq.read_schema(io.BytesIO(data)).names


def _rows_of_one_length(
    column: pa.ChunkedArray, fits: Callable[[pa.DataType], bool], file: str
) -> np.ndarray:
    kind, rows = column.type, column.combine_chunks()
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists or not fits(kind.value_type):
        raise UserError(
            f"{file}: a pool's column token_ids must hold lists of integers, and {GENERATED.name} lists of booleans; "
            f"here: {one_line(kind)}"
        )
    if not len(rows):
        raise UserError(f"{file} has no sequence: each of a pool's files must have at least one")
    if rows.null_count or rows.flatten().null_count:
        raise UserError(f"{file}: a pool must not have empty values")
    lengths = set(rows.value_lengths().to_pylist())
    if len(lengths) != 1 or not all(lengths):
        raise _lengths_differ(file, lengths)
    return rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1)


def _lengths_differ(where: str, lengths: set[int]) -> UserError:
    some = ", ".join(map(str, sorted(lengths)[:5]))
    return UserError(
        f"{where}: all sequences of a pool must have the same length, of at least one token; here some have {some} "
        f"tokens"
    )
