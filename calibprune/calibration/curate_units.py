"""The curate stage as units of work, each made from committed files alone, by any process, any number of times.

text-*, scored-*   documents as samples, and their log-probabilities under the model (sources.py)
scores-*           a few numbers of every sample (scores.py)
selection          the decision about every sample (decide.py)
dropped-*          the dropped samples with their reasons
pool-*             the calibration pool
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calibprune.calibration.decide import UNIT as SELECTION
from calibprune.calibration.decide import Selection, SelectionFile, write_selection
from calibprune.calibration.filters import CLAUSES, KEPT, reason
from calibprune.calibration.mixing import pool_files, source_of_sequence
from calibprune.calibration.pool import (
    GENERATED,
    POOL_SCHEMA,
    SAMPLE_SCHEMA,
    parquet_bytes,
    pool_unit,
    read_parquet,
    sample_records,
)
from calibprune.calibration.prefixes import start_token
from calibprune.calibration.scores import write_scores
from calibprune.calibration.sources import (
    Shard,
    flat_tokens,
    read_shard,
    scored_unit,
    text_units,
    write_documents,
)
from calibprune.config.curate import CurateSettings, NaturalSource, PerplexityFilter
from calibprune.events import UnitDone, emit
from calibprune.stage import Record, Stage

PORTION_BYTES = 32 << 20
"""Maximum bytes of the generated shards that are scored in one unit."""
PORTION_TEXT_SHARDS = 8
"""Number of shards of documents that are scored in one unit."""
PHASES = (("text",), ("scored",), ("scores",), (SELECTION,), ("dropped", "pool"))
"""Kinds of units, in the order in which they can be made; units of one phase do not depend on each other."""


@dataclass(frozen=True)
class Portion:
    """Consecutive shards of one source, scored in one unit."""

    source: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Curation:
    """The input of the stage, cut into portions; a function of settings and generated shards."""

    stage_url: str
    settings: CurateSettings
    portions: tuple[Portion, ...]
    model: str = ""
    """URL of the model whose tokenizer cuts documents into tokens."""
    trust_remote_code: bool = False

    @property
    def stage(self) -> Stage:
        return Stage(self.stage_url)

    def units(self) -> list[str]:
        """Lists all units, in the order in which they can be made."""
        texts = [unit for source in self.natural_sources() for unit in self.text_units(source)]
        scored = [scored_unit(unit) for unit in texts] if needs_scoring(self.settings) else []
        scores = [f"scores-{number:05d}" for number in range(len(self.portions))]
        dropped = [f"dropped-{number:05d}" for number in range(len(self.portions))]
        pool = [pool_unit(number) for number in range(len(pool_files(self.settings)))]
        return [*texts, *scored, *scores, SELECTION, *dropped, *pool]

    def natural_sources(self) -> list[NaturalSource]:
        return [one for one in self.settings.sources if isinstance(one, NaturalSource)]

    def text_units(self, source: NaturalSource) -> list[str]:
        return text_units(source, self.settings.sequence_tokens)


def needs_scoring(settings: CurateSettings) -> bool:
    """Returns whether documents need log-probabilities from the model."""
    return any(isinstance(one, PerplexityFilter) for one in settings.filters)


def plan_curation(
    stage_url: str,
    settings: CurateSettings,
    generated: Mapping[str, Stage],
    model: str = "",
    trust_remote_code: bool = False,
) -> Curation:
    """Cuts the sources into portions.

    `generated` has the finished generate stage of every generated source, by the source's name; `model` is the URL of
    the model whose tokenizer documents need.
    """
    portions: list[Portion] = []
    for number, source in enumerate(settings.sources):
        if isinstance(source, NaturalSource):
            scored = needs_scoring(settings)
            shards = [
                Shard(stage_url, unit, scored=scored_unit(unit) if scored else None)
                for unit in text_units(source, settings.sequence_tokens)
            ]
            parts = [
                shards[first : first + PORTION_TEXT_SHARDS]
                for first in range(0, len(shards), PORTION_TEXT_SHARDS)
            ]
        else:
            stage = generated[source.name]
            parts = _portions(stage.url, sample_records(stage))
        portions += [Portion(number, tuple(shards)) for shards in parts]
    return Curation(stage_url, settings, tuple(portions), model, trust_remote_code)


def _portions(stage_url: str, records: Iterable[Record]) -> Iterator[list[Shard]]:
    shards: list[Shard] = []
    size = 0
    for record in records:
        if shards and size + record.bytes > PORTION_BYTES:
            yield shards
            shards, size = [], 0
        shards.append(Shard(stage_url, record.unit, record))
        size += record.bytes
    if shards:
        yield shards


def kind_of(unit: str) -> str:
    """Returns the kind of a unit, such as `scores`."""
    return unit.partition("-")[0]


def make_units(curation: Curation, units: Sequence[str]) -> Iterator[UnitDone]:
    """Commits units of one phase, with one shard in memory at a time; `scored-*` units are left to engines.

    Units of documents must be of one source, whose text is read from its start. Raises CorruptionError naming a
    damaged file, UserError where the pool cannot be filled.
    """
    match kind_of(units[0]):
        case "text":
            records = _documents(curation, units)
        case "scores":
            records = (_write_scores(curation, unit) for unit in units)
        case "selection":
            records = (_write_selection(curation) for _ in units)
        case _:
            records = _write_files(curation, units)
    for record in records:
        yield emit(UnitDone(record))


def _documents(curation: Curation, units: Sequence[str]) -> Iterator[Record]:
    from calibprune.model import load_tokenizer  # takes seconds, and most units need none

    (source,) = (s for s in curation.natural_sources() if units[0] in curation.text_units(s))
    tokenizer = load_tokenizer(curation.model, curation.trust_remote_code)
    start = start_token(tokenizer) if source.bos else None
    tokens = curation.settings.sequence_tokens
    return write_documents(curation.stage, source, tokens, tokenizer, start, set(units))


def _write_scores(curation: Curation, unit: str) -> Record:
    shards = curation.portions[int(unit.removeprefix("scores-"))].shards
    return write_scores(curation.stage, unit, shards, curation.settings.filters)


def _write_selection(curation: Curation) -> Record:
    """Decides about all samples, with only a few numbers of each in memory."""
    units = [(f"scores-{i:05d}", one.source) for i, one in enumerate(curation.portions)]
    return write_selection(curation.stage, curation.settings, units)


def _write_files(curation: Curation, units: Iterable[str]) -> Iterator[Record]:
    """Writes units of dropped samples or of the pool, all from one reading of the selection."""
    selection = SelectionFile(curation.stage)
    for unit in units:
        kind, _, number = unit.partition("-")
        write = _write_dropped if kind == "dropped" else _write_pool
        yield write(curation, unit, int(number), selection)


def _write_dropped(curation: Curation, unit: str, number: int, chosen: SelectionFile) -> Record:
    stage, portions = curation.stage, curation.portions
    before = sum(len(portion.shards) for portion in portions[:number])
    first = sum(chosen.shard_rows[:before])
    shards = portions[number].shards
    rows = chosen.shard_rows[before : before + len(shards)]
    selection, offset = chosen.of(range(first, first + sum(rows))), 0
    scores = stage.record(f"scores-{number:05d}")
    if scores.file is None or not selection.marks.any():
        return stage.commit(unit, None, {"samples": 0})
    data, schema = stage.read(scores), SAMPLE_SCHEMA.append(pa.field("reason", pa.string()))
    names = [name for name in pq.read_schema(io.BytesIO(data)).names if ".band." not in name]
    known, dropped, buffer = read_parquet(data, names), 0, io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for shard, count in zip(shards, rows, strict=True):
            out = np.flatnonzero(selection.marks[offset : offset + count] != KEPT)
            if len(out):
                table = read_shard(shard)
                assert table is not None
                scored = known.take(pa.array(offset + out)).to_pylist()
                why = _reasons(curation.settings, selection, offset + out, scored)
                named = _from_source(table.take(pa.array(out)), curation, number)
                writer.write_table(
                    named.append_column("reason", pa.array(why, pa.string())).cast(schema)
                )
                dropped += len(out)
            offset += count
    published = stage.put(unit, buffer.getvalue(), "parquet", "dropped", "part")
    return stage.commit(unit, published, {"samples": dropped})


def _from_source(table: pa.Table, curation: Curation, number: int) -> pa.Table:
    """Replaces the samples' source by the name that it has in the settings."""
    name = curation.settings.sources[curation.portions[number].source].name
    index = table.schema.get_field_index("source")
    return table.set_column(index, "source", pa.array([name] * len(table), pa.string()))


