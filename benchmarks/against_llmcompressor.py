"""Compares seconds of pruning and held-out perplexity with llm-compressor, on the same tokens and threads.

    python benchmarks/against_llmcompressor.py --peer-python PATH --peer-script PATH [--sequences 32] [--repeats 5]

The peer needs an environment of its own (`pip install llmcompressor==0.14.0.1`); its script takes --model, --method,
--calib (a .npy token matrix), --eval, --nsamples, --seqlen, --threads and --json, and reports seconds by stage.
Prints seconds of pruning alone and of the whole process. Pruning alone is, on this side, the time from the gang being
ready and the model readable until the last layer is committed to disk; on the other side it is the pruning call, with
the model in memory before and saved after.
Both sides' perplexities are measured by the same code here, on the checkpoints that they wrote.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from calibprune.calibration.texts import running_text
from calibprune.config.evaluate import HeldOutText
from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.evaluation.perplexity import cut_windows, sweep_perplexity
from calibprune.events import result_of
from calibprune.model import build_skeleton, load_tokenizer

PRUNE_ALONE = """
import sys, time, json, torch
import pyarrow.parquet as pq
from calibprune.calibration.pool import read_pool
from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.model import build_skeleton
from calibprune.pruning.export import finish_checkpoint
from calibprune.pruning.loop import prune_layers, units_of
from calibprune.stage import Stage
model, pool, folder, settings, threads, dtype = sys.argv[1:]
torch.set_num_threads(int(threads))
settings = PruneSettings.model_validate_json(settings)
tokens = read_pool(pool).token_ids
begun = time.perf_counter()
skeleton = build_skeleton(ModelSettings(path=model, dtype=dtype))
stage = Stage(folder)
stage.plan({}, units_of(skeleton, settings))
for _ in prune_layers(skeleton, tokens, settings, stage): pass
finish_checkpoint(stage, model, settings)
print("seconds", time.perf_counter() - begun)
"""
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "100000",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
}  # as cluster/session.py sets it for its workers

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--peer-python", required=True)
parser.add_argument("--peer-script", required=True)
parser.add_argument("--model", default=".cache/demo-model")
parser.add_argument(
    "--pool", help="a calibration pool; default: that of runs/demo, repeated as needed"
)
parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
parser.add_argument("--dtype", default="bfloat16")
parser.add_argument("--sequences", type=int, default=32)
parser.add_argument("--tokens", type=int, default=512)
parser.add_argument("--windows", type=int, default=16)
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
parser.add_argument("--repeats", type=int, default=5)
options = parser.parse_args()


def calibration() -> np.ndarray:
    from calibprune.calibration.pool import read_pool

    tokens = read_pool(options.pool or "runs/demo/curate").token_ids.numpy().ravel()
    wanted = options.sequences * options.tokens
    return np.resize(tokens, wanted).reshape(options.sequences, options.tokens)


def perplexity(checkpoint: str) -> float:
    tokenizer = load_tokenizer(options.model)
    text = running_text(HeldOutText(name="text", path="python-docs"))
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    windows = cut_windows(ids, options.tokens, options.windows, "text")
    skeleton = build_skeleton(ModelSettings(path=checkpoint, dtype=options.dtype))
    result = result_of(sweep_perplexity(skeleton, {"text": windows}, 4))
    return result["text"].perplexity


def ours(method: str, folder: Path) -> tuple[float, float, str]:
    """Prunes here; returns (seconds of pruning, seconds of the whole process, checkpoint)."""
    settings = PruneSettings.model_validate({"method": {"type": method}}).model_dump_json()
    places = [options.model, str(folder / "pool"), str(folder / method)]
    arguments = [*places, settings, str(options.threads), options.dtype]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PRUNE_ALONE, *arguments],
        check=True, capture_output=True, text=True, env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    whole = time.perf_counter() - begun
    return float(done.stdout.split()[-1]), whole, str(folder / method / "checkpoint")


def peers(method: str, folder: Path) -> tuple[float, float, str]:
    out, report = folder / f"peer-{method}", folder / f"peer-{method}.json"
    command = [
        options.peer_python, options.peer_script, "--model", options.model, "--method", method,
        "--calib", str(folder / "calibration.npy"), "--nsamples", str(options.sequences),
        "--seqlen", str(options.tokens), "--threads", str(options.threads), "--dtype", options.dtype,
        "--out", str(out), "--json", str(report),
    ]  # fmt: skip
    begun = time.perf_counter()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    whole = time.perf_counter() - begun
    return json.loads(report.read_text())["seconds"]["prune"], whole, str(out)


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    tokens = calibration()
    np.save(folder / "calibration.npy", tokens)
    (folder / "pool").mkdir()
    table = pa.table({"token_ids": list(tokens.astype(np.int32))})
    pq.write_table(table, folder / "pool" / "pool.parquet")
    print(
        f"{options.model}, {options.sequences} x {options.tokens} tokens, {options.dtype}, 50 %, "
        f"{options.threads} threads, median of {options.repeats}"
    )
    print(
        f"{'method':<10} {'side':<15} {'pruning':>9} {'process':>9} {'perplexity':>11} {'faster':>7}"
    )
    for method in options.methods:
        rows: dict[str, list[tuple[float, float]]] = {"llm-compressor": [], "calibprune": []}
        ppl = {}
        for _ in range(options.repeats):
            for side, prune in (("llm-compressor", peers), ("calibprune", ours)):
                seconds, whole, checkpoint = prune(method, folder)
                rows[side].append((seconds, whole))
                ppl.setdefault(side, perplexity(checkpoint))
                subprocess.run(["rm", "-rf", checkpoint, str(folder / method)], check=True)
        ratio = statistics.median(
            a[0] / b[0] for a, b in zip(rows["llm-compressor"], rows["calibprune"], strict=True)
        )
        for side, measured in rows.items():
            seconds, whole = (statistics.median(values) for values in zip(*measured, strict=True))
            faster = f"{ratio:.2f} x" if side == "calibprune" else ""
            print(
                f"{method:<10} {side:<15} {seconds:>7.1f} s {whole:>7.1f} s {ppl[side]:>11.2f} {faster:>7}"
            )
