"""Computes the few numbers of each sample that filters and packing use, with one shard of tokens in memory."""

import io
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import BinaryIO, Self

import numpy as np
import pyarrow as pa
from jaxtyping import Int32

from calibprune import storage
from calibprune.calibration.duplicates import bands, sample_hashes, signatures
from calibprune.calibration.filters import band_column, perplexity, share_column
from calibprune.calibration.ngrams import longest_repeat, repetition_share
from calibprune.calibration.pool import parquet_bytes
from calibprune.calibration.sources import Shard, flat_tokens, read_shard, scored_from
from calibprune.config.curate import DuplicateFilter, Filter, RepetitionFilter
from calibprune.stage import Record, Stage

VERSION = 2
"""Version of the columns in a unit of scores."""
MEASURED = RepetitionFilter(type="repetition")
"""Measure of repetition for the report where no filter defines one."""


def score_samples(table: pa.Table, filters: Sequence[Filter]) -> dict[str, np.ndarray]:
    """Computes the scores of one shard by column: row, tokens, perplexity, hash, repetition, and the filters' own.

    Bands of a duplicate filter are [samples, bytes]. Perplexity is NaN where there are no log-probabilities.
    """
    tokens, offsets = flat_tokens(table)
    lengths = np.diff(offsets)
    continuation = lengths - scored_from(table["prefix_length"].to_numpy())
    logprobs = table["cumulative_logprob"].to_numpy()
    values = np.where(np.isnan(logprobs), np.nan, perplexity(logprobs, continuation))
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    columns = {
        "row": table["row"].to_numpy(),
        "tokens": lengths.astype(np.int32),
        "perplexity": values,
        "hash": sample_hashes(tokens, offsets),
    }
    tokens, offsets = _written(tokens, offsets, table["prefix_length"].to_numpy())
    columns["longest"] = longest_repeat(tokens, offsets)
    for one in (MEASURED, *filters):
        if isinstance(one, RepetitionFilter) and share_column(one) not in columns:
            columns[share_column(one)] = repetition_share(tokens, offsets, one.ngram)
    for index, one in enumerate(filters):
        if isinstance(one, DuplicateFilter) and one.near:
            count, rows = bands(one.similarity, one.permutations)
            signed = signatures(tokens, offsets, one.ngram, one.permutations)
            for number in range(count):
                part = signed[:, number * rows : (number + 1) * rows]
                columns[band_column(index, number)] = np.ascontiguousarray(part)
    return columns


def _written(
    tokens: np.ndarray, offsets: np.ndarray, prefixes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and offsets without prefixes, so that a prompt that many samples share makes none similar."""
    starts = offsets[:-1] + prefixes
    kept = np.concatenate([[0], np.cumsum(offsets[1:] - starts, dtype=np.int64)])
    written = [tokens[first:last] for first, last in zip(starts, offsets[1:], strict=True)]
    return np.concatenate([tokens[:0], *written]), kept


def write_scores(
    stage: Stage, unit: str, shards: Iterable[Shard], filters: Sequence[Filter]
) -> Record:
    """Commits the scores of some shards in one file; the facts have the number of samples in each shard."""
    parts, rows, tokens = [], [], 0
    for shard in shards:
        table = read_shard(shard)
        rows.append(0 if table is None else len(table))
        if table is not None:
            scored = score_samples(table, filters)
            tokens += int(scored["tokens"].sum(dtype=np.int64))
            parts.append(pa.table({name: as_column(values) for name, values in scored.items()}))
    facts = {"rows": rows, "tokens": tokens}
    if not parts:
        return stage.commit(unit, None, facts)
    data = parquet_bytes(pa.concat_tables(parts))
    return stage.commit(unit, stage.put(unit, data, "parquet", "scores", "part"), facts)


def as_column(values: np.ndarray) -> pa.Array:
    """Converts an array to a column of numbers; [samples, bytes] becomes a column of that many bytes."""
    if values.ndim == 1:
        return pa.array(values)
    kind = pa.binary(values.shape[1])
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


class ScratchColumns:
    """Columns that grow by appending and are loaded one at a time, kept in temporary files of this machine.

    They take as many bytes on disk as the scores have, up to 180 per sample; in memory is only what `load` returns.
    """

    def __init__(self) -> None:
        self._files: dict[str, BinaryIO] = {}
        self._kinds: dict[str, tuple[np.dtype, int | None]] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def append(self, table: pa.Table) -> None:
        for name in table.column_names:
            for chunk in table[name].chunks:
                self._append(name, chunk)

    def _append(self, name: str, chunk: pa.Array) -> None:
        width = None
        if pa.types.is_fixed_size_binary(chunk.type):
            width = chunk.type.byte_width
            buffer = chunk.buffers()[1]
            values = np.frombuffer(buffer, np.uint8)[
                chunk.offset * width : (chunk.offset + len(chunk)) * width
            ]
        else:
            values = chunk.to_numpy(zero_copy_only=False)
        if name not in self._files:
            self._files[name] = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            self._kinds[name] = values.dtype, width
        with storage.full_disk_named(tempfile.gettempdir()):
            self._files[name].write(np.ascontiguousarray(values).data)

    def load(self, name: str, samples: Int32[np.ndarray, " some"] | None = None) -> np.ndarray:
        """Loads a column as [samples], or [samples, bytes] for a column of bytes; only `samples` if they are given."""
        dtype, width = self._kinds[name]
        file = self._files[name]
        with storage.full_disk_named(tempfile.gettempdir()):
            file.flush()
        count = file.seek(0, io.SEEK_END) // (dtype.itemsize * (width or 1))
        shape = (count,) if width is None else (count, width)
        if samples is not None:
            mapped = np.memmap(file, dtype, "r", shape=shape)
            return np.asarray(mapped[samples])
        values = np.empty(shape, dtype)
        file.seek(0)
        file.readinto(memoryview(values.reshape(-1)).cast("B"))  # type: ignore[attr-defined]
        return values
