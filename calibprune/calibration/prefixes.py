"""What every sample starts from: prefix token ids and sampling seeds, a function of (settings, seed, row) alone.

Nothing here depends on shards or workers, so a sample can be made anywhere, any number of times.
"""

from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from random import Random
from typing import TYPE_CHECKING

from calibprune.calibration.texts import documents
from calibprune.config import BosPrefixes, DatasetPrefixes, Prefixes, VocabularyPrefixes
from calibprune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_DRAWS = 10_000


def cut_prefixes(
    settings: Prefixes, tokenizer: "PreTrainedTokenizerBase", rows: range, seed: int
) -> list[list[int]]:
    """The prefix token ids of `rows`; a row's prefix depends on settings, seed and row number only.

    A dataset is read from its start up to the last of the rows (and again from its start where it
    has fewer documents of enough tokens), so ask for many rows at once rather than few at a time.
    Raises UserError without a start-of-text token where one is asked for, without ordinary tokens
    in the vocabulary, or without a document of enough tokens.
    """
    match settings:
        case BosPrefixes():
            start = _start_token(tokenizer)
            return [[start] for _ in rows]
        case VocabularyPrefixes():
            front = [_start_token(tokenizer)] if settings.bos else []
            ordinary = _OrdinaryTokens(tokenizer)
            return [front + ordinary.draw(settings.tokens, seed, row) for row in rows]
        case DatasetPrefixes():
            front = [_start_token(tokenizer)] if settings.bos else []
            starts = list(islice(_document_starts(settings, tokenizer), rows.stop))
            if not starts:
                raise UserError(
                    f"no document in {settings.path} has {settings.tokens} tokens or more: "
                    "set generate.prefixes.tokens lower"
                )
            return [front + starts[row % len(starts)] for row in rows]


def longest_prefix(settings: Prefixes) -> int:
    """Tokens of a prefix, start-of-text token included."""
    return 1 if isinstance(settings, BosPrefixes) else settings.tokens + settings.bos


def row_seed(seed: int, row: int) -> int:
    """The seed, of 31 bits, that the row's continuation is sampled with."""
    return _digest("sampling", seed, row) >> 33


def _digest(purpose: str, seed: int, row: int) -> int:
    """64 bits that differ for every purpose, seed and row."""
    key = f"calibprune {purpose} {seed} {row}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")


def _start_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The start-of-text token; without one the end-of-text token, which parts documents in training."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise UserError(
        f"the tokenizer of {tokenizer.name_or_path} has neither a bos nor an eos token: "
        "use prefixes of type vocabulary or dataset with bos: false"
    )


class _OrdinaryTokens:
    """Tokens learned from text (not special, not added) that decode to text on their own."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        self.others = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def draw(self, count: int, seed: int, row: int) -> list[int]:
        """`count` tokens, uniformly and independently."""
        random = Random(_digest("prefix", seed, row))
        drawn: list[int] = []
        for _ in range(_MOST_DRAWS + count):
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


def _document_starts(
    settings: DatasetPrefixes, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[list[int]]:
    texts = documents(
        settings.path, name=settings.name, split=settings.split, column=settings.column
    )
    for text in texts:
        tokens = _first_tokens(tokenizer, text, settings.tokens)
        if tokens is not None:
            yield tokens


def _first_tokens(tokenizer: "PreTrainedTokenizerBase", text: str, count: int) -> list[int] | None:
    """The first tokens of a text, or None if it has fewer; only its start is tokenised."""
    characters = 16 * count + 64
    while True:
        tokens = tokenizer(text[:characters], add_special_tokens=False).input_ids
        if characters >= len(text):
            return tokens[:count] if len(tokens) >= count else None
        if len(tokens) >= count + 8:  # the cut falls into the last few tokens
            return tokens[:count]
        characters *= 4
