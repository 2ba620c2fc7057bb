"""The whole curate stage: from shards of several sources to a pool, and to the same pool after any interruption."""

import asyncio
import gc
import json
import math
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from calibprune.calibration import curate_units as units_of_work
from calibprune.calibration import decide as choosing
from calibprune.calibration import mixing, sources
from calibprune.calibration.curate_units import make_units, plan_curation
from calibprune.calibration.decide import Selection, SelectionFile
from calibprune.calibration.pool import read_pool
from calibprune.calibration.sources import text_units, write_documents
from calibprune.errors import CorruptionError, UserError
from calibprune.stage import Stage
from tests.calibprune.calibration.samples import curate, curated, generated, repeated, settings
from tests.tiny import byte_tokenizer

RNG = np.random.default_rng(0)


def all_of(stage) -> Selection:
    chosen = SelectionFile(stage)
    return chosen.of(range(sum(chosen.shard_rows)))


def dropped_rows(curation):
    stage = curation.stage
    records = [record for record in stage.records() if record.unit.startswith("dropped-")]
    files = [f"{stage.url}/{record.file}" for record in records if record.file]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def facts(curation):
    return curation.stage.record("selection").facts


@pytest.mark.parametrize("pack", ["concat", "document"])
def test_a_pool_has_fixed_lengths_and_no_dropped_sample(tmp_path, pack):
    lengths = [int(n) for n in RNG.integers(9, 14, 10)]
    logprobs = [-0.1 * n for n in lengths]
    logprobs[4] = logprobs[7] = -99.0
    stage = generated(tmp_path / "generate", repeated(lengths), logprobs)
    made = curated(tmp_path / "curate", settings(pack=pack), own=stage)
    pool = read_pool(made.stage.url).token_ids
    assert pool.shape == (3, 8) and not {1004, 1007} & set(pool.flatten().tolist())
    dropped = dropped_rows(made)
    assert [row["row"] for row in dropped] == [4, 7]
    for row in dropped:
        worst = math.exp(99 / (lengths[row["row"]] - 1))
        assert row["reason"] == f"perplexity: {worst:.4g} is among the worst 20%"
        assert row["token_ids"] == repeated(lengths)[row["row"]]
    if pack == "document":
        assert all(len(set(row)) == 1 for row in pool.tolist())
    else:  # every token of a sample before the first of the next
        flat = pool.flatten().tolist()
        changes = [i for i in range(1, len(flat)) if flat[i] != flat[i - 1]]
        assert len({flat[0], *(flat[i] for i in changes)}) == len(changes) + 1
    found = facts(made)
    assert (found["samples"], found["kept"], found["dropped"]) == (10, 8, {"perplexity": 2})
    assert sum(found["perplexity"]["counts"]) == 10 and found["duplicates"] == {
        "exact": 0,
        "near": None,
    }


def test_repetition_and_duplicates_are_measured_though_nothing_filters_by_them(tmp_path):
    looping, other = [3, 4, 5, 6] * 5, list(range(100, 120))
    stage = generated(tmp_path / "generate", [looping, other, looping, other[::-1]])
    found = facts(curated(tmp_path / "curate", settings(filters=[]), own=stage))
    assert found["duplicates"] == {"exact": 1, "near": None}
    shares, repeats = found["repetition"]["before"], found["repeats"]["before"]
    assert (shares[0], sum(shares[20:])) == (2, 2)
    assert (repeats[0], repeats[-1], found["repeats"]["edges"][-1]) == (2, 2, 15)


def test_the_pool_is_a_dataset_that_datasets_reads(tmp_path):
    stage = generated(tmp_path / "generate", repeated([12] * 10))
    url = curated(tmp_path / "curate", settings(), own=stage).stage.url
    rows = load_dataset("parquet", data_dir=f"{url}/data", split="train", cache_dir=tmp_path / "c")
    assert rows.column_names == ["sequence", "token_ids", "source"] and len(rows) == 3
    assert [list(row["token_ids"]) for row in rows] == read_pool(url).token_ids.tolist()
    assert set(rows["source"]) == {"self-generated"}


