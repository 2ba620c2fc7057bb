"""The actor that holds a vLLM engine: continues one shard of prefixes at a time, scores, commits.

Rows never leave it: the driver gets the done record only.
"""

import os

from calibprune.calibration.engine import Engine, EngineDied
from calibprune.calibration.pool import parquet_bytes
from calibprune.calibration.prefixes import PrefixReader
from calibprune.calibration.samples import sample_facts, write_rows
from calibprune.config import GenerateSettings, ModelSettings
from calibprune.model import load_tokenizer
from calibprune.run import Record, Stage


class Generator:
    def __init__(
        self, model: ModelSettings, folder: str, dtype: str, most_tokens: int,
        settings: GenerateSettings, stage_url: str, cpus: int,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._stage = Stage(stage_url)
        tokenizer = load_tokenizer(folder, model.trust_remote_code)
        self._prefixes = PrefixReader(self._stage, settings, tokenizer)
        self._engine = Engine(
            folder,
            dtype,
            settings,
            most_tokens,
            cpus,
            trust_remote_code=model.trust_remote_code,
        )

    async def complete(self, unit: str) -> Record:
        """Generates, scores and commits the rows of one shard; returns its done record."""
        settings = self._settings
        start = int(unit) * settings.shard_rows
        rows = range(start, min(start + settings.shard_rows, settings.samples))
        try:
            table = await write_rows(self._engine, self._prefixes, settings, rows)
        except EngineDied:
            os._exit(1)  # a dead engine inside a living actor: let the driver see a death
        facts, data = sample_facts(table), parquet_bytes(table)
        return self._stage.commit(
            unit, self._stage.put(unit, data, "parquet", "data", "part"), facts
        )
