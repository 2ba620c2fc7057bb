"""Prefixes and seeds are functions of (settings, seed, row) alone, in whatever order they are cut."""

import json
from itertools import count

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibprune.calibration import prefix_sources, prefixes
from calibprune.calibration.prefixes import (
    PrefixReader,
    check_prefixes,
    cut_prefixes,
    draw_seed,
    longest_prefix,
    prefix_units,
    row_seed,
)
from calibprune.config.generate import GenerateSettings
from calibprune.errors import UserError
from calibprune.events import Tick
from calibprune.stage import Stage
from tests.tiny import byte_tokenizer

BOS, EOS = 0, 1
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("alpha\nbe\ngamma ray\nd\nepsilon\n")
    return str(path)


@pytest.fixture
def small_files(monkeypatch):
    """Makes files of 4 prefixes and batches of 3 documents."""
    monkeypatch.setattr(prefixes, "PREFIXES_PER_FILE", 4)
    monkeypatch.setattr(prefix_sources, "BATCH", 3)


def asked(prefixes, samples=5, **more) -> GenerateSettings:
    return GenerateSettings.model_validate({"prefixes": prefixes, "samples": samples} | more)


def dataset(path, samples=5, seed=0, samples_per_prefix=1, **settings) -> GenerateSettings:
    prefixes = {"type": "dataset", "path": str(path)} | settings
    return asked(prefixes, samples, seed=seed, samples_per_prefix=samples_per_prefix)


def prompts(path, samples=5, **settings) -> GenerateSettings:
    return asked({"type": "prompts", "path": str(path)} | settings, samples)


def cut(folder, settings, tokenizer) -> Stage:
    stage = Stage(str(folder))
    missing = set(prefix_units(settings)) - stage.done_units()
    list(cut_prefixes(stage, settings, tokenizer, missing))
    return stage


def all_prefixes(folder, settings, tokenizer) -> list[list[int]]:
    stage = cut(folder, settings, tokenizer)
    return PrefixReader(stage, settings, tokenizer).of(range(settings.samples))


def test_a_rows_prefix_does_not_depend_on_the_other_rows(tokenizer, texts, tmp_path, small_files):
    for kind in (
        {"type": "bos"},
        {"type": "vocabulary", "draw": "uniform", "tokens": 3},
        {"type": "vocabulary", "draw": "uniform", "tokens": 2, "bos": False},
        {"type": "dataset", "path": texts, "tokens": 4},
    ):
        settings = asked(kind, 20, seed=7)
        stage = cut(tmp_path / kind["type"], settings, tokenizer)
        together = PrefixReader(stage, settings, tokenizer).of(range(20))
        for parts in (
            [range(11, 20), range(3), range(3, 11)],
            [range(i, i + 1) for i in range(20)],
        ):
            reader = PrefixReader(stage, settings, tokenizer)
            assert all(reader.of(rows) == together[rows.start : rows.stop] for rows in parts)
        assert {len(prefix) for prefix in together} == {longest_prefix(settings.prefixes)}


def test_bos_is_the_start_of_text_or_else_the_end_of_text_token(tokenizer, tmp_path):
    settings = asked("bos", 2)
    assert all_prefixes(tmp_path, settings, tokenizer) == [[BOS], [BOS]]
    other = byte_tokenizer()
    other.bos_token = None
    assert all_prefixes(tmp_path, settings, other) == [[EOS], [EOS]]
    other.eos_token = None
    for kind in ("bos", "vocabulary"):
        with pytest.raises(UserError, match="neither a bos nor an eos token"):
            check_prefixes(asked(kind), other)
        with pytest.raises(UserError, match="neither a bos nor an eos token"):
            all_prefixes(tmp_path, asked(kind), other)
    check_prefixes(asked({"type": "vocabulary", "draw": "uniform", "bos": False}), other)


def test_what_the_model_draws_its_prefix_after(tokenizer, tmp_path):
    settings = asked({"type": "vocabulary", "tokens": 3}, 2)
    assert prefix_units(settings) == []
    assert all_prefixes(tmp_path, settings, tokenizer) == [[BOS], [BOS]]
    assert longest_prefix(settings.prefixes) == 4


