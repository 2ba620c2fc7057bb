"""Compares sources with reference corpora: how similar their tokens are, and how familiar the model is with them.

Returns facts of a few kB for the report; knows nothing of where the sources' documents come from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from calibprune.calibration.ngrams import (
    coverage,
    document_ngram_hashes,
    jaccard,
    signature,
    token_counts,
    unigram_divergence,
)
from calibprune.calibration.sources import CHARACTERS_PER_TOKEN, first_tokens
from calibprune.calibration.texts import documents as stream_documents
from calibprune.config.curate import AnalysisSettings, CurateSettings, Reference
from calibprune.evaluation.min_k import sweep_min_k
from calibprune.events import result_of
from calibprune.gang import ALONE, Gang
from calibprune.model import Skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Texts = Mapping[str, Sequence[np.ndarray]]
"""Token ids of documents, by the name of their source or reference."""
Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""One score per document, by "sources" or "references", then by name."""

BINS = 24
FORWARD_TOKENS = 4096
"""Maximum tokens of one forward, unless a single document has more."""


def read_reference(
    reference: Reference, tokenizer: "PreTrainedTokenizerBase", documents: int, tokens: int
) -> list[np.ndarray]:
    """Reads the first tokens of a reference's first documents, with a start-of-text token in front where there is one.

    Raises UserError where there is no such text.
    """
    texts = stream_documents(
        reference.path,
        name=reference.dataset_name,
        split=reference.split,
        column=reference.column,
    )
    tokens_in_front = tokenizer.bos_token_id, tokenizer.eos_token_id  # as in front of sources
    front = [token for token in tokens_in_front if isinstance(token, int)][:1]
    starts = [text[: CHARACTERS_PER_TOKEN * tokens] for text in islice(texts, documents)]
    cut = first_tokens(tokenizer, starts, tokens - len(front))
    return [np.array(front + ids, np.int32) for ids in cut]


def analyse(
    settings: CurateSettings, sources: Texts, references: Texts, scores: Scores | None = None
) -> dict[str, Any]:
    """Returns what the report shows of sources and references. `scores` are those of `min_k_scores`, if measured.

    For similarities all collections are cut to the size of the smallest, since size alone makes collections differ. A
    collection without any n-gram is left out of them.
    """
    analysis = settings.analysis
    read = {
        kind: {
            name: [document[: settings.sequence_tokens] for document in texts[: analysis.documents]]
            for name, texts in of_kind.items()
        }
        for kind, of_kind in (("sources", sources), ("references", references))
    }
    facts: dict[str, Any] = {
        "ngram": analysis.ngram,
        "vocabulary": {
            kind: {name: _vocabulary(texts, analysis.ngram) for name, texts in of_kind.items()}
            for kind, of_kind in read.items()
        },
        **_similarities(read["sources"], read["references"], analysis.ngram),
        "min_k": None,
    }
    if scores and analysis.min_k is not None:
        facts["min_k"] = {"share": analysis.min_k, **_score_facts(scores)}
    return facts


def min_k_scores(
    skeleton: Skeleton,
    settings: AnalysisSettings,
    sources: Texts,
    references: Texts,
    gang: Gang = ALONE,
) -> dict[str, dict[str, list[float]]]:
    """Measures Min-K%++ of the first documents of all sources and references in one sweep, for a model of any size.

    Documents of one token are left out, and texts that have no others. Raises ValueError without `settings.min_k`.
    """
    if settings.min_k is None:
        raise ValueError("analysis.min_k is off")
    wanted = {
        (kind, name): [
            torch.from_numpy(np.asarray(document[: settings.min_k_tokens]).astype(np.int64))
            for document in [text for text in texts if len(text) > 1][: settings.min_k_documents]
        ]
        for kind, of_kind in (("sources", sources), ("references", references))
        for name, texts in of_kind.items()
    }
    flat = [document for documents in wanted.values() for document in documents]
    following = iter(result_of(sweep_min_k(skeleton, flat, settings.min_k, FORWARD_TOKENS, gang)))
    found: dict[str, dict[str, list[float]]] = {"sources": {}, "references": {}}
    for (kind, name), documents in wanted.items():
        if documents:
            found[kind][name] = list(islice(following, len(documents)))
    return found


def cut_to(documents: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Returns the first documents that together have `tokens` tokens, the last one cut; all if there are fewer."""
    cut, left = [], tokens
    for document in documents:
        if left <= 0:
            break
        cut.append(document[:left])
        left -= len(cut[-1])
    return cut


def _similarities(sources: Texts, references: Texts, ngram: int) -> dict[str, Any]:
    long_enough = {
        kind: {n: t for n, t in of_kind.items() if any(len(one) >= ngram for one in t)}
        for kind, of_kind in (("sources", sources), ("references", references))
    }
    sizes = [sum(map(len, texts)) for of_kind in long_enough.values() for texts in of_kind.values()]
    tokens = min(sizes, default=0)
    ours, theirs = (
        {name: _Collection.of(cut_to(texts, tokens), ngram) for name, texts in of_kind.items()}
        for of_kind in long_enough.values()
    )
    return {
        "similarity": {
            name: {other: _compared(one, another) for other, another in theirs.items()}
            for name, one in ours.items()
        }
        if theirs
        else {},
        "similarity_tokens": tokens,
    }


@dataclass(frozen=True)
class _Collection:
    ngrams: np.ndarray
    """Hashes of the distinct n-grams, in ascending order."""
    occurrences: np.ndarray
    signature: np.ndarray
    token_counts: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[np.ndarray], ngram: int) -> Self:
        ngrams, occurrences = np.unique(document_ngram_hashes(documents, ngram), return_counts=True)
        return cls(ngrams, occurrences, signature(ngrams), token_counts(documents))


def _compared(ours: _Collection, theirs: _Collection) -> dict[str, float]:
    return {
        "jaccard": jaccard(ours.signature, theirs.signature),
        "unigram_js": unigram_divergence(ours.token_counts, theirs.token_counts),
        "coverage": coverage(ours.ngrams, ours.occurrences, theirs.ngrams),
    }


def _vocabulary(documents: Sequence[np.ndarray], ngram: int) -> dict[str, int]:
    whole = _Collection.of(documents, ngram)
    return {
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "distinct_tokens": int(np.count_nonzero(whole.token_counts)),
        "ngrams": int(whole.occurrences.sum()),
        "distinct_ngrams": len(whole.ngrams),
    }


def _score_facts(scores: Scores) -> dict[str, Any]:
    """Returns mean, median and histogram of every text's scores; all histograms have the same bins."""
    every = [score for of_kind in scores.values() for texts in of_kind.values() for score in texts]
    edges = np.histogram_bin_edges(every, BINS) if every else np.empty(0)
    return {
        kind: {
            name: {
                "documents": len(values),
                "mean": float(np.mean(values)),
                "median": float(np.median(values)),
                "values": {
                    "edges": edges.tolist(),
                    "counts": np.histogram(values, edges)[0].tolist(),
                },
            }
            for name, values in of_kind.items()
        }
        for kind, of_kind in scores.items()
    }
