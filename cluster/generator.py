"""The actor that holds a vLLM engine: continues one shard of prefixes at a time, scores it and commits it.

Rows never leave it: the driver gets the done records only.
"""

import logging
import time
from collections.abc import AsyncIterator, Sequence
from functools import cached_property

from calibprune.calibration.engine import Engine
from calibprune.calibration.pool import parquet_bytes
from calibprune.calibration.prefixes import PrefixReader
from calibprune.calibration.samples import sample_facts, write_rows
from calibprune.calibration.sources import score_shard
from calibprune.config.generate import GenerateSettings
from calibprune.config.model import ModelSettings
from calibprune.events import Event, UnitDone, emit
from calibprune.model import load_tokenizer
from calibprune.process import keep_compiled_code_private, node
from calibprune.stage import Stage
from cluster.label import label_of
from cluster.metrics import WorkMetrics


def shard_unit(shard: int) -> str:
    return f"{shard:05d}"


def shard_rows(unit: str, settings: GenerateSettings) -> range:
    """Returns the rows of a shard."""
    start = int(unit) * settings.shard_rows
    return range(start, min(start + settings.shard_rows, settings.samples))


class Generator:
    def __init__(
        self, model: ModelSettings, model_url: str, dtype: str, most_tokens: int,
        settings: GenerateSettings, stage_url: str, cpus: int, weight_bytes: int, sequence_bytes: int,
        over_nodes: bool,
    ) -> None:  # fmt: skip
        self._model, self._url, self._dtype = model, model_url, dtype
        self._most_tokens, self._settings, self._cpus = most_tokens, settings, cpus
        self._memory = {"weight_bytes": weight_bytes, "sequence_bytes": sequence_bytes}
        self._over_nodes, self._stage = over_nodes, Stage(stage_url)

    def start(self) -> str:
        """Starts the engine, which takes half a minute to several; returns the name of this machine."""
        keep_compiled_code_private()
        trust = self._model.trust_remote_code
        self._engine = Engine(
            self._url, self._dtype, self._settings, self._most_tokens, self._cpus,
            trust_remote_code=trust, rope_dtype=self._model.rope_dtype, over_nodes=self._over_nodes,
            **self._memory,
        )  # fmt: skip
        events = logging.getLogger("calibprune")
        events.setLevel(logging.INFO)
        events.addHandler(WorkMetrics(label_of(self._stage.url)))
        return node()

    def stop(self) -> None:
        """Shuts the engine down, so that it leaves no processes or files behind."""
        self._engine.shutdown()

    @cached_property
    def _prefixes(self) -> PrefixReader:
        tokenizer = load_tokenizer(self._url, self._model.trust_remote_code)
        return PrefixReader(self._stage, self._settings, tokenizer)

    async def complete(self, units: Sequence[str]) -> AsyncIterator[Event]:
        """Generates, scores and commits the rows of shards. Raises EngineDied."""
        for unit in units:
            started = time.monotonic()
            rows = shard_rows(unit, self._settings)
            table = await write_rows(self._engine, self._prefixes, self._settings, rows)
            published = self._stage.put(unit, parquet_bytes(table), "parquet", "data", "part")
            facts = sample_facts(table) | {"seconds": time.monotonic() - started}
            yield emit(UnitDone(self._stage.commit(unit, published, facts)))

    async def score(self, units: Sequence[str]) -> AsyncIterator[Event]:
        """Commits the model's log-probabilities of shards of documents. Raises EngineDied."""
        for unit in units:
            yield emit(UnitDone(await score_shard(self._engine, self._stage, unit)))