def test_vocabulary_prefixes_are_spread_evenly_over_ordinary_tokens(tokenizer, tmp_path):
    settings = asked({"type": "vocabulary", "draw": "uniform"}, 12_800, seed=1)
    prefixes = all_prefixes(tmp_path, settings, tokenizer)
    assert all(prefix[0] == BOS for prefix in prefixes)
    drawn = [prefix[1] for prefix in prefixes]
    ordinary = [t for t in range(2, len(tokenizer)) if "\ufffd" not in tokenizer.decode([t])]
    assert len(ordinary) == 128  # the other bytes are parts of characters
    assert set(drawn) == set(ordinary)
    counts = [drawn.count(token) for token in ordinary]
    chi_squared = sum((count - 100) ** 2 / 100 for count in counts)
    assert chi_squared < 200  # 127 degrees of freedom: less than one in 10,000 is above


def test_added_tokens_are_not_drawn(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<r{i}>" for i in range(200)]})
    tokenizer.add_tokens([f"<u{i}>" for i in range(200)])
    settings = asked({"type": "vocabulary", "draw": "uniform", "bos": False}, 2000)
    drawn = {prefix[0] for prefix in all_prefixes(tmp_path, settings, tokenizer)}
    assert drawn
    assert all(2 <= token < 258 for token in drawn)


def test_another_seed_draws_other_tokens(tokenizer, tmp_path):
    kind = {"type": "vocabulary", "draw": "uniform", "tokens": 4}
    one, other = (all_prefixes(tmp_path, asked(kind, 8, seed=s), tokenizer) for s in (0, 1))
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_samples_of_a_prefix_are_neighbours(tokenizer, texts, tmp_path):
    for name, kind in (
        ("uniform", {"type": "vocabulary", "draw": "uniform", "tokens": 3}),
        ("dataset", {"type": "dataset", "path": texts, "tokens": 4}),
    ):
        shared = asked(kind, 8, samples_per_prefix=3)
        alone = asked(kind, 3)
        found = all_prefixes(tmp_path / f"{name}-shared", shared, tokenizer)
        once = all_prefixes(tmp_path / f"{name}-alone", alone, tokenizer)
        assert found == [once[0]] * 3 + [once[1]] * 3 + [once[2]] * 2


def test_dataset_prefixes_skip_short_documents_and_start_again(
    tokenizer, texts, tmp_path, small_files
):
    settings = dataset(texts, 11, tokens=4, bos=False)
    assert prefix_units(settings) == ["prefixes-00000", "prefixes-00001", "prefixes-00002"]
    stage = cut(tmp_path / "a", settings, tokenizer)
    found = PrefixReader(stage, settings, tokenizer).of(range(11))
    expected = ["alph", "gamm", "epsi"] * 3 + ["alph", "gamm"]
    assert tokenizer.batch_decode(found) == expected
    with_bos = all_prefixes(tmp_path / "b", dataset(texts, 11, tokens=4), tokenizer)
    assert with_bos == [[BOS, *prefix] for prefix in found]
    facts = [record.facts for record in stage.done().values()]
    assert facts == [
        {"prefixes": 4, "passed_over": 2, "source_prefixes": 3},
        {"prefixes": 4, "passed_over": 3, "source_prefixes": 3},
        {"prefixes": 3, "passed_over": 2, "source_prefixes": 3},
    ]


@pytest.mark.parametrize("remembered", [0, 100])
def test_a_source_too_long_to_remember_is_read_again(
    tokenizer, texts, tmp_path, monkeypatch, remembered
):
    monkeypatch.setattr(prefixes, "_MAX_REMEMBERED", remembered)
    found = all_prefixes(tmp_path / "a", dataset(texts, 9, tokens=4, bos=False), tokenizer)
    assert tokenizer.batch_decode(found) == ["alph", "gamm", "epsi"] * 3


def test_missing_units_are_cut_alone_and_as_they_were(tokenizer, tmp_path, small_files):
    source = tmp_path / "many.jsonl"
    source.write_text("".join(json.dumps({"text": f"{i:03d} text"}) + "\n" for i in range(30)))
    settings = dataset(source, 25, tokens=[1, 6], seed=3)
    whole = cut(tmp_path / "whole", settings, tokenizer)
    units = prefix_units(settings)
    assert len(units) == 7 and sorted(whole.done()) == units
    resumed = Stage(str(tmp_path / "resumed"))
    for missing in ({units[3]}, set(), {units[0], units[6]}, {*units} - {units[0], units[3]}):
        made = list(cut_prefixes(resumed, settings, tokenizer, missing))
        assert {event.record.unit for event in made} == missing and len(made) == len(missing)
    assert [record.sha256 for record in resumed.done().values()] == [
        record.sha256 for record in whole.done().values()
    ]


def test_cutting_says_that_it_goes_on_also_where_all_is_cut_already(
    tokenizer, texts, tmp_path, small_files, monkeypatch
):
    monkeypatch.setattr(prefixes, "_TICK_DOCUMENTS", 2)
    settings = dataset(texts, 11, tokens=1)
    *ticks, done = cut_prefixes(
        Stage(str(tmp_path)), settings, tokenizer, {prefix_units(settings)[2]}
    )
    assert ticks == [Tick()] * 5 and done.record.unit == "prefixes-00002"


def test_cutting_reads_no_further_than_it_must(tokenizer, tmp_path, small_files):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "good"}\n' * 6 + "not json\n")
    assert len(all_prefixes(tmp_path / "a", dataset(source, 6), tokenizer)) == 6
    with pytest.raises(UserError, match="line 7"):
        all_prefixes(tmp_path / "b", dataset(source, 7), tokenizer)


