"""Makes the samples of a shard: the engine continues every row's prefix, which gives a table in SAMPLE_SCHEMA.

Storing the rows and replacing a dead engine are left to the callers.
"""

import asyncio
from collections import Counter
from typing import Any

import pyarrow as pa

from calibprune.calibration.engine import Engine
from calibprune.calibration.pool import SAMPLE_SCHEMA
from calibprune.calibration.prefixes import PrefixReader, draw_seed, row_seed
from calibprune.config.generate import GenerateSettings, VocabularyPrefixes


async def write_rows(
    engine: Engine, prefixes: PrefixReader, settings: GenerateSettings, rows: range
) -> pa.Table:
    """Lets the model write `rows`, all at the same time; returns a table with one row for each, in order.

    A row depends only on settings and row number. Raises EngineDied as Engine.complete does.
    """
    starts = await asyncio.to_thread(prefixes.of, rows)
    if isinstance(settings.prefixes, VocabularyPrefixes) and settings.prefixes.draw == "model":
        starts = await _draw(engine, starts, settings, rows)
    seeds = [row_seed(settings.seed, row) for row in rows]
    completions = await engine.complete(starts, seeds)
    columns = {
        "row": list(rows),
        "token_ids": [p + c.token_ids for p, c in zip(starts, completions, strict=True)],
        "prefix_length": [len(prefix) for prefix in starts],
        "cumulative_logprob": [c.cumulative_logprob for c in completions],
        "finish_reason": [c.finish_reason for c in completions],
        "seed": seeds,
        "source": [settings.prefixes.type] * len(rows),
    }
    return pa.table(columns, schema=SAMPLE_SCHEMA)


def sample_facts(table: pa.Table) -> dict[str, Any]:
    """Returns the facts of a shard for its done record: rows, new tokens, and the number of rows per finish reason."""
    tokens = len(table["token_ids"].combine_chunks().flatten())
    prefixes = sum(table["prefix_length"].to_pylist())
    return {
        "rows": table.num_rows,
        "tokens": tokens - prefixes,
        "finish_reasons": dict(sorted(Counter(table["finish_reason"].to_pylist()).items())),
    }


async def _draw(
    engine: Engine, starts: list[list[int]], settings: GenerateSettings, rows: range
) -> list[list[int]]:
    """Appends prefix tokens that the model draws at temperature 1, untruncated, but never an end of text.

    All samples of one prefix get the same tokens, from a seed of the prefix.
    """
    assert isinstance(settings.prefixes, VocabularyPrefixes)
    tokens = settings.prefixes.tokens
    unchanged = settings.model_copy(
        update={
            "max_tokens": tokens,
            "min_tokens": tokens,  # up to there an end of text cannot be drawn
            "temperature": 1.0,
            "temperature_schedule": None,
            "top_p": 1.0,
            "top_k": None,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
    )
    start_of = {row // settings.samples_per_prefix: s for row, s in zip(rows, starts, strict=True)}
    seeds = [draw_seed(settings.seed, prefix) for prefix in start_of]
    drawn = await engine.complete(list(start_of.values()), seeds, unchanged)
    prefix_of = {
        prefix: start + completion.token_ids
        for (prefix, start), completion in zip(start_of.items(), drawn, strict=True)
    }
    return [list(prefix_of[row // settings.samples_per_prefix]) for row in rows]
