"""Measures gangs: two workers against one, resuming against an undisturbed run, memory against depth.

    python benchmarks/workers.py [scaling resume memory] [--model .cache/demo-model] [--repeats 5]

scaling   seconds of pruning with 2 single-thread workers over 1 single-thread worker, both real actors on a local Ray;
          from the gang ready to the last layer committed
resume    seconds that a run killed at half the layers needs more, the two parts together, than an undisturbed one;
          from the gang ready in both parts, as above
memory    peak memory of a worker with 64 layers over 8 layers of the same width, and what `calibprune check` predicts
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from calibprune.config.model import ClusterSettings, ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.events import UnitDone
from calibprune.model import build_skeleton
from calibprune.pruning.memory import worker_memory
from calibprune.stage import Stage

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("what", nargs="*", default=["scaling", "resume", "memory"])
parser.add_argument("--model", default=".cache/demo-model")
parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
parser.add_argument("--sequences", type=int, default=16)
parser.add_argument("--tokens", type=int, default=512)
parser.add_argument("--repeats", type=int, default=5)
options = parser.parse_args()


def pool(folder: Path, vocabulary: int, sequences: int, tokens: int) -> str:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (sequences, tokens), generator=generator)
    (folder / "pool").mkdir(exist_ok=True)
    table = pa.table({"token_ids": pa.array(ids.tolist(), pa.list_(pa.int32()))})
    pq.write_table(table, folder / "pool" / "pool.parquet")
    return str(folder / "pool")


def settings(method: str) -> PruneSettings:
    return PruneSettings.model_validate({"method": {"type": method}, "batch_sequences": 4})


def gang(workers: int, cpus: int = 1) -> Any:
    from cluster.gang_driver import WorkerGroup
    from cluster.places import Bundle

    return WorkerGroup(workers, Bundle(cpus, 0), ClusterSettings())


def seconds(
    group: Any, method: str, tokens: str, until: int | None = None, folder: str | None = None
) -> float:
    """Returns the seconds of pruning on a gang that is ready; with `until`, stops after that many committed layers."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        stage = Stage(folder or made)
        arguments = (ModelSettings(path=options.model), settings(method), tokens, stage.url)
        begun, committed = time.perf_counter(), 0
        for event in group.events("prune", arguments, None):
            committed += isinstance(event, UnitDone) and "layer" in event.record.facts
            if until is not None and committed >= until:
                break
        return time.perf_counter() - begun


def scaling(folder: Path) -> None:
    from cluster.session import connect

    tokens = pool(folder, vocabulary, options.sequences, options.tokens)
    with connect(ClusterSettings()):
        for method in options.methods:
            of: dict[int, list[float]] = {1: [], 2: []}
            for workers in (1, 2):
                with gang(workers) as group:
                    seconds(group, method, tokens, until=2)  # compiled code is loaded once
            for _ in range(options.repeats):
                for workers, measured in of.items():
                    with gang(workers) as group:
                        measured.append(seconds(group, method, tokens))
            ratio = statistics.median(a / b for a, b in zip(of[1], of[2], strict=True))
            one, two = (statistics.median(values) for values in of.values())
            print(
                f"scaling    {method:<10} 1 worker {one:6.1f} s   2 workers {two:6.1f} s   {ratio:.2f} x"
            )


def resume(folder: Path) -> None:
    from cluster.session import connect

    tokens = pool(folder, vocabulary, options.sequences, options.tokens)
    layers = len(build_skeleton(ModelSettings(path=options.model)).layers)
    with connect(ClusterSettings()):
        for method in options.methods:
            extra = []
            for _ in range(options.repeats):
                with gang(2) as group:
                    undisturbed = seconds(group, method, tokens)
                with tempfile.TemporaryDirectory() as name:
                    with gang(2) as group:
                        first = seconds(group, method, tokens, layers // 2, name)
                    with gang(2) as group:  # leaving the gang ended its workers
                        second = seconds(group, method, tokens, None, name)
                extra.append((first + second - undisturbed) / undisturbed)
            print(
                f"resume     {method:<10} extra time / undisturbed run {statistics.median(extra):.2f}"
            )


ONE = """
import json, sys, torch, transformers
from calibprune.calibration.pool import read_pool
from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.model import build_skeleton
from calibprune.pruning.loop import prune_layers
from calibprune.process import host_memory
from calibprune.stage import Stage
model, tokens, folder, settings = sys.argv[1:]
skeleton, stage = build_skeleton(ModelSettings(path=model)), Stage(folder)
base = host_memory()
for _ in prune_layers(skeleton, read_pool(tokens).token_ids, PruneSettings.model_validate_json(settings), stage): pass
print(json.dumps([base, host_memory("VmHWM")]))
"""


def memory(folder: Path) -> None:
    from tests.tiny import write_tiny_llama

    tokens = pool(folder, 258, 48, 512)
    for method in options.methods:
        peaks = {}
        for layers in (8, 64):
            path = folder / f"{layers}-layers"
            if not path.exists():
                write_tiny_llama(
                    path, layers=layers, hidden=512, intermediate=1792, heads=8, kv_heads=8, dtype=torch.bfloat16
                )  # fmt: skip
            with tempfile.TemporaryDirectory() as out:
                ran = subprocess.run(
                    [sys.executable, "-c", ONE, str(path), tokens, out, settings(method).model_dump_json()],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
            base, peaks[layers] = json.loads(ran.stdout.splitlines()[-1])
            skeleton = build_skeleton(ModelSettings(path=str(path)))
            predicted = worker_memory(skeleton, settings(method), 48, 512, 1, base)
            print(
                f"memory     {method:<10} {layers:>2} layers: peak {peaks[layers] / 2**20:7.0f} MiB, "
                f"predicted {predicted.bytes / 2**20:7.0f} MiB ({predicted.bytes / peaks[layers] - 1:+.0%}); "
                f"of that the process before any weight {base / 2**20:.0f} MiB"
            )
        print(f"memory     {method:<10} 64 layers / 8 layers {peaks[64] / peaks[8]:.3f}")


signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
vocabulary = build_skeleton(ModelSettings(path=options.model)).model.config.vocab_size
with tempfile.TemporaryDirectory() as name:
    for what in options.what:
        {"scaling": scaling, "resume": resume, "memory": memory}[what](Path(name))