def test_a_range_of_tokens_is_drawn_for_every_prefix(tokenizer, tmp_path):
    """Compares with a straightforward implementation of the promise, with documents of every length."""
    words = ["abcdefghijkl"[: 1 + (7 * i) % 12] for i in range(400)]
    source = tmp_path / "words.parquet"
    pq.write_table(pa.table({"words": words}), source)
    settings = dataset(source, 600, tokens=[2, 9], column="words", bos=False, seed=5)
    found = tokenizer.batch_decode(all_prefixes(tmp_path / "a", settings, tokenizer))
    lengths = [len(prefix) for prefix in found]
    spread = [lengths.count(length) for length in range(2, 10)]
    assert sum(spread) == 600 and min(spread) > 45  # 75 each expected, deviation 8
    documents = (words[i % 400] for i in count())
    for prefix, length in zip(found, lengths, strict=True):
        assert prefix == next(word for word in documents if len(word) >= length)[:length]
    other = dataset(source, 600, tokens=[2, 9], column="words", bos=False, seed=6)
    assert [len(p) for p in all_prefixes(tmp_path / "b", other, tokenizer)] != lengths
    assert longest_prefix(settings.prefixes) == 9
    assert longest_prefix(dataset(source, tokens=[2, 9]).prefixes) == 10


def test_only_the_start_of_a_document_matters(tokenizer, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "' + "word " * 100_000 + '"}\n')
    whole = tokenizer("word " * 200, add_special_tokens=False).input_ids
    for size in (1, 7, 500):
        settings = dataset(path, 1, tokens=size)
        assert all_prefixes(tmp_path / str(size), settings, tokenizer) == [[BOS, *whole[:size]]]