def test_the_seed_decides_the_order_and_nothing_else_does(tmp_path):
    stages = [
        generated(tmp_path / str(rows), repeated([12] * 10), shard_rows=rows) for rows in (4, 3)
    ]
    pools = [
        read_pool(
            curated(tmp_path / f"{i}{seed}", settings(seed=seed), own=stages[i]).stage.url
        ).token_ids
        for i, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert pools[0].equal(pools[1]) and not pools[0].equal(pools[2])


@pytest.mark.parametrize(("pack", "said"), [("concat", r"4 kept samples have 20.*generate.samples"),
                                            ("document", r"0 of its 4 kept samples are.*max_tokens")])  # fmt: skip
def test_too_little_text_says_which_source_has_what_and_needs_what(tmp_path, pack, said):
    stage = generated(tmp_path / "generate", repeated([5] * 4))
    with pytest.raises(UserError, match=f"self-generated must .*{said}"):
        curated(tmp_path / "curate", settings(pack=pack, filters=[]), own=stage)


def test_no_samples_at_all(tmp_path):
    with pytest.raises(UserError, match="no samples at all"):
        curated(tmp_path / "curate", settings(), own=generated(tmp_path / "generate", []))


def test_a_corrupted_shard_is_named(tmp_path):
    stage = generated(tmp_path / "generate", repeated([12] * 10))
    record = stage.records()[1]
    file = tmp_path / "generate" / str(record.file)
    file.write_bytes(file.read_bytes()[:-9] + b"corrupted")
    with pytest.raises(CorruptionError, match=str(record.file)):
        curated(tmp_path / "curate", settings(), own=stage)


FILTERS = [
    {"type": "length", "min_tokens": 3},
    {"type": "repetition", "max_share": 0.9, "max_repeat_tokens": 30},
    {"type": "duplicates"},
    {"type": "perplexity", "drop_worst": 0.1, "drop_best": 0.05},
]


@pytest.fixture
def two(tmp_path):
    """Makes two generated sources and one of documents, with something for every filter to drop."""
    samples = [RNG.integers(0, 9000, RNG.integers(40, 90)).tolist() for _ in range(50)]
    samples[3], samples[8], samples[9] = [1, 2], samples[1], [*samples[2][:-2], 1, 2]
    samples[12] = [7] * 60
    others = [[20_000 + token for token in sample] for sample in samples[20:]]
    others[5] = samples[0]
    logprobs = RNG.uniform(-300, -100, 80).tolist()
    lines = "\n".join(f"number {i} of some lines, {i * 7919} of them" for i in range(40))
    (tmp_path / "lines.txt").write_text(lines)
    wanted = settings(
        sources=[
            {"type": "generated", "name": "a", "weight": 2},
            {"type": "generated", "name": "b", "path": str(tmp_path / "b")},
            {"type": "text", "name": "lines", "path": str(tmp_path / "lines.txt"),
             "budget_tokens": 33, "documents": 60},
        ],
        filters=FILTERS[:3], sequences=24, sequence_tokens=16, positions="generated",
    )  # fmt: skip
    stages = {
        "a": generated(tmp_path / "a", samples, logprobs[:50], shard_rows=7),
        "b": generated(tmp_path / "b", others, logprobs[50:], shard_rows=7, prefix_length=4),
    }
    return wanted, stages


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(units_of_work, "PORTION_BYTES", 6000)
    monkeypatch.setattr(units_of_work, "PORTION_TEXT_SHARDS", 2)
    monkeypatch.setattr(mixing, "POOL_FILE_TOKENS", 16 * 7)
    monkeypatch.setattr(sources, "SHARD_TOKENS", 16 * 10)
    monkeypatch.setattr(choosing, "ROWS_AT_ONCE", 13)


def complete(folder, wanted, stages):
    """Makes the missing units, those of documents included."""
    curation = plan_curation(str(folder), wanted, stages)
    missing = set(curation.stage.plan({}, curation.units()))
    tokenizer = byte_tokenizer()
    for source in curation.natural_sources():
        some = missing & set(text_units(source, wanted.sequence_tokens))
        if some:
            list(write_documents(curation.stage, source, 16, tokenizer, 0, some))
    curate(curation)
    curation.stage.finish({"seconds": 1.0})
    return curation


def test_sources_side_by_side(tmp_path, two, small_units):
    wanted, stages = two
    made = complete(tmp_path / "curate", wanted, stages)
    assert len(made.portions) > 4 and len([u for u in made.units() if "pool-" in u]) == 4
    found = facts(made)
    named = found["sources"]
    assert {name: one["sequences"] for name, one in named.items()} == {"a": 14, "b": 7, "lines": 3}
    assert {name: one["samples"] for name, one in named.items()} == {"a": 50, "b": 30, "lines": 40}
    assert found["dropped"] == {"length": 1, "repetition": 1, "duplicates": 3}
    assert found["duplicates"] == {"exact": 2, "near": 1}
    assert [step["filter"] for step in found["steps"]] == [None, *(f["type"] for f in FILTERS[:3])]
    assert [step["kept"] for step in found["steps"]] == [120, 119, 118, 115]
    assert [step["dropped"] for step in found["steps"]] == [0, 1, 1, 3]
    assert sum(found["lengths"]["before"]) == 120 and sum(found["repetition"]["after"]) == 115
    assert len({tuple(step["perplexity"]["edges"]) for step in found["steps"]}) == 1
    reasons = {(row["source"], row["row"]): row["reason"] for row in dropped_rows(made)}
    assert reasons["a", 8] == "duplicates: equal to row 1 of a"
    assert reasons["a", 9] == "duplicates: nearly equal to row 2 of a"
    assert reasons["b", 5] == "duplicates: equal to row 0 of a"
    assert reasons["a", 3].startswith("length: 2") and reasons["a", 12].startswith("repetition: ")
    assert len(reasons) == 5


def by_hand(made, stages):
    """Builds the pool, and which positions the model wrote, from the selection alone."""
    wanted, selection, rows, owners = made.settings, all_of(made.stage), [], []
    for portion in made.portions:
        for shard in portion.shards:
            table = sources.read_shard(shard)
            rows += [] if table is None else table.to_pylist()
            owners += [portion.source] * (0 if table is None else len(table))
    tokens, written = {}, {}
    for source in set(owners):
        used = [i for i, owner in enumerate(owners) if owner == source and selection.start[i] >= 0]
        used.sort(key=lambda i: selection.start[i])
        tokens[source], written[source] = [], []
        for i in used:
            row = rows[i]
            kept = row["token_ids"][: 16 if wanted.pack == "document" else None]
            assert selection.marks[i] == 0 and selection.start[i] == len(tokens[source])
            tokens[source] += kept
            written[source] += [place >= row["prefix_length"] for place in range(len(kept))]
    return tokens, written


@pytest.mark.parametrize("pack", ["concat", "document"])
def test_every_sequence_is_of_one_source_and_knows_what_the_model_wrote(
    tmp_path, two, small_units, pack
):
    wanted, stages = two
    wanted = wanted.model_copy(update={"pack": pack})
    made = complete(tmp_path / "curate", wanted, stages)
    rows = load_dataset(
        "parquet", data_dir=f"{made.stage.url}/data", split="train", cache_dir=tmp_path / "c"
    )
    read = read_pool(made.stage.url)
    pool, positions = read.token_ids, read.generated
    assert positions is not None and rows["sequence"] == list(range(24))
    tokens, written = by_hand(made, stages)
    for number, name in enumerate(("a", "b", "lines")):
        mine = np.array(rows["source"]) == name
        flat = pool[mine].flatten().tolist()
        assert flat == tokens[number][: len(flat)] and len(tokens[number]) - len(flat) < 90
        assert positions[mine].flatten().tolist() == written[number][: len(flat)]
        assert not positions[mine].all()


@pytest.mark.parametrize("pack", ["concat", "document"])
def test_any_unit_can_be_lost_and_comes_back_with_the_same_bytes(tmp_path, two, small_units, pack):
    wanted, stages = two
    wanted = wanted.model_copy(update={"pack": pack})
    made = complete(tmp_path / "curate", wanted, stages)
    whole = {unit: record.sha256 for unit, record in made.stage.done().items()}
    again = tmp_path / "again"
    for unit in RNG.permutation(made.units())[:12]:
        shutil.copytree(made.stage.url, again)
        lost = json.loads((again / "_done" / f"{unit}.json").read_text())
        (again / "_done" / f"{unit}.json").unlink()
        if lost["file"]:
            (again / lost["file"]).unlink()
        rest = complete(again, wanted, stages).stage.done()
        assert {unit: record.sha256 for unit, record in rest.items()} == whole
        assert all((again / record.file).exists() for record in rest.values() if record.file)
        shutil.rmtree(again)


def test_a_perplexity_filter_of_documents_goes_by_what_the_model_says(tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(f"line {i}, as said" for i in range(20)))
    named = {"type": "text", "name": "lines", "path": str(tmp_path / "lines.txt"), "documents": 20}
    wanted = settings(sources=[named])
    curation = plan_curation(str(tmp_path / "curate"), wanted, {})
    units = curation.units()
    assert units[:2] == ["text-lines-00000", "scored-lines-00000"]
    curation.stage.plan({}, units)
    list(write_documents(curation.stage, curation.natural_sources()[0], 8, byte_tokenizer(), 0,
                         units[:1]))  # fmt: skip

    class Known:
        async def score(self, token_ids, first):
            return [-float(i) for i in range(len(token_ids))]

    asyncio.run(sources.score_shard(Known(), curation.stage, units[1]))
    curate(curation)
    curation.stage.finish()
    rows = dropped_rows(curation)
    assert [row["row"] for row in rows] == [16, 17, 18, 19]
    assert rows[0]["cumulative_logprob"] == -16 and rows[0]["source"] == "lines"
    assert rows[0]["reason"].startswith(f"perplexity: {math.exp(16 / 7):.4g} ")


def test_scoring_holds_one_shard_at_a_time(tmp_path):
    def peak(shards):
        """Returns the lowest of three peaks, since whatever else the process does only adds to one."""
        samples = RNG.integers(0, 50_000, (40 * shards, 500)).tolist()
        stage = generated(tmp_path / f"of{shards}", samples, shard_rows=40)
        wanted, found = settings(filters=FILTERS), []
        for turn in range(3):
            folder = str(tmp_path / f"curate{shards}-{turn}")
            made = plan_curation(folder, wanted, {"self-generated": stage})
            assert len(made.portions) == 1
            gc.collect()
            tracemalloc.start()
            list(make_units(made, ["scores-00000"]))
            found.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return min(found)

    peak(1)  # compiles
    few, many = peak(4), peak(16)
    # room for some copies of a sample's scores, but not for its 2,000 bytes of tokens
    assert many - few < 12 * 40 * 600


def test_of_a_selection_only_a_part_is_unpacked_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "ROWS_AT_ONCE", 17)
    lengths = np.random.default_rng(0).integers(1, 20, 100).tolist()
    stage = generated(tmp_path / "generate", repeated(lengths))
    made = curated(tmp_path / "curate", settings(sequences=60, filters=[]), own=stage)
    chosen, every = SelectionFile(made.stage), all_of(made.stage).start
    assert chosen._file.num_row_groups == 6
    for low, high in ((0, 8), (3, 4), (100, 300), (0, 480), (472, 480)):
        covers = [s for s in range(100) if 0 <= every[s] < high and every[s] + lengths[s] > low]
        samples, starts = chosen.used(range(100), low, high)
        assert samples.tolist() == covers and starts.tolist() == every[covers].tolist()
    assert np.array_equal(chosen.of(range(30, 60)).start, every[30:60])
    used, _ = chosen.used(
        range(20, 40), int(every[20:40].min(initial=99, where=every[20:40] >= 0)), 480
    )
    assert used.tolist() == [s for s in range(20, 40) if every[s] >= 0]


