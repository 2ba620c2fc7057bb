"""Measures Min-K%++ of documents in a streamed sweep: how strongly a model expects a text, relative to alternatives.

Zhang et al., "Min-K%++: Improved Baseline for Detecting Pre-Training Data from Large Language Models", ICLR 2025
(arXiv 2404.02936). Texts like those a model was trained on score higher.
"""

from collections.abc import Generator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor

from calibprune.evaluation.perplexity import LOSS_ROWS, sweep_logits
from calibprune.events import LayerEntered
from calibprune.gang import ALONE, Gang
from calibprune.model import Skeleton

MIN_VARIANCE = 1e-12
"""Lower bound of the variance to divide by, which is zero where the model is certain of the next token."""


def sweep_min_k(
    skeleton: Skeleton,
    documents: Sequence[Int[Tensor, " _"]],
    share: float,
    batch_tokens: int,
    gang: Gang = ALONE,
) -> Generator[LayerEntered, None, list[float]]:
    """Scores every document, of at least two tokens each, in one pass over the model's layers. Collective.

    Documents of equal length are forwarded together, up to `batch_tokens` tokens. The generator's value is the scores
    in the documents' order. Raises PeerLost when another worker is gone.
    """
    if not documents:
        return []
    batches = _equal_length_batches(documents, batch_tokens)
    tokens = [torch.stack([documents[index] for index in batch]) for batch in batches]

    def score_batch(logits: Tensor, targets: Tensor) -> list[float]:
        return [
            min_k_score(token_scores(rows, wanted), share)
            for rows, wanted in zip(logits, targets, strict=True)
        ]

    results = yield from sweep_logits(skeleton, tokens, score_batch, gang)
    mine = [index for batch in gang.dealt(batches) for index in batch]
    scores = torch.zeros(len(documents), dtype=torch.float64)
    scores[mine] = torch.tensor([s for result in results for s in result], dtype=torch.float64)
    return gang.collect(scores, mine).tolist()


def token_scores(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> Float32[Tensor, " tokens"]:
    """Computes (log p(x_t) - mu_t) / sigma_t; mu_t and sigma_t are the mean and standard deviation of log p under p.

    Works in float32, on a few rows of logits at a time.
    """
    parts = []
    for rows, wanted in zip(logits.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True):
        log_p = F.log_softmax(rows.float(), dim=-1)
        of_targets = log_p.gather(1, wanted[:, None]).squeeze(1)
        p = log_p.exp()
        log_p.masked_fill_(p == 0, 0)  # 0 * log 0 is 0
        mean = (p * log_p).sum(-1)
        variance = (p * log_p.sub_(mean[:, None]).square()).sum(-1).clamp(min=MIN_VARIANCE)
        parts.append((of_targets - mean) / variance.sqrt())
    return torch.cat(parts)


def min_k_score(scores: Float[Tensor, " tokens"], share: float) -> float:
    """Averages the lowest scores: those of this share of the tokens, rounded down, but of at least one token."""
    count = max(1, int(len(scores) * share))
    return scores.double().topk(count, largest=False).values.mean().item()


def _equal_length_batches(documents: Sequence[Tensor], batch_tokens: int) -> list[list[int]]:
    """Groups documents of equal length into batches of up to `batch_tokens` tokens; returns their indices."""
    by_length: dict[int, list[int]] = {}
    for index, document in enumerate(documents):
        by_length.setdefault(len(document), []).append(index)
    batches = []
    for length, indices in by_length.items():
        at_once = max(1, batch_tokens // length)
        batches += [indices[i : i + at_once] for i in range(0, len(indices), at_once)]
    return batches
