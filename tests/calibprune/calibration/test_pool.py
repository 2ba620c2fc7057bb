"""Scores, filters and packing, from generated shards to a pool that `datasets` reads."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from calibprune.calibration.filters import Scores, filter_samples, perplexity
from calibprune.calibration.pool import (
    SAMPLE_SCHEMA,
    choose_samples,
    curate,
    parquet_bytes,
    read_pool,
)
from calibprune.config import CurateSettings
from calibprune.errors import CorruptionError, UserError
from calibprune.run import Stage

RNG = np.random.default_rng(0)


def generated(folder, lengths, logprobs, shard_rows=4) -> Stage:
    """A finished generate stage: sample i is [1000 + i] * lengths[i], with a prefix of one token."""
    stage = Stage(str(folder / "generate"))
    shards = [
        range(s, min(s + shard_rows, len(lengths))) for s in range(0, len(lengths), shard_rows)
    ]
    stage.plan({}, [f"{s:05d}" for s in range(len(shards))])
    for shard, rows in enumerate(shards):
        columns = {
            "row": list(rows),
            "token_ids": [[1000 + row] * lengths[row] for row in rows],
            "prefix_length": [1] * len(rows),
            "cumulative_logprob": [logprobs[row] for row in rows],
            "finish_reason": ["length"] * len(rows),
            "seed": list(rows),
            "source": ["bos"] * len(rows),
        }
        data = parquet_bytes(pa.table(columns, schema=SAMPLE_SCHEMA))
        unit = f"{shard:05d}"
        stage.commit(unit, stage.put(unit, data, "parquet", "data", "part"), {"rows": len(rows)})
    stage.finish({"seconds": 1.0})
    return stage


def settings(**changes) -> CurateSettings:
    return CurateSettings.model_validate({"sequences": 3, "sequence_tokens": 8} | changes)


def curated(generate, folder, wanted) -> Stage:
    stage = Stage(str(folder / "curate"))
    stage.plan({}, ["dropped", "pool"])
    list(curate(generate, stage, wanted))
    stage.finish({"seconds": 1.0})
    return stage


def test_perplexity_is_the_exponential_of_the_mean():
    values = perplexity(np.array([-4.0, 0.0, -3.0]), np.array([2, 5, 0]))
    assert values[0] == pytest.approx(math.e**2) and values[1] == 1 and math.isinf(values[2])


def test_the_worst_fraction_is_dropped_exactly_and_each_keeps_its_reason():
    values = RNG.permutation(np.linspace(2, 50, 25))
    values[3] = np.inf
    scores = Scores(np.arange(25), np.full(25, 9), values)
    reasons, cut = filter_samples(scores, settings(filters=[{"type": "perplexity"}]).filters)
    dropped = {i for i, reason in enumerate(reasons) if reason}
    assert dropped == set(np.argsort(values)[-5:]) and all(
        reasons[i].startswith("perplexity:") for i in dropped
    )
    assert cut == sorted(values)[-5]


def test_ties_drop_the_later_rows():
    scores = Scores(np.arange(10), np.full(10, 9), np.ones(10))
    reasons, _ = filter_samples(scores, settings().filters)
    assert [i for i, reason in enumerate(reasons) if reason] == [8, 9]


def test_filters_apply_in_turn_each_to_what_is_left():
    scores = Scores(np.arange(10), np.array([3] * 5 + [9] * 5), np.arange(10.0))
    filters = [{"type": "length", "min_tokens": 4}, {"type": "perplexity", "drop_worst": 0.2}]
    reasons, _ = filter_samples(scores, settings(filters=filters).filters)
    assert reasons[:5] == ["length: 3 tokens, under 4"] * 5
    assert [i for i, reason in enumerate(reasons) if reason and "perplexity" in reason] == [9]


@pytest.mark.parametrize("pack", ["concat", "document"])
def test_a_pool_has_fixed_lengths_and_no_dropped_sample(tmp_path, pack):
    lengths = [int(n) for n in RNG.integers(9, 14, 10)]
    logprobs = [-0.1 * n for n in lengths]
    logprobs[4] = logprobs[7] = -99.0
    stage = curated(generated(tmp_path, lengths, logprobs), tmp_path, settings(pack=pack))
    pool = read_pool(stage.url)
    assert pool.shape == (3, 8)
    assert not {1004, 1007} & set(pool.flatten().tolist())
    dropped = pq.read_table(f"{stage.url}/{stage.record('dropped').file}")
    assert sorted(dropped["row"].to_pylist()) == [4, 7]
    assert all(reason.startswith("perplexity: ") for reason in dropped["reason"].to_pylist())
    if pack == "document":
        assert all(len(set(row)) == 1 for row in pool.tolist())
    else:  # every token of a sample before the first of the next
        flat = pool.flatten().tolist()
        changes = [i for i in range(1, len(flat)) if flat[i] != flat[i - 1]]
        assert len({flat[0], *(flat[i] for i in changes)}) == len(changes) + 1
    facts = stage.record("pool").facts
    assert (facts["samples"], facts["kept"], facts["dropped"]) == (10, 8, {"perplexity": 2})
    assert sum(facts["perplexity"]["counts"]) == 10


def test_the_pool_is_a_dataset_that_datasets_reads(tmp_path, monkeypatch):
    stage = curated(generated(tmp_path, [12] * 10, [-1.0] * 10), tmp_path, settings())
    rows = load_dataset(
        "parquet", data_dir=f"{stage.url}/data", split="train", cache_dir=tmp_path / "c"
    )
    assert rows.column_names == ["sequence", "token_ids", "source"] and len(rows) == 3
    assert [list(row["token_ids"]) for row in rows] == read_pool(stage.url).tolist()


def test_the_seed_decides_the_order_and_nothing_else_does(tmp_path):
    lengths, logprobs = [12] * 10, [-1.0] * 10
    for name, rows in (("a", 4), ("b", 3)):
        (tmp_path / name).mkdir()
        generated(tmp_path / name, lengths, logprobs, shard_rows=rows)
    pools = [
        curated(
            Stage(f"{tmp_path}/{name}/generate"), tmp_path / f"{name}{seed}", settings(seed=seed)
        )
        for name, seed in (("a", 0), ("b", 0), ("a", 1))
    ]
    pools = [read_pool(pool.url) for pool in pools]
    assert pools[0].equal(pools[1]) and not pools[0].equal(pools[2])


@pytest.mark.parametrize("pack", ["concat", "document"])
def test_too_little_text_says_what_is_there_and_what_is_needed(tmp_path, pack):
    generate = generated(tmp_path, [5] * 4, [-1.0] * 4)
    with pytest.raises(UserError, match=r"24 tokens|3 samples of at least 8 tokens"):
        curated(generate, tmp_path, settings(pack=pack, filters=[]))


def test_choosing_takes_as_few_samples_as_fill_the_pool():
    tokens = np.array([10, 10, 4, 1, 50])
    assert choose_samples(tokens, settings()).tolist() == [0, 1, 2]
    assert choose_samples(np.array([24, 9]), settings()).tolist() == [0]


def test_a_corrupted_shard_is_named(tmp_path):
    generate = generated(tmp_path, [12] * 10, [-1.0] * 10)
    record = generate.records()[1]
    file = tmp_path / "generate" / record.file
    file.write_bytes(file.read_bytes()[:-9] + b"corrupted")
    with pytest.raises(CorruptionError, match=record.file):
        curated(generate, tmp_path, settings())


def test_a_pool_of_ones_own_is_a_folder_of_parquet_files(tmp_path):
    pq.write_table(pa.table({"token_ids": [[1, 2], [3, 4]]}), tmp_path / "mine.parquet")
    assert read_pool(str(tmp_path)).tolist() == [[1, 2], [3, 4]]
    pq.write_table(pa.table({"token_ids": [[1, 2, 3]]}), tmp_path / "odd.parquet")
    with pytest.raises(UserError, match="same length"):
        read_pool(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no calibration pool"):
        read_pool(str(tmp_path / "empty"))
