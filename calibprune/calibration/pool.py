"""The calibration pool: generated samples scored, filtered and packed to sequences of one length."""

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from calibprune import storage
from calibprune.calibration.filters import Scores, filter_samples, perplexity
from calibprune.config import CurateSettings
from calibprune.errors import UserError
from calibprune.run import Record, Stage

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
HISTOGRAM_BINS = 40


def parquet_bytes(table: pa.Table) -> bytes:
    """A parquet file; equal tables give equal bytes under one version of pyarrow."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_samples(stage: Stage, record: Record) -> pa.Table:
    """One verified shard of generated samples."""
    return pq.read_table(io.BytesIO(stage.read(record)))


def curate(generate: Stage, stage: Stage, settings: CurateSettings) -> Iterator[Record]:
    """Scores, filters and packs the generated samples; yields the records of `dropped` and `pool`.

    Reads a shard at a time, twice, and holds the tokens of the pool only.
    Raises UserError when the samples kept are too little text.
    """
    records = generate.records()
    scores = _score(generate, records)
    reasons, cut = filter_samples(scores, settings.filters)
    kept = np.array([reason is None for reason in reasons], dtype=bool)
    order = np.random.default_rng(settings.seed).permutation(np.flatnonzero(kept))
    chosen = choose_samples(scores.tokens[order], settings)
    chosen_rows = scores.row[order[chosen]]

    tokens_of: dict[int, np.ndarray] = {}
    dropped = []
    reason_of = {
        int(row): reason for row, reason in zip(scores.row, reasons, strict=True) if reason
    }
    for record in records:
        table = read_samples(generate, record)
        rows = table["row"].to_numpy()
        for index in np.flatnonzero(np.isin(rows, chosen_rows)):
            tokens_of[int(rows[index])] = table["token_ids"][int(index)].values.to_numpy()
        out = np.flatnonzero([int(row) in reason_of for row in rows])
        if len(out):
            why = pa.array([reason_of[int(row)] for row in rows[out]], pa.string())
            dropped.append(table.take(pa.array(out)).append_column("reason", why))
    if dropped:
        data = parquet_bytes(pa.concat_tables(dropped))
        published = stage.put("dropped", data, "parquet", "dropped", "part")
        yield stage.commit("dropped", published, {"samples": len(reason_of)})
    else:
        yield stage.commit("dropped", None, {"samples": 0})

    sequences = pack([tokens_of[int(row)] for row in chosen_rows], settings)
    table = pa.table(
        [np.arange(len(sequences)), list(sequences), ["self-generated"] * len(sequences)],
        schema=POOL_SCHEMA,
    )
    facts = {
        "samples": len(reasons),
        "kept": int(kept.sum()),
        "dropped": dict(Counter(reason.split(":")[0] for reason in reasons if reason)),
        "used": len(chosen_rows),
        "sequences": len(sequences),
        "sequence_tokens": settings.sequence_tokens,
        "tokens": int(sequences.size),
        "perplexity": _histogram(scores.perplexity) | {"cut": cut},
    }
    yield stage.commit(
        "pool", stage.put("pool", parquet_bytes(table), "parquet", "data", "part"), facts
    )


def choose_samples(tokens: np.ndarray, settings: CurateSettings) -> np.ndarray:
    """Positions of the samples to pack, given the token counts of the kept ones in random order.

    Raises UserError, saying what is there and what is needed, when they are too few.
    """
    if settings.pack == "document":
        long_enough = np.flatnonzero(tokens >= settings.sequence_tokens)
        if len(long_enough) < settings.sequences:
            raise UserError(
                f"curate.pack=document needs {settings.sequences} samples of at least "
                f"{settings.sequence_tokens} tokens, {len(long_enough)} were kept: raise generate.samples, "
                f"or lower curate.sequences or curate.sequence_tokens"
            )
        return long_enough[: settings.sequences]
    needed = settings.sequences * settings.sequence_tokens
    total = np.cumsum(tokens)
    if not len(total) or total[-1] < needed:
        raise UserError(
            f"{settings.sequences} sequences of {settings.sequence_tokens} tokens need {needed} tokens, the "
            f"{len(tokens)} samples kept hold {int(total[-1]) if len(total) else 0}: raise generate.samples "
            f"or lower curate.sequences"
        )
    return np.arange(int(np.searchsorted(total, needed)) + 1)


def pack(
    samples: Sequence[np.ndarray], settings: CurateSettings
) -> Int[np.ndarray, "sequences tokens"]:
    """Fixed-length sequences without padding.

    `concat`: samples joined end to end and cut, as the paper does, but without overlap and without
    detokenising. `document`: the first tokens of each sample.
    """
    shape = settings.sequences, settings.sequence_tokens
    if settings.pack == "document":
        return np.stack([sample[: settings.sequence_tokens] for sample in samples])
    return np.concatenate(samples)[: shape[0] * shape[1]].reshape(shape)


def _pool_tables(url: str) -> list[pa.Table]:
    stage = Stage(url)
    if stage.finished:
        files = [stage.read(record) for record in stage.records() if record.unit == "pool"]
    else:
        names = [name for name in storage.names(url) if name.endswith(".parquet")]
        files = [storage.read_bytes(storage.join(url, name)) for name in names]
    if not files:
        raise UserError(f"{url} holds no calibration pool: a folder of parquet files is expected")
    return [pq.read_table(io.BytesIO(data)) for data in files]


def read_positions(url: str) -> Bool[Tensor, "sequences tokens"] | None:
    """Which positions of a pool count, from its column `generated`; None where there is no such column: all do.

    Raises UserError where the column does not have one value for every token.
    """
    tables = _pool_tables(url)
    if not any("generated" in table.column_names for table in tables):
        return None
    lengths = [
        [len(row) for table in tables if name in table.column_names for row in table[name]]
        for name in ("token_ids", "generated")
    ]
    if lengths[0] != lengths[1]:
        raise UserError(f"{url}: column generated needs one value for every one of the token_ids")
    rows = [
        row.values.to_numpy(zero_copy_only=False) for table in tables for row in table["generated"]
    ]
    return torch.from_numpy(np.stack(rows).astype(bool))


def read_pool(url: str) -> Int[Tensor, "sequences tokens"]:
    """Token ids of a pool: a stage folder made by `curate`, or any folder of parquet files with `token_ids`.

    Raises CorruptionError for a damaged file, UserError for a folder without sequences of one length.
    """
    tables = _pool_tables(url)
    if any("token_ids" not in table.column_names for table in tables):
        raise UserError(f"{url}: a pool needs a column token_ids, it has {tables[0].column_names}")
    rows = [np.asarray(row.values) for table in tables for row in table["token_ids"]]
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or not rows[0].size:
        raise UserError(
            f"{url}: every sequence of a pool has the same length, here: {sorted(lengths)[:5]}"
        )
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def pool_identity(url: str) -> str:
    """A hash of a pool's content."""
    return storage.sha256(read_pool(url).numpy().tobytes())


def _score(generate: Stage, records: Sequence[Record]) -> Scores:
    columns: Mapping[str, list] = {"row": [], "tokens": [], "perplexity": []}
    for record in records:
        table = read_samples(generate, record)
        tokens = table["token_ids"].combine_chunks().value_lengths().to_numpy()
        continuation = tokens - table["prefix_length"].to_numpy()
        columns["row"].append(table["row"].to_numpy())
        columns["tokens"].append(tokens)
        columns["perplexity"].append(
            perplexity(table["cumulative_logprob"].to_numpy(), continuation)
        )
    return Scores(**{name: np.concatenate(parts) for name, parts in columns.items()})


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """Bins of equal width in the logarithm: perplexities spread over orders of magnitude."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return {"edges": [], "counts": [], "median": None}
    low, high = float(finite.min()), float(finite.max())
    edges = np.geomspace(low, max(high, low * 1.01), HISTOGRAM_BINS + 1)
    edges[0], edges[-1] = low, max(high, edges[-1])
    counts, _ = np.histogram(finite, edges)
    return {
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "median": float(np.median(finite)),
    }
