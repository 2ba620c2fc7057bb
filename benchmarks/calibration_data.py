"""Compares held-out perplexity after pruning with text the model wrote itself and with random tokens.

    python benchmarks/calibration_data.py [configs/demo.yaml] [--sparsity 0.5]

Runs `generate` and `curate` of the configuration once (or takes what its run folder has already), then prunes and
evaluates every row of the table in a folder of its own beneath it, through the same drivers as the command line.
"""

import argparse
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calibprune import storage
from calibprune.calibration.pool import read_pool
from calibprune.config.load import load_config
from cluster.session import connect
from jobs import evaluate
from jobs.pipeline import run_stages

ROWS = [
    ("magnitude", "none needed"),
    ("wanda", "random tokens"),
    ("wanda", "self-generated"),
    ("sparsegpt", "self-generated"),
]

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("config", nargs="?", default="configs/demo.yaml")
parser.add_argument("--sparsity", type=float, default=0.5)
parser.add_argument("overrides", nargs="*", help="key.path=value")
options = parser.parse_args()

base = load_config(options.config, options.overrides)
folder = storage.join(base.output, "calibration-data")
results = []
with connect(base.cluster):
    made = run_stages(base, ["generate", "curate"])
    own = read_pool(made.url("curate")).token_ids
    vocabulary = made.skeleton.model.config.vocab_size
    random = np.random.default_rng(0).integers(0, vocabulary, own.shape)
    for name, tokens in (("self-generated", own.numpy()), ("random-tokens", random)):
        buffer = io.BytesIO()
        pq.write_table(pa.table({"token_ids": list(tokens.astype(np.int32))}), buffer)
        storage.write(storage.join(folder, name, "pool.parquet"), buffer.getvalue())
    for method, data in ROWS:
        pool = "random-tokens" if data == "random tokens" else "self-generated"
        changes = [
            f"output={storage.join(folder, f'{method}-{pool}-{options.sparsity:g}')}",
            f"prune.pool={storage.join(folder, pool)}",
            f"prune.method={{type: {method}}}",
            f"prune.sparsity={options.sparsity}",
        ]
        run = run_stages(
            load_config(options.config, [*options.overrides, *changes]), ["prune", "evaluate"]
        )
        seconds = run.stage("prune").manifest()["facts"]["seconds"]
        results.append((method, data, evaluate.facts(run), seconds))

print(f"\n{options.config}, sparsity {options.sparsity:g}, {own.shape[0]} x {own.shape[1]} tokens")
print(f"{'method':<10} {'calibrated on':<15} {'text':<14} {'dense':>8} {'pruned':>8} {'prune':>7}")
for method, data, perplexity, seconds in results:
    for text, facts in perplexity.items():
        print(
            f"{method:<10} {data:<15} {text:<14} {facts['dense']:>8.2f} {facts['pruned']:>8.2f} "
            f"{seconds:>5.0f} s"
        )
