"""Kills engines, workers, nodes and the driver at random, and compares what comes out with an undisturbed run.

    PYTHONPATH=. python benchmarks/chaos.py [--kills 20] [--seed 0] [--through generate]

A cluster of real raylets on this machine, a tiny random Llama in float32, real vLLM engines. After every kill of the
driver the same command is given again, as a user or a job scheduler would. Printed: what was killed, how often the
driver gave up by itself, whether the samples (and the checkpoint) are those of the undisturbed run, bit for bit, and
what was left behind: processes, temporary files.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from ray.cluster_utils import Cluster

from calibprune.run import Stage
from tests.tiny import write_tiny_llama

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--kills", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--through", default="generate", choices=["generate", "run"])
parser.add_argument("--samples", type=int, default=4000)
parser.add_argument("--nodes", type=int, default=3, help="with one CPU each; two are asked for")
parser.add_argument("--least", type=float, default=4, help="seconds between two kills")
parser.add_argument("--most", type=float, default=20)
options = parser.parse_args()

SOON = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 6,
}
KINDS = ["engine", "worker", "node", "driver", "hang"]
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": ".",
}


def write_config(folder: Path, address: str) -> Path:
    write_tiny_llama(folder / "model", layers=8, hidden=128, intermediate=320, max_positions=256)
    path = folder / "config.yaml"
    path.write_text(
        f"""
model: {{path: {folder / "model"}}}
output: {folder / "run"}
cluster: {{address: "{address}", workers: 2, cpus_per_worker: 1, start_timeout_seconds: 180}}
generate: {{samples: {options.samples}, max_tokens: 128, min_tokens: 128, shard_rows: 50, cpu_kvcache_gib: 1,
  engines: 2, attempts: 10, shard_timeout_seconds: 45}}
curate: {{sequences: 64, sequence_tokens: 128}}
prune: {{batch_sequences: 8}}
"""
    )
    return path


def command(config: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "jobs", options.through, str(config), f"output={output}"]


def descendants(names: list[str]) -> list[psutil.Process]:
    """Processes of the cluster whose titles begin so, by number."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith(tuple(names)):
            found.append(process)
    return sorted(found, key=lambda process: process.pid)


class Chaos:
    """Strikes now and then, and gives the command again whenever the driver is gone before it was done."""

    def __init__(self, cluster: Cluster, line: list[str], log: Path) -> None:
        self._cluster, self._line, self._log = cluster, line, log
        self._random = random.Random(options.seed)
        self.made: Counter[str] = Counter()
        self.gave_up = 0
        self._driver = self._start()

    def run(self) -> None:
        """Until the command has succeeded."""
        pause = 0.0
        while True:
            code = self._driver.poll()
            if code == 0:
                return
            if code is not None:
                self.gave_up += code != -signal.SIGKILL
                if code != -signal.SIGKILL:
                    print(f"the driver gave up: {self._log.read_text()[-400:]}", flush=True)
                self._driver = self._start()
            time.sleep(0.5)
            pause -= 0.5
            if pause <= 0 and self.made.total() < options.kills:
                self._strike()
                pause = self._random.uniform(options.least, options.most)

    def _start(self) -> subprocess.Popen:
        return subprocess.Popen(self._line, stderr=self._log.open("a"), env=ENVIRONMENT)

    def _strike(self) -> None:
        """One kill, of a kind for which there is a victim now."""
        for kind in self._random.sample(KINDS, len(KINDS)):
            if self._hit(kind):
                self.made[kind] += 1
                print(f"killed: {kind}", flush=True)
                return

    def _hit(self, kind: str) -> bool:
        match kind:
            case "engine":
                return self._signal(["VLLM::EngineCore"], signal.SIGKILL)
            case "hang":
                return self._signal(["VLLM::EngineCore"], signal.SIGSTOP)
            case "worker":
                return self._signal(["ray::Generator", "ray::LayerWorker"], signal.SIGKILL)
            case "node":
                node = self._random.choice(self._cluster.list_all_nodes()[1:])
                self._cluster.remove_node(node, allow_graceful=False)
                self._cluster.add_node(num_cpus=1)
            case "driver":
                self._driver.kill()
                self._driver.wait()
        return True

    def _signal(self, names: list[str], number: signal.Signals) -> bool:
        victims = descendants(names)
        if victims:
            self._random.choice(victims).send_signal(number)
        return bool(victims)


def digest(run: Path) -> str:
    """Of all samples in row order and, where there is one, of the checkpoint. Raises unless every row is there once."""
    stage = Stage(str(run / "generate"))
    total = hashlib.sha256()
    rows = []
    for record in stage.records():
        table = pq.read_table(run / "generate" / str(record.file))
        rows += table["row"].to_pylist()
        total.update(json.dumps(table.to_pydict()).encode())
    assert rows == list(range(options.samples)), "rows are missing or doubled"
    for file in sorted((run / "prune" / "checkpoint").glob("*")):
        total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()


def left_behind(folder: Path) -> dict[str, int]:
    """What should be gone once the cluster is."""
    names = ("VLLM::", "ray::", "calibprune")
    processes = [
        p
        for p in psutil.process_iter(["cmdline"])
        if " ".join(p.info["cmdline"] or ()).startswith(names)
    ]
    return {
        "processes": len(processes),
        "temporary files in the run": len([*folder.rglob("*.tmp"), *folder.rglob("_lease.json")]),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": SOON},
        )
        for _ in range(options.nodes):
            cluster.add_node(num_cpus=1)
        config = write_config(folder, cluster.address)
        begun = time.monotonic()
        subprocess.run(command(config, folder / "undisturbed"), env=ENVIRONMENT, check=True)
        undisturbed = time.monotonic() - begun
        chaos = Chaos(cluster, command(config, folder / "run"), folder / "log")
        begun = time.monotonic()
        chaos.run()
        disturbed = time.monotonic() - begun
        cluster.shutdown()
        time.sleep(2)
        same = digest(folder / "undisturbed") == digest(folder / "run")
        kills = chaos.made.total()
        print(f"{kills} kills: {dict(chaos.made)}; the driver gave up {chaos.gave_up} times")
        print(f"identical to the undisturbed run: {'yes' if same else 'NO'}")
        print(f"undisturbed {undisturbed:.0f} s, disturbed {disturbed:.0f} s")
        print(f"a kill cost {(disturbed - undisturbed) / max(1, kills):.1f} s")
        print(f"left behind: {left_behind(folder)}")


if __name__ == "__main__":
    main()
