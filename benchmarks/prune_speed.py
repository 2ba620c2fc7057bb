"""Measures the seconds of the prune stage over those of one dense forward of the same tokens, in one run.

    python benchmarks/prune_speed.py [--model .cache/demo-model] [--sequences 32] [--tokens 512] [--repeats 3]
                                     [--methods wanda sparsegpt wanda+swaps alps] [--layers REGEX]

Both run in this process with the same dtype, threads and micro-batches, without Ray. The floor of a calibrated method
is one forward over the calibration tokens; the common two-pass way needs two before any solving. Reading the layers,
committing the pruned ones (with fsync) and measuring the output error are included.
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM

from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.events import UnitDone
from calibprune.model import build_skeleton
from calibprune.pruning.loop import prune_layers
from calibprune.stage import Stage

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default=".cache/demo-model")
parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
parser.add_argument("--pattern", default="unstructured")
parser.add_argument(
    "--layers", help="prune.layers: the layers to prune, from which all are projected"
)
parser.add_argument("--sequences", type=int, default=32)
parser.add_argument("--tokens", type=int, default=512)
parser.add_argument("--batch-sequences", type=int, default=4)
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
parser.add_argument("--repeats", type=int, default=3)
options = parser.parse_args()

torch.set_num_threads(options.threads)
settings = ModelSettings(path=options.model)
dtype = build_skeleton(settings).dtype
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).model
pool = torch.randint(
    0, model.config.vocab_size, (options.sequences, options.tokens),
    generator=torch.Generator().manual_seed(0),
)  # fmt: skip


@torch.no_grad()
def dense_forward() -> float:
    begun = time.perf_counter()
    for batch in pool.split(options.batch_sequences):
        model(input_ids=batch, use_cache=False)
    return time.perf_counter() - begun


def prune(method: str) -> tuple[float, dict[str, float]]:
    """Prunes once; returns (total seconds, seconds by kind of work)."""
    name, _, refinement = method.partition("+")
    wanted = PruneSettings.model_validate(
        {
            "method": {"type": name},
            "refine": refinement or None,
            "pattern": options.pattern,
            "layers": options.layers,
            "batch_sequences": options.batch_sequences,
        }
    )
    parts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        skeleton = build_skeleton(settings)
        for event in prune_layers(skeleton, pool, wanted, Stage(folder)):
            if isinstance(event, UnitDone):
                if event.record.facts.get("linears"):
                    parts["layers"] = parts.get("layers", 0) + 1
                for kind, seconds in event.record.facts.get("seconds", {}).items():
                    parts[kind] = parts.get(kind, 0) + seconds
        return time.perf_counter() - begun, parts


dense_forward()  # warm up
rows: dict[str, list[tuple[float, float, dict[str, float]]]] = {m: [] for m in options.methods}
for method in options.methods:
    if method not in ("magnitude", "wanda"):
        prune(method)  # kernels are compiled once, then cached
    for _ in range(options.repeats):
        floor = dense_forward()
        seconds, parts = prune(method)
        rows[method].append((floor, seconds, parts))

print(
    f"{options.model}, {options.sequences} x {options.tokens} tokens, {dtype}, "
    f"{torch.get_num_threads()} threads, median of {options.repeats}"
)
layers = model.config.num_hidden_layers
print(
    f"{'method':<15} {'dense forward':>13} {'prune':>8} {'ratio':>6} {'solve':>6}   seconds by kind of work"
)
for method, measured in rows.items():
    ratio = statistics.median(seconds / floor for floor, seconds, _ in measured)
    floor = statistics.median(floor for floor, _, _ in measured)
    seconds = statistics.median(seconds for _, seconds, _ in measured)
    parts = measured[len(measured) // 2][2]
    pruned = parts.pop("layers")
    solve = statistics.median(p["solve"] / f for f, _, p in measured) * layers / pruned
    listed = ", ".join(f"{kind} {value:.1f}" for kind, value in parts.items())
    print(f"{method:<15} {floor:>11.1f} s {seconds:>6.1f} s {ratio:>6.2f} {solve:>6.2f}   {listed}")
