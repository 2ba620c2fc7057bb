"""Compares the methods: held-out perplexity, relative output error and seconds, over several seeds.

    PYTHONPATH=. python benchmarks/quality.py [configs/demo.yaml] [--seeds 0 1 2] [--targets 0.5 0.6 0.7 2:4 4:8]

Runs `generate` and `curate` of the configuration once per seed, then prunes and evaluates every row of the table in
this process. A row is ALLOCATION/METHOD+REFINEMENT, such as wanda, owl/sparsegpt or wanda+swaps. Rows that are done
are kept in the run folder: the same command continues where it was stopped, and `--table` prints the rows so far.

perplexity   mean over the seeds, and half the range; the dense model's is in the heading
error        sum over all linears of the relative output error, ||(W - W') X|| / ||W X||, mean over the seeds
seconds      of the prune stage, mean over the seeds; x: over one dense forward of the same tokens
lowered      number of linears of all seeds whose output error refinement lowered, and by which share in the median
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from calibprune.calibration.pool import read_pool
from calibprune.config.load import load_config
from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.evaluation.perplexity import sweep_perplexity
from calibprune.events import UnitDone, result_of
from calibprune.model import build_skeleton
from calibprune.pruning.export import finish_checkpoint
from calibprune.pruning.loop import prune_layers, units_of
from calibprune.stage import Stage

ROWS = [
    "magnitude", "wanda", "ria", "dsnot", "sparsegpt", "alps",
    "owl/wanda", "owl/sparsegpt", "alphapruning/wanda",
    "magnitude+swaps", "wanda+swaps", "sparsegpt+swaps",
]  # fmt: skip

ALLOCATIONS = {"alphapruning": {"type": "alphapruning", "epsilon": 0.15}}
"""Allocations by name. At 70 %, the default epsilon of 0.3 would remove whole layers of the demo model."""

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("config", nargs="?", default="configs/demo.yaml")
parser.add_argument("--rows", nargs="+", default=ROWS)
parser.add_argument("--targets", nargs="+", default=["0.5", "0.6", "0.7", "2:4", "4:8"])
parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
parser.add_argument("--sequences", type=int, help="sequences of each pool; default: all")
parser.add_argument(
    "--windows", type=int, help="windows of the held-out text; default: the configuration's"
)
parser.add_argument("--dtype", default="auto", help="dtype of the forwards that prune and evaluate")
parser.add_argument("--table", action="store_true", help="only print what is done")
parser.add_argument("overrides", nargs="*", default=[], help="key.path=value")
options = parser.parse_intermixed_args()

base = load_config(options.config, options.overrides)
folder = Path(base.output, "quality")
model_settings = base.model.model_copy(update={"dtype": options.dtype})


def settings_of(row: str, target: str) -> PruneSettings:
    name, _, refinement = row.partition("+")
    allocation, _, method = name.rpartition("/")
    removed = {"pattern": target} if ":" in target else {"sparsity": float(target)}
    return PruneSettings.model_validate(
        removed
        | {
            "method": {"type": method},
            "allocation": ALLOCATIONS.get(allocation, allocation or "uniform"),
            "refine": {"type": refinement} if refinement else None,
            "batch_sequences": base.prune.batch_sequences,
        }
    )


def pools() -> dict[int, torch.Tensor]:
    """Makes the calibration pools, one per seed, from text that the model wrote itself."""
    from cluster.session import connect
    from jobs.pipeline import run_stages

    found = {}
    with connect(base.cluster):
        for seed in options.seeds:
            changes = [f"generate.seed={seed}", f"output={folder / f'seed-{seed}'}"]
            run = run_stages(
                load_config(options.config, [*options.overrides, *changes]), ["generate", "curate"]
            )
            found[seed] = read_pool(run.url("curate")).token_ids[: options.sequences]
    return found


def windows() -> dict[str, torch.Tensor]:
    from jobs.run import Run

    return {name: ids[: options.windows] for name, ids in Run(base).windows.items()}


def perplexity(path: str, texts: dict[str, torch.Tensor]) -> dict[str, float]:
    skeleton = build_skeleton(ModelSettings(path=path, dtype=options.dtype))
    found = result_of(sweep_perplexity(skeleton, texts, base.evaluate.batch_sequences))
    return {name: value.perplexity for name, value in found.items()}


def measure(settings: PruneSettings, pool: torch.Tensor, texts: dict[str, torch.Tensor]) -> Any:
    skeleton = build_skeleton(model_settings)
    with tempfile.TemporaryDirectory() as name:
        stage = Stage(f"{name}/prune")
        stage.plan({}, units_of(skeleton, settings))
        begun = time.perf_counter()
        events = list(prune_layers(skeleton, pool, settings, stage))
        seconds = time.perf_counter() - begun
        finish_checkpoint(stage, skeleton.checkpoint.url, settings)
        records = [event.record for event in events if isinstance(event, UnitDone)]
        layers = [record.facts["linears"] for record in records if "layer" in record.facts]
        linears = [linear for layer in layers for linear in layer.values()]
        return {
            "perplexity": perplexity(f"{name}/prune/checkpoint", texts),
            "error": sum(linear["relative_error"] for linear in linears),
            "errors": [linear["relative_error"] for linear in linears],
            "unrefined": [x["unrefined_error"] for x in linears if "unrefined_error" in x],
            "sparsity": sum(x["zeros"] for x in linears) / sum(x["parameters"] for x in linears),
            "seconds": seconds,
        }


def dense_forward(pool: torch.Tensor) -> float:
    """Returns the seconds of one dense forward, with the model in memory."""
    from transformers import AutoModelForCausalLM

    dtype = build_skeleton(model_settings).dtype
    model = AutoModelForCausalLM.from_pretrained(base.model.path, dtype=dtype).model
    with torch.no_grad():
        begun = time.perf_counter()
        for batch in pool.split(base.prune.batch_sequences):
            model(input_ids=batch, use_cache=False)
        return time.perf_counter() - begun


def place(target: str, row: str, seed: int) -> Path:
    return folder / "rows" / f"{target}-{row}-{seed}.json".replace("/", "_").replace(":", "of")


def work() -> Iterator[str]:
    own, texts = pools(), windows()
    dense = folder / "dense.json"
    if not dense.exists():
        facts = {
            "perplexity": perplexity(base.model.path, texts),
            "forward": dense_forward(own[options.seeds[0]]),
            "pool": list(own[options.seeds[0]].shape),
        }
        dense.write_text(json.dumps(facts))
    (folder / "rows").mkdir(exist_ok=True)
    for seed, target, row in itertools.product(options.seeds, options.targets, options.rows):
        if not place(target, row, seed).exists():
            measured = measure(settings_of(row, target), own[seed], texts)
            place(target, row, seed).write_text(json.dumps(measured))
            (text,) = measured["perplexity"].values()
            yield f"{target:<4} {row:<18} seed {seed}: perplexity {text:.2f}, {measured['seconds']:.0f} s"


def table() -> None:
    dense = json.loads((folder / "dense.json").read_text())
    ((text, value),) = dense["perplexity"].items()
    print(
        f"\n{base.model.path}, {dense['pool'][0]} x {dense['pool'][1]} tokens, {text} dense {value:.2f}"
    )
    print(
        f"{'remove':<7} {'method':<19} {'perplexity':>18} {'error':>7} {'seconds':>8} {'x':>6} {'seeds':>6}  lowered"
    )
    for target, row in itertools.product(options.targets, options.rows):
        found = [place(target, row, seed) for seed in options.seeds]
        rows = [json.loads(path.read_text()) for path in found if path.exists()]
        if not rows:
            continue
        values = [next(iter(r["perplexity"].values())) for r in rows]
        seconds = statistics.mean(r["seconds"] for r in rows)
        spread = f"± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
        print(
            f"{target:<7} {row:<19} {statistics.mean(values):>10.2f} {spread:<8}"
            f"{statistics.mean(r['error'] for r in rows):>7.2f} {seconds:>7.0f}s {seconds / dense['forward']:>6.1f} "
            f"{len(rows):>5}  {lowered(rows)}".rstrip()
        )


def lowered(rows: list[Any]) -> str:
    pairs = [pair for r in rows for pair in zip(r.get("unrefined", []), r["errors"], strict=False)]
    if not pairs:
        return ""
    gains = [1 - after / before for before, after in pairs if after < before]
    share = f", {100 * statistics.median(gains):.0f} %" if gains else ""
    return f"{len(gains)} of {len(pairs)}{share}"


if not options.table:
    for line in work():
        print(line, flush=True)
table()