def _reasons(
    settings: CurateSettings, selection: Selection, samples: np.ndarray, scored: Sequence[dict]
) -> list[str]:
    reasons = []
    for sample, scores in zip(samples, scored, strict=True):
        index, clause = divmod(int(selection.marks[sample]) - 1, CLAUSES)
        source = settings.sources[selection.same_source[sample]].name
        same = {"same_source": source, "same_row": selection.same_row[sample]}
        reasons.append(reason(settings.filters[index], index, clause, scores | same))
    return reasons


def _write_pool(curation: Curation, unit: str, number: int, chosen: SelectionFile) -> Record:
    settings, stage = curation.settings, curation.stage
    sequences = pool_files(settings)[number]
    every = source_of_sequence(settings)
    here = every[sequences.start : sequences.stop]
    shape = len(sequences), settings.sequence_tokens
    token_ids, generated = np.empty(shape, np.int32), np.empty(shape, bool)
    for source in np.unique(here):
        before = int((every[: sequences.start] == source).sum())
        mine = here == source
        token_ids[mine], generated[mine] = _sequences(
            curation, chosen, int(source), range(before, before + int(mine.sum()))
        )
    names = [settings.sources[source].name for source in here]
    columns = [np.arange(sequences.start, sequences.stop), _lists(token_ids), names]
    schema = POOL_SCHEMA
    if settings.positions == "generated":
        columns.append(_lists(generated))
        schema = schema.append(GENERATED)
    data = parquet_bytes(pa.table(columns, schema=schema))
    facts = {"sequences": len(sequences), "tokens": token_ids.size}
    return stage.commit(unit, stage.put(unit, data, "parquet", "data", "part"), facts)


