"""Decides about every sample: which ones the filters drop and which fill the pool, with the facts for the report.

One task decides from the samples' scores, without reading any token.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int16, Int32, Int64, UInt8

from calibprune.calibration.duplicates import first_equal
from calibprune.calibration.filters import (
    EQUAL,
    KEPT,
    NEAR,
    Outcome,
    apply_filters,
    dropped_by,
    mark,
    share_column,
)
from calibprune.calibration.mixing import mixture, place_samples, shortage
from calibprune.calibration.pool import read_parquet
from calibprune.calibration.scores import MEASURED, ScratchColumns
from calibprune.config.curate import CurateSettings, DuplicateFilter, RepetitionFilter
from calibprune.errors import UserError
from calibprune.stage import Record, Stage

UNIT = "selection"
BINS = 40
NOWHERE = -1
"""Stands for the place of a sample that is not used, and for the equal of one that is no duplicate."""
ROWS_AT_ONCE = 1 << 20
SCHEMA = pa.schema(
    {
        "marks": pa.uint8(),
        "start": pa.int64(),
        "same_source": pa.int16(),
        "same_row": pa.int64(),
    }
)


class Same(NamedTuple):
    """Dropped duplicates, and the source and row of the sample that each is equal to."""

    samples: Int64[np.ndarray, " duplicates"]
    source: Int16[np.ndarray, " duplicates"]
    row: Int64[np.ndarray, " duplicates"]


@dataclass(frozen=True)
class Decision:
    """The decision about every sample, in order of sources, shards and rows."""

    marks: UInt8[np.ndarray, " samples"]
    """0 for a kept sample, else `filters.mark`."""
    start: Int64[np.ndarray, " samples"]
    """Start of a used sample in its source's row of tokens; -1 for all others."""
    same: Same
    shard_rows: list[int]
    """Number of samples in every shard."""


@dataclass(frozen=True)
class Selection:
    """The decision about some samples, read back: marks, starts, and what duplicates are equal to."""

    marks: UInt8[np.ndarray, " samples"]
    start: Int64[np.ndarray, " samples"]
    same_source: Int16[np.ndarray, " samples"]
    same_row: Int64[np.ndarray, " samples"]


