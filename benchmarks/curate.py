"""Measures curate: bytes of tokens scored a second, and time and memory of the selection at ten million samples.

    python benchmarks/curate.py [scores selection] [--processes 2] [--samples 10000000] [--duplicates 0.1]

scores      megabytes of token data (4 bytes a token) a second, by wall clock and by seconds of one core, with the
            perplexity, repetition and MinHash filters, read from parquet on local disk and committed; and how a
            process's peak memory grows when it scores four times as much
selection   seconds and peak memory of the one task that decides about all samples, from made-up scores; the share
            `--duplicates` of them are nearly equal to another one
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from calibprune.calibration.curate_units import SELECTION, Curation, make_units, plan_curation
from calibprune.calibration.duplicates import bands
from calibprune.calibration.filters import band_column
from calibprune.calibration.pool import SAMPLE_SCHEMA, parquet_bytes
from calibprune.calibration.scores import as_column
from calibprune.config.curate import CurateSettings, DuplicateFilter
from calibprune.stage import Stage

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("what", nargs="*", default=["scores", "selection"])
parser.add_argument("--processes", type=int, default=2)
parser.add_argument("--shards", type=int, default=24, help="shards of 500 samples, for `scores`")
parser.add_argument("--tokens", type=int, default=2048, help="tokens of a sample, for `scores`")
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--samples", type=int, default=10_000_000, help="for selection")
parser.add_argument("--duplicates", type=float, default=0.1, help="share of samples, for selection")
options = parser.parse_args()

ROWS = 500
SETTINGS = CurateSettings.model_validate(
    {
        "filters": [
            {"type": "repetition", "max_repeat_tokens": 256},
            {"type": "duplicates"},
            {"type": "perplexity"},
        ],
        "sequences": 8192,
        "sequence_tokens": 2048,
    }
)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def commit(stage: Stage, unit: str, table: pa.Table, folder: str, facts: dict) -> None:
    stage.commit(unit, stage.put(unit, parquet_bytes(table), "parquet", folder, "part"), facts)


def generated(folder: Path, shards: int) -> Stage:
    """Makes samples of Zipf-distributed tokens, some of which repeat themselves as text does."""
    random = np.random.default_rng(0)
    stage = Stage(str(folder / "generate"))
    units = [f"{shard:05d}" for shard in range(shards)]
    stage.plan({}, units)
    for shard, unit in enumerate(units):
        ids = np.minimum(random.zipf(1.2, (ROWS, options.tokens)), 128_255).astype(np.int32)
        ids[::10, 1000:1200] = ids[::10, 100:300]
        offsets = np.arange(0, ids.size + 1, options.tokens, dtype=np.int32)
        columns = {
            "row": np.arange(shard * ROWS, (shard + 1) * ROWS),
            "token_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids.ravel())),
            "prefix_length": np.ones(ROWS, np.int32),
            "cumulative_logprob": random.normal(-2.5, 0.3, ROWS) * options.tokens,
            "finish_reason": ["length"] * ROWS,
            "seed": np.arange(ROWS),
            "source": ["bos"] * ROWS,
        }
        commit(stage, unit, pa.table(columns, schema=SAMPLE_SCHEMA), "data", {"rows": ROWS})
    stage.finish()
    return stage


def score(curation: Curation, units: list[str], queue: multiprocessing.Queue) -> None:
    list(make_units(curation, units[:1]))  # compiles, and touches all code once
    begun, first = time.process_time(), peak_mb()
    list(make_units(curation, units[1:]))
    queue.put((time.process_time() - begun, first, peak_mb()))


def score_all(curation: Curation, processes: int) -> tuple[float, float, float, float]:
    """Returns (wall seconds, seconds of all cores, peak memory after the first unit, peak memory at the end)."""
    context = multiprocessing.get_context("spawn")
    units = [f"scores-{number:05d}" for number in range(len(curation.portions))]
    queue = context.Queue()
    workers = [
        context.Process(target=score, args=(curation, units[number::processes], queue))
        for number in range(processes)
    ]
    begun = time.monotonic()
    for worker in workers:
        worker.start()
    found = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    cpu, first, last = zip(*found, strict=True)
    return time.monotonic() - begun, sum(cpu), max(first), max(last)


def measure_scores(folder: Path) -> None:
    import calibprune.calibration.curate_units as curation_module

    stage = generated(folder, options.shards)
    curation_module.PORTION_BYTES = (
        1  # one shard per unit, so that every process gets the same number
    )
    curation = plan_curation(str(folder / "curate"), SETTINGS, {"self-generated": stage})
    megabytes = (options.shards - options.processes) * ROWS * options.tokens * 4 / 1e6
    walls, cpus, growth = [], [], []
    for repeat in range(options.repeats):
        again = Curation(f"{folder}/curate{repeat}", SETTINGS, curation.portions)
        again.stage.plan({}, again.units())
        _, cpu, first, last = score_all(again, options.processes)
        done = sorted(record.finished_at for record in again.stage.done().values())
        walls.append(done[-1] - done[options.processes - 1])
        cpus.append(cpu)
        growth.append(last - first)
    wall, cpu = statistics.median(walls), statistics.median(cpus)
    print(
        f"scores: {megabytes / wall:.0f} MB/s by wall clock with {options.processes} processes, "
        f"{megabytes / cpu:.0f} MB of tokens for a second of one core; {megabytes:.0f} MB scored; "
        f"peak memory of a process {last:.0f} MB, {statistics.median(growth):.0f} MB more than after its first shard"
    )


def made_up_scores(stage: Stage, units: list[str]) -> None:
    """Makes scores with independent MinHash bands; near duplicates repeat nearly all bytes of an earlier sample."""
    random = np.random.default_rng(0)
    one = next(f for f in SETTINGS.filters if isinstance(f, DuplicateFilter))
    count, rows = bands(one.similarity, one.permutations)
    each = -(-options.samples // len(units))
    for number, unit in enumerate(units):
        signed = random.integers(0, 256, (each, count, rows), dtype=np.uint8)
        near = int(each * options.duplicates)
        if near:
            signed[-near:] = signed[random.integers(0, each - near, near)]
            changed = random.random((near, count, rows)) < 0.08
            signed[-near:][changed] = random.integers(0, 256, int(changed.sum()), dtype=np.uint8)
        columns = {
            "row": np.arange(number * each, (number + 1) * each),
            "tokens": random.integers(100, 2049, each).astype(np.int32),
            "perplexity": np.exp(random.normal(2.5, 0.4, each)).astype(np.float32),
            "share.4": random.beta(1, 8, each).astype(np.float32),
            "longest": random.geometric(0.05, each).astype(np.int32),
            "hash": random.integers(0, 1 << 63, each, dtype=np.uint64),
        }
        for band in range(count):
            columns[band_column(1, band)] = as_column(np.ascontiguousarray(signed[:, band]))
        facts = {"rows": [each], "tokens": 0}
        commit(stage, unit, pa.table(columns), "scores", facts)


def select(curation: Curation, queue: multiprocessing.Queue) -> None:
    before, wall, cpu = peak_mb(), time.monotonic(), time.process_time()
    (done,) = make_units(curation, [SELECTION])
    facts = done.record.facts
    queue.put((time.monotonic() - wall, time.process_time() - cpu, before, peak_mb(), facts))


def measure_selection(folder: Path) -> None:
    units = max(1, options.samples // 100_000)
    curation = plan_curation(
        str(folder / "select"), SETTINGS, {"self-generated": _stage(folder, units)}
    )
    curation.stage.plan({}, curation.units())
    made_up_scores(curation.stage, [f"scores-{number:05d}" for number in range(units)])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=select, args=(curation, queue))
    process.start()
    wall, cpu, before, most, facts = queue.get()
    process.join()
    print(
        f"selection: {facts['samples']} samples in {wall:.0f} s, {cpu:.0f} s of one core; peak memory {most:.0f} MB, "
        f"{(most - before) * 1e6 / facts['samples']:.0f} bytes a sample over {before:.0f} MB of the empty process; "
        f"dropped {facts['dropped']}, duplicates {facts['duplicates']}"
    )


def _stage(folder: Path, shards: int) -> Stage:
    """Makes one empty shard per unit, since the selection reads scores only."""
    import calibprune.calibration.curate_units as curation_module

    curation_module.PORTION_BYTES = 1
    stage = Stage(str(folder / "empty"))
    names = [f"{shard:05d}" for shard in range(shards)]
    stage.plan({}, names)
    for name in names:
        stage.commit(name, stage.put(name, b"nothing", "parquet", "data", "part"), {})
    stage.finish()
    return stage


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="calibprune-") as made:
        if "scores" in options.what:
            measure_scores(Path(made))
        if "selection" in options.what:
            measure_selection(Path(made))
