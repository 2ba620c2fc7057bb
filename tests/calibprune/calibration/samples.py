"""Makes shards of invented samples for tests."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from calibprune.calibration.curate_units import (
    PHASES,
    Curation,
    kind_of,
    make_units,
    plan_curation,
)
from calibprune.calibration.pool import SAMPLE_SCHEMA, parquet_bytes
from calibprune.config.curate import CurateSettings
from calibprune.stage import Stage


def sample_table(token_ids, logprobs=None, first_row=0, prefix_length=1) -> pa.Table:
    count = len(token_ids)
    columns = {
        "row": range(first_row, first_row + count),
        "token_ids": [np.asarray(ids, np.int32) for ids in token_ids],
        "prefix_length": [prefix_length] * count,
        "cumulative_logprob": [-1.0] * count if logprobs is None else logprobs,
        "finish_reason": ["length"] * count,
        "seed": range(count),
        "source": ["bos"] * count,
    }
    columns = {name: list(values) for name, values in columns.items()}
    return pa.table(columns, schema=SAMPLE_SCHEMA)


def generated(folder: Path, token_ids, logprobs=None, shard_rows=4, facts=None, **changes) -> Stage:
    """Makes a finished generate stage of these samples, with `facts` in its manifest."""
    stage = Stage(str(folder))
    logprobs = [-1.0] * len(token_ids) if logprobs is None else logprobs
    starts = range(0, len(token_ids), shard_rows)
    stage.plan({"model": "the tiny one"}, [f"{i:05d}" for i in range(len(starts))])
    for number, start in enumerate(starts):
        here = slice(start, start + shard_rows)
        table = sample_table(token_ids[here], logprobs[here], start, **changes)
        unit = f"{number:05d}"
        published = stage.put(unit, parquet_bytes(table), "parquet", "data", "part")
        stage.commit(unit, published, {"rows": len(table)})
    stage.finish({"seconds": 1.0} | (facts or {}))
    return stage


def repeated(lengths, first=1000) -> list[list[int]]:
    """Sample i is [first + i] * lengths[i]."""
    return [[first + row] * length for row, length in enumerate(lengths)]


def settings(**changes) -> CurateSettings:
    return CurateSettings.model_validate({"sequences": 3, "sequence_tokens": 8} | changes)


def curate(curation: Curation) -> None:
    """Makes all missing units except those of documents."""
    done = curation.stage.done_units()
    missing = [unit for unit in curation.units() if unit not in done]
    for phase in PHASES[2:]:
        units = [unit for unit in missing if kind_of(unit) in phase]
        if units:
            list(make_units(curation, units))


def curated(folder: Path, wanted: CurateSettings, **stages: Stage) -> Curation:
    """Makes a finished curate stage; `stages` has each source's generate stage by name, `own` for self-generated."""
    named = {"self-generated" if name == "own" else name: stage for name, stage in stages.items()}
    curation = plan_curation(str(folder), wanted, named)
    curation.stage.plan({}, curation.units())
    curate(curation)
    curation.stage.finish({"seconds": 1.0})
    return curation