def test_a_text_of_few_tokens_is_read_far_enough(tmp_path):
    """A token has thirty characters, so that the part that is tokenised first is too short."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["x" * 30])
    path = tmp_path / "dense.txt"
    path.write_text("x" * 30 * 50 + "abc\n" + "x" * 30 + "\n")
    expected = tokenizer("x" * 30 * 50 + "abc", add_special_tokens=False).input_ids
    assert len(expected) == 53
    for size in (10, 53):
        settings = dataset(path, 1, tokens=size, bos=False)
        assert all_prefixes(tmp_path / str(size), settings, tokenizer) == [expected[:size]]


def test_no_document_of_enough_tokens(tokenizer, texts, tmp_path):
    with pytest.raises(UserError, match=r"no document in .* has 50 tokens or more"):
        all_prefixes(tmp_path, dataset(texts, tokens=50), tokenizer)
    with pytest.raises(UserError, match=r"no document of the first 4096 in .* has 50 tokens"):
        check_prefixes(dataset(texts, tokens=[2, 50]), tokenizer)
    check_prefixes(dataset(texts, tokens=[2, 9]), tokenizer)


def test_the_check_reads_the_start_of_a_source_only(tokenizer, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "good"}\n' * 300 + "not json\n")
    check_prefixes(dataset(source), tokenizer)
    source.write_text("not json\n")
    with pytest.raises(UserError, match="line 1 of"):
        check_prefixes(dataset(source), tokenizer)
    with pytest.raises(UserError, match="no file or folder"):
        check_prefixes(dataset(tmp_path / "none.jsonl"), tokenizer)


def write_prompts(path, rows):
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))


def test_prompts_go_through_the_chat_template(chat_tokenizer, tmp_path):
    source = tmp_path / "prompts.jsonl"
    asks = [{"role": "user", "content": "sum?"}]
    answered = [*asks, {"role": "assistant", "content": "3"}]
    more = [*answered, {"role": "user", "content": "sure?"}]
    write_prompts(source, ["2+2", asks, "x" * 40, answered, more, [answered[1]]])
    settings = prompts(source, 6, system="Be brief.", max_prompt_tokens=60)
    stage = cut(tmp_path / "a", settings, chat_tokenizer)
    found = PrefixReader(stage, settings, chat_tokenizer).of(range(6))
    expected = [
        "<s>[system]Be brief.\n[user]2+2\n[assistant]",
        "<s>[user]sum?\n[assistant]",
        "<s>[user]sum?\n[assistant]",
        "<s>[user]sum?\n[assistant]3\n[user]sure?\n[assistant]",
    ]
    assert chat_tokenizer.batch_decode(found) == expected + expected[:2]
    assert [ids.count(BOS) for ids in found] == [1] * 6
    (record,) = stage.done().values()
    assert record.facts == {"prefixes": 6, "passed_over": 2, "source_prefixes": 4}
    assert longest_prefix(settings.prefixes) == 60 >= max(map(len, found))
    shorter = all_prefixes(tmp_path / "b", prompts(source, 3, max_prompt_tokens=26), chat_tokenizer)
    assert chat_tokenizer.batch_decode(shorter) == ["<s>[user]2+2\n[assistant]", *expected[1:3]]


def test_prompts_from_parquet(chat_tokenizer, tmp_path):
    messages = [[{"role": "user", "content": "a", "name": None}]]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "p.parquet")
    settings = prompts(tmp_path / "p.parquet", 1, column="messages")
    found = all_prefixes(tmp_path / "a", settings, chat_tokenizer)
    assert chat_tokenizer.batch_decode(found) == ["<s>[user]a\n[assistant]"]


def test_what_is_wrong_with_prompts_is_told(tokenizer, chat_tokenizer, tmp_path):
    source = tmp_path / "prompts.jsonl"
    write_prompts(source, ["a rather long one"])
    with pytest.raises(UserError, match=r"the tokenizer of .* has none"):
        check_prefixes(prompts(source), tokenizer)
    check_prefixes(prompts(source), chat_tokenizer)
    with pytest.raises(
        UserError,
        match=r"no prompt of the first 4096 in .* at most 9 tokens, chat template included",
    ):
        check_prefixes(prompts(source, max_prompt_tokens=9), chat_tokenizer)
    with pytest.raises(UserError, match=r"no prompt in .* at most 9 tokens"):
        all_prefixes(tmp_path / "a", prompts(source, max_prompt_tokens=9), chat_tokenizer)
    strict = byte_tokenizer()
    strict.chat_template = "{{ raise_exception('no system messages here') }}"
    with pytest.raises(UserError, match=r"chat template of .* refuses .*: no system messages here"):
        check_prefixes(prompts(source, system="x"), strict)
    write_prompts(source, [[{"from": "human", "value": "x"}]])
    with pytest.raises(UserError, match="not of messages with role and content"):
        check_prefixes(prompts(source), chat_tokenizer)


def test_a_chat_template_without_an_end_is_named_before_work_starts(
    chat_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("calibprune.untrusted.SECONDS", 1.0)
    write_prompts(tmp_path / "prompts.jsonl", ["hello"])
    chat_tokenizer.chat_template = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"the chat template of .* takes too much time for 1 "):
        check_prefixes(prompts(tmp_path / "prompts.jsonl"), chat_tokenizer)


def test_row_seeds_are_63_bits_and_differ():
    seeds = [row_seed(seed, row) for seed in range(3) for row in range(1000)]
    seeds += [draw_seed(seed, row) for seed in range(3) for row in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == len(seeds)
    assert row_seed(0, 0) == 6806123204150918301  # never to change: runs are resumed with it
    assert max(seeds) > 2**62
