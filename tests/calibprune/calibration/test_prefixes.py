"""Prefixes and seeds are functions of (settings, seed, row) alone."""

import pytest

from calibprune.calibration.prefixes import cut_prefixes, longest_prefix, row_seed
from calibprune.config import BosPrefixes, DatasetPrefixes, VocabularyPrefixes
from calibprune.errors import UserError
from tests.tiny import byte_tokenizer

BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("alpha\nbe\ngamma ray\nd\nepsilon\n")
    return str(path)


def dataset(path, **settings):
    return DatasetPrefixes(type="dataset", path=path, **settings)


def settings_of_every_kind(texts):
    return [
        BosPrefixes(type="bos"),
        VocabularyPrefixes(type="vocabulary", tokens=3),
        VocabularyPrefixes(type="vocabulary", tokens=2, bos=False),
        dataset(texts, tokens=4),
    ]


def test_a_rows_prefix_does_not_depend_on_the_other_rows(tokenizer, texts):
    for settings in settings_of_every_kind(texts):
        together = cut_prefixes(settings, tokenizer, range(20), seed=7)
        for parts in ([range(20)], [range(3), range(3, 11), range(11, 20)]):
            cut = [p for rows in parts for p in cut_prefixes(settings, tokenizer, rows, seed=7)]
            assert cut == together
        assert {len(prefix) for prefix in together} == {longest_prefix(settings)}


def test_bos_is_the_start_of_text_or_else_the_end_of_text_token(tokenizer):
    settings = BosPrefixes(type="bos")
    assert cut_prefixes(settings, tokenizer, range(2), seed=0) == [[BOS], [BOS]]
    other = byte_tokenizer()
    other.bos_token = None
    assert cut_prefixes(settings, other, range(1), seed=0) == [[EOS]]
    other.eos_token = None
    with pytest.raises(UserError, match="neither a bos nor an eos token"):
        cut_prefixes(settings, other, range(1), seed=0)


def test_vocabulary_prefixes_are_spread_evenly_over_ordinary_tokens(tokenizer):
    settings = VocabularyPrefixes(type="vocabulary", tokens=1)
    prefixes = cut_prefixes(settings, tokenizer, range(12_800), seed=1)
    assert all(prefix[0] == BOS for prefix in prefixes)
    drawn = [prefix[1] for prefix in prefixes]
    ordinary = [t for t in range(2, len(tokenizer)) if "\ufffd" not in tokenizer.decode([t])]
    assert len(ordinary) == 128  # the other bytes are parts of characters
    assert set(drawn) == set(ordinary)
    counts = [drawn.count(token) for token in ordinary]
    chi_squared = sum((count - 100) ** 2 / 100 for count in counts)
    assert chi_squared < 200  # 127 degrees of freedom: less than one in 10,000 is above


def test_added_tokens_are_not_drawn():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<r{i}>" for i in range(200)]})
    tokenizer.add_tokens([f"<u{i}>" for i in range(200)])
    settings = VocabularyPrefixes(type="vocabulary", tokens=1, bos=False)
    drawn = {prefix[0] for prefix in cut_prefixes(settings, tokenizer, range(2000), seed=0)}
    assert drawn
    assert all(2 <= token < 258 for token in drawn)


def test_another_seed_draws_other_tokens(tokenizer):
    settings = VocabularyPrefixes(type="vocabulary", tokens=4)
    one, other = (cut_prefixes(settings, tokenizer, range(8), seed=seed) for seed in (0, 1))
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_dataset_prefixes_skip_short_documents_and_start_again(tokenizer, texts):
    prefixes = cut_prefixes(dataset(texts, tokens=4, bos=False), tokenizer, range(5), seed=0)
    assert tokenizer.batch_decode(prefixes) == ["alph", "gamm", "epsi", "alph", "gamm"]
    with_bos = cut_prefixes(dataset(texts, tokens=4), tokenizer, range(1, 2), seed=0)
    assert with_bos == [[BOS, *prefixes[1]]]


def test_only_the_start_of_a_document_matters(tokenizer, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "' + "word " * 100_000 + '"}\n')
    for count in (1, 7, 500):
        (prefix,) = cut_prefixes(dataset(str(path), tokens=count), tokenizer, range(1), seed=0)
        whole = tokenizer("word " * 200, add_special_tokens=False).input_ids
        assert prefix == [BOS, *whole[:count]]


def test_no_document_of_enough_tokens(tokenizer, texts):
    with pytest.raises(UserError, match=r"no document in .* has 50 tokens or more"):
        cut_prefixes(dataset(texts, tokens=50), tokenizer, range(1), seed=0)


def test_row_seeds_are_31_bits_and_differ():
    seeds = [row_seed(seed, row) for seed in range(3) for row in range(1000)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) == len(seeds)
    assert row_seed(0, 0) == 1584674046  # never to change: runs are resumed with it
    assert max(seeds) > 2**30
