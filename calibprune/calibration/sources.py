"""Shards of samples, and shards of the same schema made from documents that people wrote.

A shard of documents is a unit of the curate stage, `text-<source>-<number>`. Its log-probabilities under the model, for
filters that use them, are another unit, `scored-<source>-<number>`.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from calibprune import storage
from calibprune.calibration.pool import (
    SAMPLE_SCHEMA,
    parquet_bytes,
    read_parquet,
    read_samples,
    sample_records,
)
from calibprune.calibration.texts import documents
from calibprune.config.curate import NaturalSource
from calibprune.errors import UserError
from calibprune.stage import Record, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_TOKENS = 1 << 20
"""Tokens of the documents in one unit, which bound the cost of a crash and the memory."""
CHARACTERS_PER_TOKEN = 32
"""Characters read of a document per wanted token, far more than tokens have."""
FINISH_REASON = "text"
"""Finish reason of documents, in the column that samples have it in."""


@dataclass(frozen=True)
class Shard:
    """A file with some samples of one source."""

    stage_url: str
    unit: str
    record: Record | None = None
    """The done record; None for a shard that this stage makes: it is read from the stage."""
    scored: str | None = None
    """Unit of the same stage with the log-probabilities."""

    def committed(self) -> Record:
        """Returns the shard's done record."""
        return self.record or Stage(self.stage_url).record(self.unit)


def samples_of(path: str) -> Stage:
    """Returns the generate stage of another run. Raises UserError unless it has finished samples."""
    stage, expected = Stage(path), "the `generate` folder of a finished run"
    if not stage.finished:
        inside = storage.join(path, "generate")
        if Stage(inside).finished:
            expected = inside
        raise UserError(f"curate.sources: there are no finished samples at {path}: give {expected}")
    if not sample_records(stage):
        raise UserError(f"curate.sources: {path} is a stage without samples: give {expected}")
    return stage


def read_shard(shard: Shard) -> pa.Table | None:
    """Reads and verifies the samples, with their log-probabilities if there are any; None for an empty shard."""
    stage, record = Stage(shard.stage_url), shard.committed()
    if record.file is None:
        return None
    table = read_samples(stage, record)
    if shard.scored is not None:
        name = "cumulative_logprob"
        scored = read_parquet(stage.read(stage.record(shard.scored)))
        table = table.set_column(SAMPLE_SCHEMA.get_field_index(name), name, scored[name])
    return table