def _lists(values: np.ndarray) -> pa.Array:
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))


def _sequences(
    curation: Curation, chosen: SelectionFile, source: int, wanted: range
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (token ids, which of them the model wrote) of sequences of a source, reading only the needed shards."""
    settings = curation.settings
    shards = [(one.source, shard) for one in curation.portions for shard in one.shards]
    stops = np.cumsum(chosen.shard_rows)
    owners = np.array([owner for owner, _ in shards])
    rows = np.array(chosen.shard_rows)
    begin, end = int(rows[owners < source].sum()), int(rows[owners <= source].sum())
    low, high = (bound * settings.sequence_tokens for bound in (wanted.start, wanted.stop))
    used, starts = chosen.used(range(begin, end), low, high)
    token_ids, generated = np.empty(high - low, np.int32), np.empty(high - low, bool)
    filled = 0
    shard_of = np.searchsorted(stops, used, side="right")
    for shard in np.unique(shard_of):
        table = read_shard(shards[shard][1])
        assert table is not None
        tokens, offsets = flat_tokens(table)
        prefixes = table["prefix_length"].to_numpy()
        here = shard_of == shard
        for sample, place in zip(used[here], starts[here], strict=True):
            row = sample - (stops[shard] - rows[shard])
            start, stop = offsets[row], offsets[row + 1]
            if settings.pack == "document":
                stop = start + settings.sequence_tokens
            at = place - low - start  # offset from positions in the shard to positions here
            left, right = max(start, -at), min(stop, high - low - at)
            token_ids[left + at : right + at] = tokens[left:right]
            generated[left + at : right + at] = np.arange(left, right) >= start + prefixes[row]
            filled += right - left
    if filled != high - low:
        raise RuntimeError(f"{filled} of {high - low} tokens were found: the shards have changed")
    shape = len(wanted), settings.sequence_tokens
    return token_ids.reshape(shape), generated.reshape(shape)
