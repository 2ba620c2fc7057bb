"""Prefix token ids and sampling seeds of every sample, as a function of settings, seed and row alone.

Row r starts from prefix r // samples_per_prefix. Prefixes from a dataset or from prompts are cut once into files of the
stage, independent of the shards; others are computed where they are needed. So a sample can be made anywhere, any
number of times.
"""

import io
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calibprune.calibration.pool import parquet_bytes
from calibprune.calibration.prefix_sources import candidates, check_prompts, most_tokens
from calibprune.config.generate import (
    BosPrefixes,
    DatasetPrefixes,
    GenerateSettings,
    Prefixes,
    PromptPrefixes,
    VocabularyPrefixes,
)
from calibprune.errors import UserError
from calibprune.events import Tick, UnitDone, emit
from calibprune.stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIXES_PER_FILE = 20_000
_TICK_DOCUMENTS = 1000
"""Number of documents read, used or not, between two signs of life."""
_CHECKED_DOCUMENTS = 4096
"""Number of documents that the check before work reads at most."""
_MAX_REMEMBERED = 20_000
"""Maximum number of a source's documents that are kept in memory for another round."""
_MAX_ROUNDS = 1000
"""Maximum number of rounds through a large source with hardly any usable documents."""
_MAX_DRAWS = 10_000
"""Maximum number of draws that may hit a token that is not ordinary."""


def prefix_units(settings: GenerateSettings) -> list[str]:
    """Names the files of prefixes, in order; none where prefixes are computed."""
    return prefix_units_of(range(settings.samples), settings)


