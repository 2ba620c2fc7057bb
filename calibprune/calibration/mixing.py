"""How many sequences of the pool each source fills, with which samples, and in what order.

Every sequence is made of one source. What is drawn depends on seed, source and kept samples alone.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int32, Int64

from calibprune.config import CurateSettings, GeneratedSource
from calibprune.errors import UserError

POOL_FILE_TOKENS = 1 << 24
"""Of a file of the pool. Up to that many tokens are shuffled sample by sample."""


def mixture(settings: CurateSettings) -> list[int]:
    """Sequences of every source: budgets in whole sequences, rounded up; the rest by weight, by largest remainder.

    Of equal remainders the source named first gets the sequence. Raises UserError where budgets and pool do not fit.
    """
    total, tokens = settings.pool_sequences, settings.sequence_tokens
    counts = [-(-(source.budget_tokens or 0) // tokens) for source in settings.sources]
    left = total - sum(counts)
    weights = [
        Fraction(source.weight) if source.budget_tokens is None else Fraction(0)
        for source in settings.sources
    ]
    if left < 0 or (left and not any(weights)):
        raise UserError(
            f"the budget_tokens of curate.sources come to {sum(counts)} sequences of {tokens} tokens, the pool has "
            f"{total}: " + ("lower them, or raise curate.sequences or curate.tokens" if left < 0 else
            "leave one source without, or lower curate.sequences or curate.tokens")
        )  # fmt: skip
    if not left:
        return counts
    exact = [left * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for index in order[: left - sum(shares)]:
        shares[index] += 1
    return [count + share for count, share in zip(counts, shares, strict=True)]


def pool_files(settings: CurateSettings) -> list[range]:
    """The sequences in each file of the pool."""
    each = max(1, POOL_FILE_TOKENS // settings.sequence_tokens)
    total = settings.pool_sequences
    return [range(first, min(first + each, total)) for first in range(0, total, each)]


def source_of_sequence(settings: CurateSettings) -> Int32[np.ndarray, " sequences"]:
    """Which source each sequence of the pool is made of: all parts of the pool are mixed alike."""
    counts = mixture(settings)
    sources = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return np.random.default_rng([settings.seed, len(counts)]).permutation(sources)


def place_samples(
    kept: Int64[np.ndarray, " kept"],
    tokens: Int32[np.ndarray, " kept"],
    shards: Int32[np.ndarray, " kept"],
    sequences: int,
    source: int,
    settings: CurateSettings,
) -> tuple[Int64[np.ndarray, " used"], Int64[np.ndarray, " used"]]:
    """(samples that fill the sequences of a source, where each begins in the source's row of tokens).

    They are drawn in random order until there are enough. The row of tokens is what `sequences` times
    `sequence_tokens` are cut from; with pack=document a sample begins where a sequence does. A pool of many files is
    shuffled by shards first, so that a file needs a part of the shards only.
    Too few samples give fewer tokens: `shortage` says so.
    """
    random = np.random.default_rng([settings.seed, 0, source])
    if settings.pack == "document":
        long_enough = tokens >= settings.sequence_tokens
        kept, tokens, shards = kept[long_enough], tokens[long_enough], shards[long_enough]
        taken = np.full(len(kept), settings.sequence_tokens, np.int64)
    else:
        some = tokens > 0
        kept, tokens, shards = kept[some], tokens[some], shards[some]
        taken = tokens.astype(np.int64)
    order = random.permutation(len(kept))
    needed = sequences * settings.sequence_tokens
    ends = np.cumsum(taken[order])
    order = order[: int(np.searchsorted(ends, needed)) + 1] if needed else order[:0]
    blocks = len(pool_files(settings))
    if blocks > 1 and len(order):
        block = random.integers(blocks, size=int(shards.max()) + 1)
        order = order[np.argsort(block[shards[order]], kind="stable")]
    starts = np.cumsum(taken[order]) - taken[order]
    inside = starts < needed
    return kept[order[inside]], starts[inside]


def shortage(
    settings: CurateSettings,
    counts: Sequence[int],
    kept: Sequence[int],
    available: Sequence[int],
) -> str | None:
    """What is missing where sources cannot fill their sequences, in words; None where nothing is.

    `kept`: samples; `available`: their tokens, or with pack=document the samples that are long enough.
    """
    missing, generated = [], False
    tokens = settings.sequence_tokens
    for source, count, samples, there in zip(
        settings.sources, counts, kept, available, strict=True
    ):
        document = settings.pack == "document"
        if there >= count * (1 if document else tokens):
            continue
        generated |= isinstance(source, GeneratedSource)
        if document:
            missing.append(
                f"{source.name} is to give {count} samples of at least {tokens} tokens, "
                f"{there} of the {samples} kept are that long"
            )
        else:
            missing.append(
                f"{source.name} is to fill {count} sequences of {tokens} tokens = {count * tokens} tokens, "
                f"the {samples} samples kept hold {there}"
            )
    if not missing:
        return None
    how = "raise generate.samples" if generated else "raise the source's documents"
    return f"{'; '.join(missing)}: {how}, or lower curate.sequences, sequence_tokens or the source's share"