def select(
    stage: Stage, settings: CurateSettings, units: Sequence[tuple[str, int]]
) -> tuple[Decision, dict[str, Any]]:
    """Filters samples, mixes the sources and fills the pool; returns the decision and its facts.

    `units` are the units of scores, each with the number of its source, in order of sources. Raises UserError, with
    what each source has and needs, where the pool cannot be filled.
    """
    with ScratchColumns() as columns:
        shard_rows: list[int] = []
        sizes, shard_sources = [0] * len(settings.sources), []
        for unit, source in units:
            record = stage.record(unit)
            rows = record.facts["rows"]
            shard_rows += rows
            shard_sources += [source] * len(rows)
            sizes[source] += sum(rows)
            if record.file is not None:
                columns.append(read_parquet(stage.read(record)))
        if not sum(sizes):
            raise UserError("curate.sources have no samples at all")
        stops = np.cumsum(sizes).tolist()
        sources = [range(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]

        edges, steps = _edges(columns.load("perplexity")), []
        outcome = Outcome(np.zeros(0, np.uint8))
        for outcome in apply_filters(settings.filters, columns.load, sources):
            steps.append(_step(settings, len(steps), outcome, columns, edges))
        tokens = columns.load("tokens")
        start = _place(settings, outcome, tokens, shard_rows, sources)
        same = _same(outcome, columns, sources)
        facts = _facts(settings, outcome, tokens, start, sources, steps)
        facts |= _repetition(settings, outcome, columns)
        facts["duplicates"] = _duplicates(settings, outcome, columns)
    return Decision(outcome.marks, start, same, shard_rows), facts


def _place(
    settings: CurateSettings,
    outcome: Outcome,
    tokens: Int32[np.ndarray, " samples"],
    shard_rows: Sequence[int],
    sources: Sequence[range],
) -> Int64[np.ndarray, " samples"]:
    stops = np.cumsum(shard_rows)
    start = np.full(len(tokens), NOWHERE, np.int64)
    counts, kept_samples, available = mixture(settings), [], []
    for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
        kept = np.flatnonzero(outcome.marks[source.start : source.stop] == KEPT).astype(np.int32)
        kept += source.start

        def shard_of(some: np.ndarray, kept: np.ndarray = kept) -> np.ndarray:
            return np.searchsorted(stops, kept[some], side="right")

        used, starts = place_samples(tokens[kept], shard_of, count, number, settings)
        start[kept[used]] = starts
        kept_samples.append(len(kept))
        if settings.pack == "document":
            available.append(int((tokens[kept] >= settings.sequence_tokens).sum()))
        else:
            available.append(int(tokens[kept].sum(dtype=np.int64)))
    short = shortage(settings, counts, kept_samples, available)
    if short:
        raise UserError(short)
    return start


def _same(outcome: Outcome, columns: ScratchColumns, sources: Sequence[range]) -> Same:
    stops = np.array([source.stop for source in sources])
    samples, others = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for index, same_as in outcome.same_as.items():
        samples.append(np.flatnonzero(dropped_by(outcome.marks, index)))
        others.append(same_as)
    order = np.argsort(np.concatenate(samples))
    other = np.concatenate(others)[order]
    source = np.searchsorted(stops, other, side="right").astype(np.int16)
    row = columns.load("row", other) if len(other) else np.zeros(0, np.int64)
    return Same(np.concatenate(samples)[order], source, row)


def write_selection(
    stage: Stage, settings: CurateSettings, units: Sequence[tuple[str, int]]
) -> Record:
    """Decides and commits the selection, with the facts in its record."""
    made, facts = select(stage, settings, units)
    buffer, metadata = io.BytesIO(), {"shard_rows": json.dumps(made.shard_rows)}
    schema = SCHEMA.with_metadata(metadata)
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for first in range(0, len(made.marks), ROWS_AT_ONCE):
            here = slice(first, first + ROWS_AT_ONCE)
            rows = len(made.marks[here])
            low, high = np.searchsorted(made.same.samples, (first, first + rows))
            same_source, same_row = np.full(rows, NOWHERE, np.int16), np.full(rows, NOWHERE)
            places = made.same.samples[low:high] - first
            same_source[places], same_row[places] = (
                made.same.source[low:high],
                made.same.row[low:high],
            )
            columns = [made.marks[here], made.start[here], same_source, same_row]
            writer.write_table(pa.table([pa.array(column) for column in columns], schema=schema))
    published = stage.put(UNIT, buffer.getvalue(), "parquet", "selection", "part")
    return stage.commit(UNIT, published, facts)


class SelectionFile:
    """The committed selection, kept compressed in memory; a million samples at a time are unpacked."""

    def __init__(self, stage: Stage) -> None:
        data = stage.read(stage.record(UNIT))
        metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
        self.shard_rows: list[int] = json.loads(metadata[b"shard_rows"])
        self._file = pq.ParquetFile(io.BytesIO(data))
        groups = range(self._file.num_row_groups)
        sizes = [self._file.metadata.row_group(group).num_rows for group in groups]
        self._stops = np.cumsum(sizes)

    def of(self, samples: range) -> Selection:
        """Returns the decision about some samples."""
        parts = [part for _, part in self._parts(samples, SCHEMA.names)]
        table = pa.concat_tables(parts) if parts else SCHEMA.empty_table()
        return Selection(**{name: table[name].to_numpy() for name in SCHEMA.names})

    def used(
        self, samples: range, low: int, high: int
    ) -> tuple[Int64[np.ndarray, " some"], Int64[np.ndarray, " some"]]:
        """Returns (a source's samples that cover tokens [low, high) of its row of tokens, the start of each)."""
        found, starts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        # (start, sample) of the last one that starts at `low` or before
        covering = (NOWHERE, NOWHERE)
        for first, part in self._parts(samples, ["start"]):
            start = part["start"].to_numpy()
            here = np.flatnonzero((start > low) & (start < high))
            found.append(first + here)
            starts.append(start[here])
            last = int(np.argmax(np.where(start <= low, start, NOWHERE)))
            if start[last] <= low:
                covering = max(covering, (int(start[last]), first + last))
        every = np.concatenate([[covering[1]], *found]), np.concatenate([[covering[0]], *starts])
        order = np.argsort(every[0])
        return every[0][order], every[1][order]

    def _parts(self, samples: range, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
        """Yields (first sample, columns) of the part of the samples in each row group."""
        for group, stop in enumerate(self._stops.tolist()):
            start = stop - self._file.metadata.row_group(group).num_rows
            low, high = max(start, samples.start), min(stop, samples.stop)
            if low < high:
                table = self._file.read_row_group(group, columns, use_threads=False)
                yield low, table.slice(low - start, high - low)


def _facts(
    settings: CurateSettings,
    outcome: Outcome,
    tokens: Int32[np.ndarray, " samples"],
    start: Int64[np.ndarray, " samples"],
    sources: Sequence[range],
    steps: list[dict[str, Any]],
) -> dict[str, Any]:
    kept, used = outcome.marks == KEPT, start >= 0
    named = {}
    for source, range_, sequences in zip(settings.sources, sources, mixture(settings), strict=True):
        here = slice(range_.start, range_.stop)
        named[source.name] = {
            "samples": len(range_),
            "tokens": int(tokens[here].sum(dtype=np.int64)),
            "kept": int(kept[here].sum()),
            "used": int(used[here].sum()),
            "used_tokens": sequences * settings.sequence_tokens,
            "sequences": sequences,
        }
    dropped: dict[str, int] = {}
    for step in steps[1:]:
        if step["dropped"]:
            dropped[step["filter"]] = dropped.get(step["filter"], 0) + step["dropped"]
    edges = np.linspace(0, max(1, int(tokens.max())), BINS + 1)
    return {
        "samples": len(tokens),
        "kept": int(kept.sum()),
        "used": int(used.sum()),
        "sequences": settings.pool_sequences,
        "sequence_tokens": settings.sequence_tokens,
        "tokens": settings.pool_sequences * settings.sequence_tokens,
        "dropped": dropped,
        "sources": named,
        "steps": steps,
        "perplexity": steps[0]["perplexity"] | {"cut": outcome.cut},
        "lengths": _before_and_after(tokens, kept, edges),
    }


def _step(
    settings: CurateSettings,
    number: int,
    outcome: Outcome,
    columns: ScratchColumns,
    edges: np.ndarray,
) -> dict[str, Any]:
    """Returns the facts of the samples that are left after `number` filters."""
    kept, values = outcome.marks == KEPT, columns.load("perplexity")
    left = values[kept & np.isfinite(values)]
    del values
    return {
        "filter": settings.filters[number - 1].type if number else None,
        "kept": int(kept.sum()),
        "dropped": int(dropped_by(outcome.marks, number - 1).sum()) if number else 0,
        "perplexity": {
            "edges": edges.tolist(),
            "counts": np.histogram(left, edges)[0].tolist() if len(edges) else [],
            "median": float(np.median(left)) if len(left) else None,
        },
    }


def _edges(values: np.ndarray) -> np.ndarray:
    """Returns the edges of bins of equal logarithmic width, since perplexities span orders of magnitude."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return np.zeros(0)
    low, high = float(finite.min()), float(finite.max())
    edges = np.geomspace(low, max(high, low * 1.01), BINS + 1)
    edges[0], edges[-1] = low, max(high, edges[-1])
    return edges


def _before_and_after(values: np.ndarray, kept: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    return {
        "edges": edges.tolist(),
        "before": np.histogram(values, edges)[0].tolist(),
        "after": np.histogram(values[kept], edges)[0].tolist(),
    }


def _repetition(
    settings: CurateSettings, outcome: Outcome, columns: ScratchColumns
) -> dict[str, Any]:
    """Returns histograms of repetition, by the n-grams of the first repetition filter, or of `MEASURED`."""
    found = [one for one in settings.filters if isinstance(one, RepetitionFilter)]
    shares, longest = columns.load(share_column([*found, MEASURED][0])), columns.load("longest")
    kept = outcome.marks == KEPT
    return {
        "repetition": _before_and_after(shares, kept, np.linspace(0, 1, BINS + 1)),
        "repeats": _before_and_after(
            longest, kept, np.linspace(0, max(1, longest.max()), BINS + 1)
        ),
    }


def _duplicates(
    settings: CurateSettings, outcome: Outcome, columns: ScratchColumns
) -> dict[str, int | None]:
    """Counts the duplicates that were dropped; without a filter for them, the samples that equal an earlier one."""
    found = [i for i, one in enumerate(settings.filters) if isinstance(one, DuplicateFilter)]
    if not found:
        first = first_equal(columns.load("hash"))
        return {"exact": int((first != np.arange(len(first))).sum()), "near": None}
    exact, near = (
        sum(int((outcome.marks == mark(index, clause)).sum()) for index in found)
        for clause in (EQUAL, NEAR)
    )
    looked = any(one.near for one in settings.filters if isinstance(one, DuplicateFilter))
    return {"exact": exact, "near": near if looked else None}