def prefix_units_of(rows: range, settings: GenerateSettings) -> list[str]:
    """Names the files that hold the prefixes of these rows; none where prefixes are computed."""
    if not isinstance(settings.prefixes, DatasetPrefixes | PromptPrefixes):
        return []
    each = settings.samples_per_prefix * PREFIXES_PER_FILE
    return [_prefix_unit(file) for file in range(rows[0] // each, rows[-1] // each + 1)]


def _prefix_unit(file: int) -> str:
    return f"prefixes-{file:05d}"


def cut_prefixes(
    stage: Stage,
    settings: GenerateSettings,
    tokenizer: "PreTrainedTokenizerBase",
    missing: set[str],
) -> Iterator[UnitDone | Tick]:
    """Reads the source from its start and commits the missing units, each a parquet file of `token_ids`.

    Yields Tick in between as a sign of life. Documents with too few tokens for the prefix, and prompts with too many,
    are skipped. A source with too few documents is read repeatedly: its prefixes repeat, their samples do not. Facts of
    a unit: `prefixes`, the documents `passed_over` while it was filled, and `source_prefixes`, the number of prefixes
    in the whole source (None: its end was not reached). Holds one unit in memory.
    Raises UserError where the source cannot be read or nothing in it is usable.
    """
    units = prefix_units(settings)
    if not missing.intersection(units):
        return
    cuts = _cut(settings, tokenizer)
    left, passed_over = _prefix_count(settings), 0
    for unit in units[: 1 + max(i for i, unit in enumerate(units) if unit in missing)]:
        count = min(left, PREFIXES_PER_FILE)
        left -= count
        filled: list[np.ndarray] = []
        taken = 0
        while taken < count:
            cut = next(cuts)
            if cut is None:
                yield Tick()
                continue
            taken, last = taken + 1, cut
            if unit in missing:
                filled.append(cut.token_ids)
        if unit in missing:
            facts = {
                "prefixes": count,
                "passed_over": last.passed_over - passed_over,
                "source_prefixes": last.source_prefixes,
            }
            published = stage.put(unit, _parquet(filled), "parquet", "prefixes", "part")
            yield emit(UnitDone(stage.commit(unit, published, facts)))
        passed_over = last.passed_over


def check_prefixes(settings: GenerateSettings, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Checks, from the start of the source, that there will be prefixes.

    Raises UserError where there is no such source or column, no chat template or one that does not end, no token to
    start with, or nothing usable among the first few thousand documents.
    """
    prefixes = settings.prefixes
    if _starts_with_bos(prefixes):
        start_token(tokenizer)
    match prefixes:
        case VocabularyPrefixes(draw="uniform"):
            _OrdinaryTokens(tokenizer).draw(1, settings.seed, 0)
        case DatasetPrefixes() | PromptPrefixes():
            most = most_tokens(prefixes)
            if isinstance(prefixes, PromptPrefixes):
                check_prompts(prefixes, tokenizer)
            start = islice(candidates(prefixes, tokenizer), _CHECKED_DOCUMENTS)
            if not any(_usable(prefixes, tokens, most) for tokens in start):
                raise _nothing_usable(prefixes, most, _CHECKED_DOCUMENTS)


class PrefixReader:
    """Returns the prefixes of rows, of any type; holds one file of prefixes in memory.

    Its constructor raises UserError where the tokenizer has no token to start with.
    """

    def __init__(
        self, stage: Stage, settings: GenerateSettings, tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        self._stage, self._settings = stage, settings
        self._held: tuple[str, list[np.ndarray]] = ("", [])
        prefixes = settings.prefixes
        if isinstance(prefixes, BosPrefixes | VocabularyPrefixes):
            self._front = [start_token(tokenizer)] if _starts_with_bos(prefixes) else []
            self._ordinary = _OrdinaryTokens(tokenizer)

    def of(self, rows: range) -> list[list[int]]:
        """Returns the token ids that each row starts from; with `draw: model`, those that its prefix is drawn after."""
        return [list(self._prefix(row // self._settings.samples_per_prefix)) for row in rows]

    def _prefix(self, index: int) -> list[int]:
        prefixes, seed = self._settings.prefixes, self._settings.seed
        match prefixes:
            case BosPrefixes() | VocabularyPrefixes(draw="model"):
                return self._front
            case VocabularyPrefixes():
                return self._front + self._ordinary.draw(prefixes.tokens, seed, index)
        file, place = divmod(index, PREFIXES_PER_FILE)
        return self._file(_prefix_unit(file))[place].tolist()

    def _file(self, unit: str) -> list[np.ndarray]:
        held, prefixes = self._held
        if held != unit:
            table = pq.read_table(io.BytesIO(self._stage.read(self._stage.record(unit))))
            lists = table["token_ids"].combine_chunks()
            prefixes = np.split(lists.values.to_numpy(), lists.offsets.to_numpy()[1:-1])
            self._held = (unit, prefixes)
        return prefixes


def longest_prefix(settings: Prefixes) -> int:
    """Returns the number of tokens of the longest possible prefix, start-of-text token included."""
    match settings:
        case BosPrefixes():
            return 1
        case VocabularyPrefixes():
            return settings.tokens + settings.bos
        case DatasetPrefixes():
            return most_tokens(settings) + settings.bos
        case PromptPrefixes():
            return settings.max_prompt_tokens


def row_seed(seed: int, row: int) -> int:
    """Returns the seed, of 63 bits, for sampling the row's continuation."""
    return _digest("sampling", seed, row) >> 1


def draw_seed(seed: int, prefix: int) -> int:
    """Returns the seed, of 63 bits, with which the model draws this prefix."""
    return _digest("prefix drawn by the model", seed, prefix) >> 1


def _digest(purpose: str, seed: int, number: int) -> int:
    """Returns 64 bits that differ for every purpose, seed and row or prefix."""
    key = f"calibprune {purpose} {seed} {number}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")


def _prefix_count(settings: GenerateSettings) -> int:
    return -(-settings.samples // settings.samples_per_prefix)


def _starts_with_bos(settings: Prefixes) -> bool:
    """Returns whether a start-of-text token is put in front; a chat template has its own."""
    match settings:
        case BosPrefixes():
            return True
        case PromptPrefixes():
            return False
        case _:
            return settings.bos


def start_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Returns the start-of-text token, or else the end-of-text token, which separates documents in training."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise UserError(
        f"the tokenizer of {tokenizer.name_or_path} has neither a bos nor an eos token: "
        "use prefixes of type dataset, or vocabulary with draw: uniform, and bos: false"
    )


class _OrdinaryTokens:
    """Tokens learned from text (not special, not added) that decode to text on their own."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        self.others = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def draw(self, count: int, seed: int, prefix: int) -> list[int]:
        """Draws `count` tokens uniformly and independently."""
        random = Random(_digest("prefix", seed, prefix))
        drawn: list[int] = []
        for _ in range(_MAX_DRAWS + count):
            token = random.randrange(self.size)
            if self._is_ordinary(token):
                drawn.append(token)
                if len(drawn) == count:
                    return drawn
        raise UserError(f"the tokenizer of {self.tokenizer.name_or_path} has no ordinary tokens")

    def _is_ordinary(self, token: int) -> bool:
        if token in self.others:
            return False
        text = self.tokenizer.decode([token])
        return bool(text) and "\ufffd" not in text  # a part of a character decodes to U+FFFD


class _Cut(NamedTuple):
    token_ids: np.ndarray
    passed_over: int
    """Number of documents skipped so far."""
    source_prefixes: int | None
    """Number of prefixes in the whole source; None before its end."""


def _cut(settings: GenerateSettings, tokenizer: "PreTrainedTokenizerBase") -> Iterator[_Cut | None]:
    """Yields every prefix from number 0 on, without end, and None from time to time, even if no document is usable."""
    prefixes = settings.prefixes
    assert isinstance(prefixes, DatasetPrefixes | PromptPrefixes)
    bos = [start_token(tokenizer)] if _starts_with_bos(prefixes) else []
    front = np.array(bos, np.int32)
    index = passed_over = 0
    source_prefixes = None
    for once in _rounds(lambda: candidates(prefixes, tokenizer)):
        before = index
        for tokens in once:
            length = _length(prefixes, settings.seed, index)
            if _usable(prefixes, tokens, length):
                yield _Cut(np.concatenate([front, tokens[:length]]), passed_over, source_prefixes)
                index += 1
            else:
                passed_over += 1
            if (index + passed_over) % _TICK_DOCUMENTS == 0:
                yield None
        if index == before:
            raise _nothing_usable(prefixes, _length(prefixes, settings.seed, index))
        source_prefixes = index if source_prefixes is None else source_prefixes
        if passed_over > _MAX_REMEMBERED and index * _MAX_ROUNDS < _prefix_count(settings):
            raise UserError(
                f"only {index} of {index + passed_over} documents in {prefixes.path} can be used, and "
                f"{_prefix_count(settings)} prefixes are asked for: lower generate.samples, ask for fewer tokens, or "
                f"raise generate.samples_per_prefix"
            )


def _rounds(read: Callable[[], Iterator[np.ndarray]]) -> Iterator[Iterator[np.ndarray]]:
    """Yields one round through the documents after another, without end; keeps the documents of small sources."""
    few: list[np.ndarray] = []

    def first() -> Iterator[np.ndarray]:
        for tokens in read():
            if len(few) <= _MAX_REMEMBERED:
                few.append(tokens)
            yield tokens

    yield first()
    while True:
        yield iter(few) if len(few) <= _MAX_REMEMBERED else read()


def _length(settings: DatasetPrefixes | PromptPrefixes, seed: int, index: int) -> int:
    """Returns the number of tokens of this prefix, without a start-of-text token; for a prompt, the maximum."""
    if isinstance(settings, DatasetPrefixes) and isinstance(settings.tokens, tuple):
        least, most = settings.tokens
        return least + _digest("prefix length", seed, index) % (most - least + 1)
    return most_tokens(settings)


def _usable(settings: DatasetPrefixes | PromptPrefixes, tokens: np.ndarray, length: int) -> bool:
    """Returns whether a document has enough tokens, or a prompt, which is taken whole, not too many."""
    if isinstance(settings, PromptPrefixes):
        return 0 < len(tokens) <= length
    return len(tokens) >= length


def _nothing_usable(
    settings: DatasetPrefixes | PromptPrefixes, length: int, checked: int | None = None
) -> UserError:
    some = "" if checked is None else f" of the first {checked}"
    if isinstance(settings, PromptPrefixes):
        return UserError(
            f"no prompt{some} in {settings.path} has at most {length} tokens, chat template included: "
            "set generate.prefixes.max_prompt_tokens higher"
        )
    return UserError(
        f"no document{some} in {settings.path} has {length} tokens or more: "
        "set generate.prefixes.tokens lower"
    )


def _parquet(prefixes: list[np.ndarray]) -> bytes:
    offsets = np.cumsum([0, *map(len, prefixes)])
    lists = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(np.concatenate(prefixes), pa.int32())
    )
    return parquet_bytes(pa.table({"token_ids": lists}))
