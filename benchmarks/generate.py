"""Measures the generate stage against its engine alone, and its driver at ten million rows.

    PYTHONPATH=. python benchmarks/generate.py [speed scale] [--model .cache/demo-model] [--repeats 3]

speed    tokens a second of the whole stage, from the first engine ready to the last shard committed, over those of
         vllm.LLM.generate in a process of its own on the same prompts, with the same sampling, seeds and threads
scale    10 million rows in shards of 500, the engine replaced by one that invents rows: seconds until the first shard
         is dispatched, shards committed a second on local disk, seconds to finish, peak memory of the driver
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence

import pyarrow as pa

from calibprune.calibration.pool import SAMPLE_SCHEMA, parquet_bytes
from calibprune.config import Config
from calibprune.events import Event, UnitDone
from calibprune.process import host_memory
from calibprune.stage import Stage
from cluster import generator
from cluster.session import connect
from jobs import engines, generate
from jobs.run import Run
from jobs.stage_runner import run_stage

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("what", nargs="*", default=["speed", "scale"])
parser.add_argument("--model", default=".cache/demo-model")
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--samples", type=int, default=192, help="samples for `speed`")
parser.add_argument("--tokens", type=int, default=64, help="tokens of a sample, for `speed`")
parser.add_argument("--rows", type=int, default=10_000_000, help="rows for `scale`")
parser.add_argument(
    "--texts", help="a source that `scale` cuts prefixes from; default: none, they are computed"
)
options = parser.parse_args()

CONCURRENT = 16
SHARD_ROWS = 32
"""Twice the number of samples that the engine works on at a time, as by default: with fewer it would sometimes idle."""
BARE = """
import json, os, sys, time
if __name__ == "__main__":
    model, tokens, concurrent, prompts, seeds = json.loads(sys.stdin.read())
    from transformers import AutoConfig
    from vllm import LLM, SamplingParams
    from vllm.v1.executor import UniProcExecutor
    dtype = str(AutoConfig.from_pretrained(model).dtype).removeprefix("torch.")
    llm = LLM(model, dtype=dtype, enforce_eager=True, max_num_seqs=concurrent, max_model_len=tokens + 1,
              generation_config="vllm", disable_log_stats=True,
              distributed_executor_backend=UniProcExecutor)
    sampling = [SamplingParams(max_tokens=tokens, ignore_eos=True, seed=seed, logprobs=0, detokenize=False)
                for seed in seeds]
    begun = time.perf_counter()
    llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    print("SECONDS", time.perf_counter() - begun)
"""


def config(output: str, **changes: object) -> Config:
    settings = {
        "max_tokens": options.tokens,
        "stop_at_eos": False,
        "max_concurrent": CONCURRENT,
    } | changes
    return Config.model_validate(
        {
            "model": {"path": options.model},
            "output": output,
            "generate": settings,
            "curate": {"sequences": 1},
        }
    )


def stage_speed(folder: str) -> float:
    run = Run(
        config(f"{folder}/run", samples=options.samples, shard_rows=SHARD_ROWS, shards_in_flight=3)
    )
    with connect(run.config.cluster):
        run_stage(generate, run)
    speed = generate.facts(run)["tokens_per_second"]
    assert speed is not None
    return speed


def bare_speed() -> float:
    from calibprune.calibration.prefixes import row_seed

    run = Run(config("unused"))
    prompts = [[run.tokenizer.bos_token_id]] * options.samples
    seeds = [row_seed(0, row) for row in range(options.samples)]
    work = json.dumps([options.model, options.tokens, CONCURRENT, prompts, seeds])
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(os.cpu_count()), "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0",
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(BARE)
        script.flush()
        result = subprocess.run(
            [sys.executable, script.name], input=work, stdout=subprocess.PIPE, text=True, check=True, env=environment
        )  # fmt: skip
    return options.samples * options.tokens / float(result.stdout.split("SECONDS")[1])


def speed() -> None:
    ratios = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            ours = stage_speed(folder)
        bare = bare_speed()
        ratios.append(ours / bare)
        print(f"speed: stage {ours:.0f} tokens/s, bare {bare:.0f}: {ratios[-1]:.3f}", flush=True)
    print(f"speed: median {statistics.median(ratios):.3f} of bare vLLM")


class Inventor(generator.Generator):
    """Commits rows without an engine."""

    def start(self) -> None:
        pass

    stop = start

    async def complete(self, units: Sequence[str]) -> AsyncIterator[Event]:
        (unit,) = units
        rows = generator.shard_rows(unit, self._settings)
        count = len(rows)
        table = pa.table(
            [list(rows), [[1, 2, 3, 4]] * count, [1] * count, [-1.0] * count, ["length"] * count, [0] * count,
             ["bos"] * count],
            schema=SAMPLE_SCHEMA,
        )  # fmt: skip
        published = self._stage.put(unit, parquet_bytes(table), "parquet", "data", "part")
        facts = {"rows": count, "tokens": 3 * count, "finish_reasons": {"length": count}}
        yield UnitDone(self._stage.commit(unit, published, facts))


def scale() -> None:
    engines.Generator = Inventor  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        prefixes = {"type": "dataset", "path": options.texts} if options.texts else {"type": "bos"}
        run = Run(config(f"{folder}/run", samples=options.rows, shard_rows=500, prefixes=prefixes))
        with connect(run.config.cluster):
            _ = run.skeleton
            before = _peak_megabytes()
            begun = time.time()
            run_stage(generate, run)
            finished = time.time()
        stage = Stage(run.url("generate"))
        records = list(stage.records())
        times = sorted(record.finished_at for record in records if record.unit.isdigit())
        cut = [record.finished_at for record in records if not record.unit.isdigit()]
        shards = len(times)
        print(f"scale: {options.rows:,} rows in {shards:,} shards")
        print(
            f"scale: first shard committed {times[0] - begun:.1f} s after the start, a worker's start included"
        )
        if cut:
            print(f"scale: prefixes cut {max(cut) - begun:.1f} s after the start, {len(cut)} files")
        print(f"scale: {shards / (times[-1] - times[0]):.0f} shards/s")
        print(f"scale: manifest written {finished - times[-1]:.1f} s after the last shard")
        begun = time.perf_counter()
        run_stage(generate, run)
        print(f"scale: {time.perf_counter() - begun:.1f} s to find that all is done")
        print(
            f"scale: peak memory of the driver {_peak_megabytes():.0f} MB, {before:.0f} MB of it before the stage; "
            f"{_own_megabytes():.0f} MB of it its own at the end, the rest are libraries' pages"
        )


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _own_megabytes() -> float:
    return host_memory("RssAnon") / 2**20


if __name__ == "__main__":
    for what in options.what:
        {"speed": speed, "scale": scale}[what]()
