"""The actor that holds a vLLM engine: continues one shard of prefixes at a time, scores, commits.

Rows never leave it: the driver gets the done record only.
"""

import pyarrow as pa

from calibprune.calibration.engine import Engine
from calibprune.calibration.pool import SAMPLE_SCHEMA, parquet_bytes
from calibprune.calibration.prefixes import cut_prefixes, row_seed
from calibprune.config import GenerateSettings, ModelSettings
from calibprune.model import load_tokenizer
from calibprune.run import Record, Stage
from cluster.metrics import SampleMetrics


def shard_rows(unit: str, settings: GenerateSettings) -> range:
    """The rows of a shard."""
    start = int(unit) * settings.shard_rows
    return range(start, min(start + settings.shard_rows, settings.samples))


class Generator:
    def __init__(
        self, model: ModelSettings, folder: str, dtype: str, most_tokens: int,
        settings: GenerateSettings, stage_url: str, cpus: int,
    ) -> None:  # fmt: skip
        self._model, self._folder, self._dtype = model, folder, dtype
        self._most_tokens, self._settings, self._cpus = most_tokens, settings, cpus
        self._stage = Stage(stage_url)

    def start(self) -> None:
        """Starts the engine, which takes from half a minute to several."""
        trust = self._model.trust_remote_code
        self._tokenizer = load_tokenizer(self._folder, trust)
        self._engine = Engine(
            self._folder, self._dtype, self._settings, self._most_tokens, self._cpus,
            trust_remote_code=trust,
        )  # fmt: skip
        self._metrics = SampleMetrics()

    async def complete(self, unit: str) -> Record:
        """Generates, scores and commits the rows of one shard; returns its done record. Raises EngineDied."""
        settings = self._settings
        rows = shard_rows(unit, settings)
        prefixes = cut_prefixes(settings.prefixes, self._tokenizer, rows, settings.seed)
        seeds = [row_seed(settings.seed, row) for row in rows]
        completions = await self._engine.complete(prefixes, seeds)
        columns = {
            "row": list(rows),
            "token_ids": [p + c.token_ids for p, c in zip(prefixes, completions, strict=True)],
            "prefix_length": [len(prefix) for prefix in prefixes],
            "cumulative_logprob": [c.cumulative_logprob for c in completions],
            "finish_reason": [c.finish_reason for c in completions],
            "seed": seeds,
            "source": [settings.prefixes.type] * len(rows),
        }
        reasons = columns["finish_reason"]
        facts = {
            "rows": len(rows),
            "tokens": sum(len(c.token_ids) for c in completions),
            "finish_reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        }
        data = parquet_bytes(pa.table(columns, schema=SAMPLE_SCHEMA))
        published = self._stage.put(unit, data, "parquet", "data", "part")
        record = self._stage.commit(unit, published, facts)
        self._metrics.record(record)
        return record
