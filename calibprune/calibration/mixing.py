"""Decides how many sequences of the pool each source fills, with which samples, and in what order.

Every sequence is made from one source. The draws depend only on seed, source and kept samples.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int32, Int64

from calibprune.config.curate import CurateSettings, GeneratedSource, Source
from calibprune.errors import UserError

POOL_FILE_TOKENS = 1 << 24
"""Tokens of a file of the pool. A pool of a single file is shuffled sample by sample, a larger one by shards first."""


def mixture(settings: CurateSettings) -> list[int]:
    """Returns the number of sequences of every source: budgets are rounded up to whole sequences; the rest is divided
    by weight, by the largest remainder.

    Of equal remainders the first source gets the sequence. Raises UserError where the budgets do not fit the pool.
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
            f"the budget_tokens of curate.sources add up to {sum(counts)} sequences of {tokens} tokens, the pool has "
            f"{total}: " + ("lower them, or raise curate.sequences or curate.tokens" if left < 0 else
            "give one source no budget_tokens, or lower curate.sequences or curate.tokens")
        )  # fmt: skip
    if not left and any(weights):
        idle = [one.name for one in settings.sources if one.budget_tokens is None]
        raise UserError(
            f"the budget_tokens of curate.sources fill all {total} sequences of the pool, nothing is left for "
            f"{', '.join(idle)}: raise curate.sequences or curate.tokens, lower a budget, or remove that source"
        )
    if not left:
        return counts
    exact = [left * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for index in order[: left - sum(shares)]:
        shares[index] += 1
    return [count + share for count, share in zip(counts, shares, strict=True)]


def pool_files(settings: CurateSettings) -> list[range]:
    """Returns the sequences in each file of the pool."""
    each = max(1, POOL_FILE_TOKENS // settings.sequence_tokens)
    total = settings.pool_sequences
    return [range(first, min(first + each, total)) for first in range(0, total, each)]


def source_of_sequence(settings: CurateSettings) -> Int32[np.ndarray, " sequences"]:
    """Returns the source of each sequence of the pool: all parts of the pool have the same mixture."""
    counts = mixture(settings)
    sources = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return np.random.default_rng([settings.seed, len(counts)]).permutation(sources)


def place_samples(
    tokens: Int32[np.ndarray, " kept"],
    shard_of: Callable[[Int32[np.ndarray, " some"]], Int64[np.ndarray, " some"]],
    sequences: int,
    source: int,
    settings: CurateSettings,
) -> tuple[Int32[np.ndarray, " used"], Int64[np.ndarray, " used"]]:
    """Returns (kept samples that fill the sequences of a source, where each begins in the source's row of tokens).

    Samples are drawn in random order until there are enough. The row has `sequences` times `sequence_tokens` tokens,
    from which the sequences are cut; with pack=document every sample begins at the start of a sequence. A pool of many
    files is shuffled by shards first (`shard_of` returns those of kept samples), so that a file needs only a part of
    the shards. Too few samples give fewer tokens, which `shortage` describes.
    """
    random = np.random.default_rng([settings.seed, 0, source])
    document = settings.pack == "document"
    least = settings.sequence_tokens if document else 1
    order = random.permutation(np.flatnonzero(tokens >= least).astype(np.int32))
    needed = sequences * settings.sequence_tokens

    def ends(order: Int32[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
        if document:
            return settings.sequence_tokens * np.arange(1, len(order) + 1)
        return np.cumsum(tokens[order], dtype=np.int64)

    order = order[: int(np.searchsorted(ends(order), needed)) + 1] if needed else order[:0]
    blocks = len(pool_files(settings))
    if blocks > 1 and len(order):
        shards = shard_of(order)
        block = random.integers(blocks, size=int(shards.max()) + 1)
        order = order[np.argsort(block[shards], kind="stable")]
    starts = ends(order) - (settings.sequence_tokens if document else tokens[order])
    inside = starts < needed
    return order[inside], starts[inside]


def shortage(
    settings: CurateSettings,
    counts: Sequence[int],
    kept: Sequence[int],
    available: Sequence[int],
) -> str | None:
    """Describes what is missing where sources cannot fill their sequences; None where nothing is.

    `kept` counts the samples of each source, `available` their tokens, or with pack=document the long enough samples.
    """
    missing, remedies = [], []
    tokens = settings.sequence_tokens
    for source, count, samples, there in zip(
        settings.sources, counts, kept, available, strict=True
    ):
        document = settings.pack == "document"
        if there >= count * (1 if document else tokens):
            continue
        remedies.append(_remedy(source, document and samples > there == 0))
        if document:
            missing.append(
                f"{source.name} must provide {count} samples of at least {tokens} tokens, "
                f"but {there} of its {samples} kept samples are that long"
            )
        else:
            missing.append(
                f"{source.name} must fill {count} sequences of {tokens} tokens = {count * tokens} tokens, "
                f"but its {samples} kept samples have {there}"
            )
    if not missing:
        return None
    return f"{'; '.join(missing)}: {'; '.join(dict.fromkeys(remedies))}"


def _remedy(source: Source, too_short: bool) -> str:
    """Advises how to get enough from a source; `too_short` means that all samples are, so that more would not help."""
    generated = isinstance(source, GeneratedSource)
    if too_short:
        longer = "the source's document_tokens"
        if generated:
            longer = "generate.max_tokens, or generate.min_tokens where samples end early"
        return f"raise {longer}, or lower curate.sequence_tokens"
    more = "generate.samples" if generated else "the source's documents"
    return f"raise {more}, or lower curate.sequences, sequence_tokens or the source's share"