def test_the_pool_reads_no_shard_that_it_does_not_need(tmp_path, monkeypatch):
    stage = generated(tmp_path / "generate", repeated([12] * 100), shard_rows=1)
    made = curated(tmp_path / "curate", settings(), own=stage)
    used = np.flatnonzero(all_of(made.stage).start >= 0)
    read = []
    monkeypatch.setattr(
        units_of_work,
        "read_shard",
        lambda shard: read.append(shard.unit) or sources.read_shard(shard),
    )
    again = plan_curation(made.stage.url, made.settings, {"self-generated": stage})
    Path(made.stage.url, "_done", "pool-00000.json").unlink()
    curate(again)
    assert sorted(read) == [f"{row:05d}" for row in used] and len(used) == 2


def test_shards_set_aside_are_passed_over(tmp_path):
    stage = Stage(str(tmp_path / "generate"))
    whole = generated(tmp_path / "whole", repeated([12] * 12))
    stage.plan({}, ["00000", "00001", "00002"])
    for unit, record in whole.done().items():
        if unit == "00001":
            stage.commit(unit, None, {"rows": 0})
        else:
            data = whole.read(record)
            stage.commit(unit, stage.put(unit, data, "parquet", "data", "part"), record.facts)
    stage.finish()
    made = curated(tmp_path / "curate", settings(filters=[]), own=stage)
    assert facts(made)["samples"] == 8
    assert not set(range(1004, 1008)) & set(read_pool(made.stage.url).token_ids.flatten().tolist())
