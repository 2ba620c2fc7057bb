"""Comparing sources with references: sizes do not matter, the facts stay small, and the model's scores are per text."""

import json

import numpy as np
import pytest
import torch

from calibprune.calibration.compare import analyse, cut_to, min_k_scores, read_reference
from calibprune.config.curate import AnalysisSettings, CurateSettings, Reference
from calibprune.config.model import ModelSettings
from calibprune.errors import UserError
from calibprune.evaluation.min_k import sweep_min_k
from calibprune.events import result_of
from calibprune.model import build_skeleton
from tests.tiny import byte_tokenizer


def settings(**analysis) -> CurateSettings:
    return CurateSettings.model_validate({"sequence_tokens": 64, "analysis": analysis})


def documents(seed: int, count: int, words: int = 30, start: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [start + random.integers(0, words, 50, dtype=np.int32) for _ in range(count)]


def test_a_source_is_nearer_to_what_it_resembles():
    sources = {"same words": documents(1, 20), "other words": documents(2, 20, start=25)}
    facts = analyse(settings(ngram=2), sources, {"corpus": documents(3, 20)})
    near, far = (facts["similarity"][name]["corpus"] for name in sources)
    assert near["jaccard"] > 0.3 > far["jaccard"] > 0
    assert near["unigram_js"] < 0.05 < far["unigram_js"]
    assert near["coverage"] > 0.5 > far["coverage"]
    assert facts["min_k"] is None and facts["ngram"] == 2


def test_the_amount_of_text_does_not_decide():
    """Two parts of one text: the larger reference is as similar as the smaller one."""
    corpus = documents(4, 60)
    references = {"small": corpus[:10], "large": corpus}
    facts = analyse(settings(documents=50, ngram=3), {"source": documents(5, 30)}, references)
    assert facts["similarity_tokens"] == 10 * 50
    similarity = facts["similarity"]["source"]
    assert similarity["small"] == similarity["large"]
    assert facts["vocabulary"]["references"]["large"]["documents"] == 50
    ours = facts["vocabulary"]["sources"]["source"]
    assert ours["tokens"] == 1500 and ours["ngrams"] == 30 * 48 >= ours["distinct_ngrams"] > 1300
    assert ours["distinct_tokens"] == 30


def test_documents_are_cut_to_a_sequence_and_empty_collections_left_out():
    long = [np.arange(1000)]
    sources = {"long": long, "empty": [], "short": [np.array([1, 2])]}
    facts = analyse(settings(ngram=3), sources, {"long": long, "empty": []})
    assert facts["similarity"] == {"long": {"long": {"jaccard": 1, "unigram_js": 0, "coverage": 1}}}
    assert facts["similarity_tokens"] == 64
    assert facts["vocabulary"]["sources"]["empty"]["tokens"] == 0
    assert analyse(settings(), sources, {})["similarity"] == {}


def test_documents_are_cut_to_a_number_of_tokens():
    cut = cut_to([np.arange(3), np.arange(3), np.arange(3)], 4)
    assert [one.tolist() for one in cut] == [[0, 1, 2], [0]]
    assert cut_to([np.arange(3)], 9)[0].tolist() == [0, 1, 2]


def test_the_model_scores_the_first_documents_of_every_text(tiny_llama):
    skeleton = build_skeleton(ModelSettings(path=str(tiny_llama)))
    sources = {"a": [*documents(6, 3), np.array([5])], "none": [np.array([5])]}
    references = {"a": documents(7, 5, words=200)}
    chosen = AnalysisSettings(min_k=0.5, min_k_documents=4, min_k_tokens=30)
    scores = min_k_scores(skeleton, chosen, sources, references)
    assert {kind: {n: len(s) for n, s in of.items()} for kind, of in scores.items()} == {
        "sources": {"a": 3},
        "references": {"a": 4},
    }
    alone = [torch.from_numpy(references["a"][3][:30].astype(np.int64))]
    expected = result_of(sweep_min_k(skeleton, alone, 0.5, 100))
    assert scores["references"]["a"][3:] == pytest.approx(expected, rel=1e-4)

    facts = analyse(
        settings(**chosen.model_dump()), sources, references, min_k_scores(skeleton, chosen, sources, references)
    )  # fmt: skip
    shown = facts["min_k"]["references"]["a"]
    assert facts["min_k"]["share"] == 0.5
    assert shown["mean"] == pytest.approx(np.mean(scores["references"]["a"]))
    assert shown["documents"] == 4 == sum(shown["values"]["counts"])
    assert shown["values"]["edges"] == facts["min_k"]["sources"]["a"]["values"]["edges"]
    assert len(json.dumps(facts, allow_nan=False)) < 4096
    with pytest.raises(ValueError, match="min_k is off"):
        min_k_scores(skeleton, AnalysisSettings(), sources, references)


def test_a_reference_is_read_from_its_start(tmp_path):
    (tmp_path / "corpus.txt").write_text("hello there\n\nsecond one\nthird\n")
    reference = Reference(name="mine", path=str(tmp_path / "corpus.txt"))
    tokenizer = byte_tokenizer()
    read = read_reference(reference, tokenizer, 2, 7)
    assert [tokenizer.decode(one) for one in read] == ["<s>hello ", "<s>second"]
    assert all(one.dtype == np.int32 for one in read)
    with pytest.raises(UserError, match="no file or folder"):
        read_reference(Reference(name="x", path="/nowhere/at all.txt"), tokenizer, 2, 7)
