"""The decision about every sample: what the filters drop, what fills the pool, and the facts of it for the report.

It is made by one task from the samples' scores; no token is read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int16, Int32, Int64, UInt8

from calibprune.calibration.filters import (
    KEPT,
    NEAR,
    Outcome,
    apply_filters,
    filter_and_clause,
)
from calibprune.calibration.mixing import mixture, place_samples, shortage
from calibprune.calibration.pool import parquet_bytes, read_parquet
from calibprune.calibration.scores import ScratchColumns
from calibprune.config import CurateSettings, DuplicateFilter, RepetitionFilter
from calibprune.errors import UserError
from calibprune.run import Record, Stage

UNIT = "selection"
BINS = 40
NOWHERE = -1


@dataclass(frozen=True)
class Selection:
    """What is decided about every sample, in order of sources, shards and rows."""

    marks: UInt8[np.ndarray, " samples"]
    """0 for a kept sample, else `filters.mark`."""
    same_source: Int16[np.ndarray, " samples"]
    same_row: Int64[np.ndarray, " samples"]
    """Of a duplicate: what it is equal to."""
    start: Int64[np.ndarray, " samples"]
    """Where a used sample begins in its source's row of tokens; -1 for all others."""
    shard_rows: list[int]
    """Samples in every shard."""


def select(
    stage: Stage, settings: CurateSettings, units: Sequence[tuple[str, int]]
) -> tuple[Selection, dict[str, Any]]:
    """Filters, mixes and places; returns the selection and its facts.

    `units`: the units with the scores, each with the number of its source, in order of sources.
    Raises UserError, saying which source has how much and needs how much, where the pool cannot be filled.
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
            raise UserError("curate.sources hold no samples at all")
        stops = np.cumsum(sizes).tolist()
        sources = [range(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]

        values, steps = columns.load("perplexity"), []
        edges = _edges(values)
        outcome = Outcome(np.zeros(0, np.uint8))
        for outcome in apply_filters(settings.filters, columns.load, sources):
            steps.append(_step(settings, len(steps), outcome, values, edges))
        del values
        tokens = columns.load("tokens")
        start = _place(settings, outcome, tokens, shard_rows, sources)
        same_source, same_row = _same(outcome, columns, sources)
        facts = _facts(settings, outcome, tokens, start, sources, steps)
        facts["repetition"] = _repetition(settings, outcome, columns)
    return Selection(outcome.marks, same_source, same_row, start, shard_rows), facts


def _place(
    settings: CurateSettings,
    outcome: Outcome,
    tokens: Int32[np.ndarray, " samples"],
    shard_rows: Sequence[int],
    sources: Sequence[range],
) -> Int64[np.ndarray, " samples"]:
    shards = np.repeat(np.arange(len(shard_rows), dtype=np.int32), shard_rows)
    start = np.full(len(tokens), NOWHERE, np.int64)
    counts, kept_samples, available = mixture(settings), [], []
    for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
        kept = source.start + np.flatnonzero(outcome.marks[source.start : source.stop] == KEPT)
        used, starts = place_samples(kept, tokens[kept], shards[kept], count, number, settings)
        start[used] = starts
        kept_samples.append(len(kept))
        if settings.pack == "document":
            available.append(int((tokens[kept] >= settings.sequence_tokens).sum()))
        else:
            available.append(int(tokens[kept].sum(dtype=np.int64)))
    short = shortage(settings, counts, kept_samples, available)
    if short:
        raise UserError(short)
    return start


def _same(
    outcome: Outcome, columns: ScratchColumns, sources: Sequence[range]
) -> tuple[Int16[np.ndarray, " samples"], Int64[np.ndarray, " samples"]]:
    same_source = np.full(len(outcome.marks), NOWHERE, np.int16)
    same_row = np.full(len(outcome.marks), NOWHERE, np.int64)
    if outcome.same_as:
        stops = np.array([source.stop for source in sources])
        rows = columns.load("row")
        for index, same_as in outcome.same_as.items():
            filters, _ = filter_and_clause(outcome.marks.astype(np.int16))
            dropped = np.flatnonzero((outcome.marks != KEPT) & (filters == index))
            same_row[dropped] = rows[same_as]
            same_source[dropped] = np.searchsorted(stops, same_as, side="right")
    return same_source, same_row


def write_selection(
    stage: Stage, settings: CurateSettings, units: Sequence[tuple[str, int]]
) -> Record:
    """Commits the selection, with the facts in its record."""
    made, facts = select(stage, settings, units)
    columns = ("marks", "same_source", "same_row", "start")
    table = pa.table({name: getattr(made, name) for name in columns})
    table = table.replace_schema_metadata({"shard_rows": json.dumps(made.shard_rows)})
    published = stage.put(UNIT, parquet_bytes(table), "parquet", "selection", "part")
    return stage.commit(UNIT, published, facts)


def read_selection(stage: Stage) -> Selection:
    table = read_parquet(stage.read(stage.record(UNIT)))
    columns = {name: table[name].to_numpy() for name in table.column_names}
    metadata = table.schema.metadata or {}
    return Selection(**columns, shard_rows=json.loads(metadata[b"shard_rows"]))


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
        "duplicates": _duplicates(settings, outcome),
    }


def _step(
    settings: CurateSettings, number: int, outcome: Outcome, values: np.ndarray, edges: np.ndarray
) -> dict[str, Any]:
    """What is left after so many filters."""
    kept = outcome.marks == KEPT
    filters, _ = filter_and_clause(outcome.marks[~kept].astype(np.int16))
    left = values[kept & np.isfinite(values)]
    return {
        "filter": settings.filters[number - 1].type if number else None,
        "kept": int(kept.sum()),
        "dropped": int((filters == number - 1).sum()) if number else 0,
        "perplexity": {
            "edges": edges.tolist(),
            "counts": np.histogram(left, edges)[0].tolist() if len(edges) else [],
            "median": float(np.median(left)) if len(left) else None,
        },
    }


def _edges(values: np.ndarray) -> np.ndarray:
    """Bins of equal width in the logarithm: perplexities spread over orders of magnitude."""
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
) -> dict[str, Any] | None:
    for index, one in enumerate(settings.filters):
        if isinstance(one, RepetitionFilter):
            shares, edges = columns.load(f"{index}.share"), np.linspace(0, 1, BINS + 1)
            return _before_and_after(shares, outcome.marks == KEPT, edges)
    return None


def _duplicates(settings: CurateSettings, outcome: Outcome) -> dict[str, int] | None:
    found = [i for i, one in enumerate(settings.filters) if isinstance(one, DuplicateFilter)]
    if not found:
        return None
    filters, clauses = filter_and_clause(outcome.marks[outcome.marks != KEPT].astype(np.int16))
    here = np.isin(filters, found)
    near = int((clauses[here] == NEAR).sum())
    return {"exact": int(here.sum()) - near, "near": near}
