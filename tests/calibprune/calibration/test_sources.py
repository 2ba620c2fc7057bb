"""Documents as shards of samples: cut, resumed, and scored by the model itself."""

import asyncio
import json

import pytest
import torch

from calibprune.calibration import sources
from calibprune.calibration.sources import (
    Shard,
    first_tokens,
    read_shard,
    samples_of,
    score_shard,
    shard_documents,
    text_units,
    write_documents,
)
from calibprune.config.curate import NaturalSource
from calibprune.errors import UserError
from calibprune.stage import Stage
from tests.calibprune.calibration.samples import generated, repeated
from tests.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
START = TOKENIZER.bos_token_id
TOKENS = 16


@pytest.fixture
def texts(tmp_path):
    texts = [f"{number} " + "word " * (number % 7) for number in range(25)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return texts


def test_samples_of_another_run_are_a_finished_generate_stage(tmp_path):
    generated(tmp_path / "run" / "generate", repeated([12] * 3))
    assert samples_of(str(tmp_path / "run" / "generate")).finished
    with pytest.raises(UserError, match=r"no finished samples at .*/run: give .*/run/generate$"):
        samples_of(str(tmp_path / "run"))
    with pytest.raises(
        UserError, match=r"no finished samples at nowhere: give the `generate` folder"
    ):
        samples_of("nowhere")
    empty = Stage(str(tmp_path / "empty"))
    empty.plan({}, [])
    empty.finish()
    with pytest.raises(UserError, match=r"empty is a stage without samples: give the `generate`"):
        samples_of(empty.url)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(sources, "SHARD_TOKENS", 6 * (TOKENS - 1))


def source(tmp_path, **changes):
    named = {"type": "text", "name": "notes", "path": str(tmp_path / "texts.jsonl")}
    return NaturalSource.model_validate(named | {"documents": 50} | changes)


def write(stage, one, missing=None, tokens=TOKENS):
    missing = text_units(one, tokens) if missing is None else missing
    start = START if one.bos else None
    return list(write_documents(stage, one, tokens, TOKENIZER, start, missing))


def rows(stage, one):
    tables = [read_shard(Shard(stage.url, unit)) for unit in text_units(one, TOKENS)]
    return [row for table in tables if table is not None for row in table.to_pylist()]


def test_documents_are_cut_to_a_sequence_start_of_text_token_included(tmp_path, texts):
    stage, one = Stage(str(tmp_path / "curate")), source(tmp_path)
    records = write(stage, one)
    assert [record.facts["rows"] for record in records] == [6, 6, 6, 6, 1, 0, 0, 0, 0]
    assert records[-1].file is None
    for number, (row, text) in enumerate(zip(rows(stage, one), texts, strict=True)):
        ids = TOKENIZER(text, add_special_tokens=False).input_ids
        assert row["token_ids"] == [START, *ids[: TOKENS - 1]]
        assert (row["row"], row["prefix_length"], row["source"]) == (number, 1, "notes")
        assert row["cumulative_logprob"] is None and row["finish_reason"] == "text"


def test_no_more_documents_and_tokens_than_asked_for(tmp_path, texts):
    one = source(tmp_path, documents=8, document_tokens=3, bos=False)
    stage = Stage(str(tmp_path / "curate"))
    assert shard_documents(one, TOKENS) == 30
    write(stage, one)
    cut = rows(stage, one)
    assert len(cut) == 8 and all(row["prefix_length"] == 0 for row in cut)
    assert [len(row["token_ids"]) for row in cut] == [min(3, len(text)) for text in texts[:8]]


def test_missing_shards_alone_are_made_again_with_the_same_bytes(tmp_path, texts):
    one = source(tmp_path)
    whole, parts = Stage(str(tmp_path / "whole")), Stage(str(tmp_path / "parts"))
    wanted = [record.sha256 for record in write(whole, one)]
    units = text_units(one, TOKENS)
    for some in (units[3:4], units[:2], units[4:], units[2:3]):
        assert [record.unit for record in write(parts, one, some)] == some
    assert [parts.record(unit).sha256 for unit in units] == wanted


def test_only_the_start_of_a_long_text_is_tokenised_with_the_same_result():
    read = []

    def tokenizer(batch, **options):
        read.extend(map(len, batch))
        return TOKENIZER(batch, **options)

    texts = ["é" * 5000, "short", "x" * 100_000]
    wanted = [TOKENIZER(text, add_special_tokens=False).input_ids[:40] for text in texts]
    assert first_tokens(tokenizer, texts, 40) == wanted
    assert max(read) < 1000


def test_where_the_start_is_not_enough_the_whole_is_tokenised():
    class Words:  # a tokenizer of which one token is far longer than tokens usually are
        def __call__(self, texts, **options):
            self.input_ids = [[len(word) for word in text.split()] for text in texts]
            return self

    text = " ".join(["w" * 500] * 30)
    assert first_tokens(Words(), [text], 10) == [[500] * 10]


class Forwards:
    """Stands for the engine: scores by plain forwards of the model, one sample after another."""

    def __init__(self, folder):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.asked = 0

    async def score(self, token_ids, first):
        self.asked += len(token_ids)
        return [self.logprob(ids, start) for ids, start in zip(token_ids, first, strict=True)]

    @torch.no_grad()
    def logprob(self, ids, start):
        logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return float(sum(logprobs[place - 1, ids[place]] for place in range(start, len(ids))))


@pytest.mark.parametrize("bos", [True, False])
def test_documents_get_their_log_probability_from_the_model(tmp_path, texts, tiny_llama, bos):
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in [*texts, "a"]))
    stage, one = Stage(str(tmp_path / "curate")), source(tmp_path, bos=bos)
    write(stage, one)
    engine = Forwards(tiny_llama)
    for unit in text_units(one, TOKENS):
        scored = unit.replace("text", "scored")
        record = asyncio.run(score_shard(engine, stage, scored))
        table = read_shard(Shard(stage.url, unit, scored=scored))
        assert (table is None) == (record.file is None)
        for row in table.to_pylist() if table is not None else ():
            ids = row["token_ids"]
            wanted = engine.logprob(ids, 1) if len(ids) > 1 else 0.0
            assert row["cumulative_logprob"] == pytest.approx(wanted)
    assert engine.asked == (26 if bos else 25)  # a document of one token has nothing to score
