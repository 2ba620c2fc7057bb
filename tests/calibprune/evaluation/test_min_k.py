"""Min-K%++ against the paper's formula in float64, token by token."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from calibprune.config.model import ModelSettings
from calibprune.evaluation.min_k import min_k_score, sweep_min_k, token_scores
from calibprune.events import result_of
from calibprune.model import build_skeleton


def plain_scores(logits, targets) -> list[float]:
    scores = []
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        largest = max(row)
        total = math.fsum(math.exp(x - largest) for x in row)
        log_p = [x - largest - math.log(total) for x in row]
        p = [math.exp(x) for x in log_p]
        mean = math.fsum(a * b for a, b in zip(p, log_p, strict=True) if a)
        variance = math.fsum(a * (b - mean) ** 2 for a, b in zip(p, log_p, strict=True) if a)
        scores.append((log_p[target] - mean) / math.sqrt(variance))
    return scores


def plain_score(scores: list[float], share: float) -> float:
    lowest = sorted(scores)[: max(1, int(len(scores) * share))]
    return math.fsum(lowest) / len(lowest)


@pytest.mark.parametrize("share", [0.5, 0.2, 1.0, 0.001])
def test_every_documents_score_is_the_papers(tiny_llama, share, heard):
    generator = torch.Generator().manual_seed(0)
    lengths = [40, 7, 40, 2, 33, 40, 7]
    documents = [torch.randint(0, 258, (length,), generator=generator) for length in lengths]
    skeleton = build_skeleton(ModelSettings(path=str(tiny_llama)))
    found = result_of(sweep_min_k(skeleton, documents, share, 90))
    assert [(event.layer, event.layers) for event in heard.events] == [(i, 3) for i in range(4)]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    expected = []
    for document in documents:
        with torch.no_grad():
            logits = model(document[None]).logits[0, :-1]
        expected.append(plain_score(plain_scores(logits, document[1:]), share))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert len({round(score, 3) for score in found}) == len(found)


def test_many_positions_and_impossible_tokens():
    logits = torch.randn(600, 50, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 7] = -math.inf  # padding of the vocabulary, which the model never predicts
    logits[5, 9] = -300  # possible, but not in float32
    targets = torch.arange(600) % 7
    targets[5] = 9
    found = token_scores(logits, targets)
    expected = plain_scores(logits, targets)
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert min_k_score(found, 0.1) == pytest.approx(plain_score(expected, 0.1), rel=1e-4)


def test_a_certain_model_and_no_documents(tiny_llama):
    certain = torch.full((3, 5), -1000.0)
    certain[:, 2] = 1000.0
    assert token_scores(certain, torch.tensor([2, 2, 2])).tolist() == [0, 0, 0]
    skeleton = build_skeleton(ModelSettings(path=str(tiny_llama)))
    assert result_of(sweep_min_k(skeleton, [], 0.5, 100)) == []