def flat_tokens(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Returns the samples' tokens end to end, int32, and the offsets at which they begin and end, int64."""
    column = table["token_ids"].combine_chunks()
    lengths = column.value_lengths().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return column.flatten().to_numpy(), offsets


def document_tokens(source: NaturalSource, sequence_tokens: int) -> int:
    """Returns the maximum tokens of a document, without a start-of-text token."""
    return source.document_tokens or sequence_tokens - source.bos


def scored_tokens(source: NaturalSource, sequence_tokens: int) -> int:
    """Returns the tokens that an engine needs room for to score a document: the document's, and one that follows."""
    return document_tokens(source, sequence_tokens) + source.bos + 1


def shard_documents(source: NaturalSource, sequence_tokens: int) -> int:
    """Returns the number of documents in one shard."""
    return max(1, SHARD_TOKENS // document_tokens(source, sequence_tokens))


def text_units(source: NaturalSource, sequence_tokens: int) -> list[str]:
    """Names the shards of a source, as many as its maximum number of documents fills."""
    count = -(-source.documents // shard_documents(source, sequence_tokens))
    return [f"text-{source.name}-{number:05d}" for number in range(count)]


def scored_unit(text_unit: str) -> str:
    return "scored-" + text_unit.removeprefix("text-")


def text_unit(scored_unit: str) -> str:
    return "text-" + scored_unit.removeprefix("scored-")


def write_documents(
    stage: Stage,
    source: NaturalSource,
    sequence_tokens: int,
    tokenizer: "PreTrainedTokenizerBase",
    start_token: int | None,
    missing: Collection[str],
) -> Iterator[Record]:
    """Commits the missing shards of a source, reading its documents once, a shard at a time.

    A document's row is its number. `start_token` goes in front of each, if there is one. Shards beyond the last
    document are committed without a file.
    """
    most, rows = document_tokens(source, sequence_tokens), shard_documents(source, sequence_tokens)
    texts = documents(
        source.path, name=source.dataset_name, split=source.split, column=source.column
    )
    starts = (text[: CHARACTERS_PER_TOKEN * most + 64] for text in texts)
    numbered = zip(range(source.documents), starts, strict=False)  # never reads a document too many
    for unit in text_units(source, sequence_tokens):
        shard = list(islice(numbered, rows))
        if unit not in missing:
            continue
        if not shard:
            yield stage.commit(unit, None, {"rows": 0, "tokens": 0})
            continue
        front = [] if start_token is None else [start_token]
        cut = first_tokens(tokenizer, [text for _, text in shard], most)
        token_ids = [front + ids for ids in cut]
        columns = {
            "row": [number for number, _ in shard],
            "token_ids": token_ids,
            "prefix_length": [len(front)] * len(shard),
            "cumulative_logprob": [None] * len(shard),
            "finish_reason": [FINISH_REASON] * len(shard),
            "seed": [None] * len(shard),
            "source": [source.name] * len(shard),
        }
        data = parquet_bytes(pa.table(columns, schema=SAMPLE_SCHEMA))
        published = stage.put(unit, data, "parquet", "text", "part")
        facts = {"rows": len(shard), "tokens": sum(map(len, token_ids))}
        yield stage.commit(unit, published, facts)


def first_tokens(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], count: int
) -> list[list[int]]:
    """Tokenizes the first `count` tokens of each text, or all of a shorter one, reading no more of it than needed."""
    found: list[list[int]] = [[] for _ in texts]
    missing, characters = list(range(len(texts))), 8 * count + 256
    while missing:
        answer: Any = tokenizer(
            [texts[i][:characters] for i in missing],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # otherwise it warns of texts longer than the model's context
        )
        short = []
        for index, ids in zip(missing, answer.input_ids, strict=True):
            # where a text was cut, its last tokens may be pieces of one token of the whole text
            if characters < len(texts[index]) and len(ids) < count + 32:
                short.append(index)
            else:
                found[index] = ids[:count]
        missing, characters = short, 4 * characters
    return found


class Scorer(Protocol):
    """The part of an engine that scoring uses."""

    async def score(self, token_ids: list[list[int]], first: list[int]) -> list[float]:
        """Sums the log-probabilities of each sample's tokens from position `first` on."""
        ...


async def score_shard(engine: Scorer, stage: Stage, unit: str) -> Record:
    """Commits `scored-...`: the model's log-probability of every document given its first token."""
    record = stage.record(text_unit(unit))
    if record.file is None:
        return stage.commit(unit, None, {"rows": 0, "tokens": 0})
    table = read_samples(stage, record)
    token_ids = table["token_ids"].to_pylist()
    first = scored_from(table["prefix_length"].to_numpy()).tolist()
    asked = [i for i, ids in enumerate(token_ids) if len(ids) > first[i]]
    sums = await engine.score([token_ids[i] for i in asked], [first[i] for i in asked])
    logprobs = [0.0] * len(token_ids)
    for index, value in zip(asked, sums, strict=True):
        logprobs[index] = value
    data = parquet_bytes(pa.table({"row": table["row"], "cumulative_logprob": logprobs}))
    tokens = sum(len(token_ids[i]) - first[i] for i in asked)
    published = stage.put(unit, data, "parquet", "scored", "part")
    return stage.commit(unit, published, {"rows": len(token_ids), "tokens": tokens})


def scored_from(prefix_length: np.ndarray) -> np.ndarray:
    """Returns the first position with a log-probability, since a first token has none."""
    return np.maximum(prefix_length, 1)
