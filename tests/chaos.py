"""A small cluster of real raylets whose parts are killed at random while a run goes on; and what is left afterwards."""

import contextlib
import hashlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import psutil
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from calibprune import storage
from calibprune.stage import Stage
from tests.cluster.nodes import DEATHS_SEEN_SOON, Nodes
from tests.servers import Fault, Proxy

KINDS = ("engine", "hang", "worker", "node", "driver", "terminate", "store")
ACTORS = ("ray::Generator", "ray::LayerWorker", "ray::UnitWorker")
ENGINES = ("VLLM::EngineCore",)
VICTIM_SECONDS = 90.0
"""Time that a kind of kill may wait for a victim before another kind is drawn."""
MARK = "CALIBPRUNE_CHAOS"
"""Environment variable that marks the processes started here, even those whose parents are gone."""
STAGES = ("generate", "curate", "prune", "evaluate")
FAULTS = (
    Fault("PUT", "", 2, 503),
    Fault("PUT", "", 1, None),
    Fault("GET", "", 3, 500),
    Fault("HEAD", "", 2, 503),
    Fault("GET", "", 1, None),
)


@contextlib.contextmanager
def nodes(count: int) -> Iterator[Cluster]:
    """Starts a head without CPUs and `count` nodes of one CPU each; all inherit this process's environment."""
    os.environ[MARK] = secrets.token_hex(8)
    cluster = Nodes(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "_system_config": DEATHS_SEEN_SOON | {"health_check_failure_threshold": 6},
        },
    )
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


@dataclass
class Strike:
    kind: str
    stage: str
    at: float
    """Seconds since the first start of the command."""


@dataclass
class Drawn:
    """The kind of the next kill, kept until it finds a victim: most of the time no engine is running."""

    kinds: Sequence[str]
    kind: str = ""
    until: float = 0.0

    def of(self, choice: random.Random) -> str:
        if time.monotonic() > self.until:
            self.kind, self.until = choice.choice(self.kinds), time.monotonic() + VICTIM_SECONDS
        return self.kind


@dataclass
class Chaos:
    """Strikes at random times, and runs the command again whenever its driver ended before the run was done."""

    cluster: Cluster
    command: Sequence[str]
    output: str
    log: Path
    seed: int
    kills: int
    pause: tuple[float, float]
    """Minimum and maximum seconds between two kills."""
    proxy: Proxy | None = None
    """Proxy in front of the store, to make it fail; None where the store is a disk."""
    kinds: Sequence[str] = KINDS
    stages: Sequence[str] = STAGES
    """Stages during which to strike."""
    gave_up: int = 0
    """Number of times that the driver ended by itself, with an error."""
    strikes: list[Strike] = field(default_factory=list)

    def run(self, limit_seconds: float = 3600) -> float:
        """Strikes until the command has succeeded; returns the seconds that took. Raises TimeoutError."""
        choice, wanted = random.Random(self.seed), Drawn(self.kinds)
        begun = time.monotonic()
        driver = self._start()
        after = begun + choice.uniform(*self.pause)
        try:
            while (code := driver.poll()) != 0:
                now = time.monotonic()
                if now - begun > limit_seconds:
                    raise TimeoutError(f"not done within {limit_seconds:.0f} s")
                if code is not None:
                    if code not in (-signal.SIGKILL, 130):
                        self.gave_up += 1
                    driver = self._start()
                elif now >= after and len(self.strikes) < self.kills:
                    stage = stage_at_work(self.output)
                    if stage in self.stages and self._strike(
                        wanted.of(choice), stage, driver, choice, now - begun
                    ):
                        wanted = Drawn(self.kinds)
                        after = now + choice.uniform(*self.pause)
                time.sleep(0.2)
        finally:
            driver.kill()
            driver.wait()
        return time.monotonic() - begun

    def counts(self) -> dict[str, int]:
        return dict(Counter(f"{strike.kind} in {strike.stage}" for strike in self.strikes))

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("a") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log)

    def _strike(
        self,
        kind: str,
        stage: str,
        driver: subprocess.Popen[bytes],
        choice: random.Random,
        at: float,
    ) -> bool:
        """Strikes once; returns whether there was a victim."""
        if not self._hit(kind, driver, choice):
            return False
        self.strikes.append(Strike(kind, stage, at))
        print(f"{at:5.0f} s  {kind} in {stage}", flush=True)
        with self.log.open("a") as log:
            log.write(f"-------- {at:.0f} s: {kind}\n")
        return True

    def _hit(self, kind: str, driver: subprocess.Popen[bytes], choice: random.Random) -> bool:
        match kind:
            case "engine":
                return kill(ENGINES, choice)
            case "hang":
                return kill(ENGINES, choice, signal.SIGSTOP)
            case "worker":
                return kill(ACTORS, choice)
            case "node":
                victim = choice.choice(self.cluster.list_all_nodes()[1:])
                self.cluster.remove_node(victim, allow_graceful=False)
                self.cluster.add_node(num_cpus=1)
            case "driver":
                driver.kill()
            case "terminate":
                driver.terminate()
            case "store":
                if self.proxy is None:
                    return False
                fault = choice.choice(FAULTS)
                self.proxy.faults.append(Fault(**fault.__dict__))
        return True


def stage_at_work(output: str) -> str:
    stages = (name for name in STAGES if not Stage(storage.join(output, name)).finished)
    return next(stages, "report")


def digest(output: str) -> str:
    """Returns a hash of all that a run made except times: the bytes of every unit and the checkpoint, the perplexities.

    Raises AssertionError unless every row of the samples is there once.
    """
    total = hashlib.sha256()
    rows = []
    for name in ("generate", "curate", "prune"):
        stage = Stage(storage.join(output, name))
        for record in stage.records():
            total.update(f"{record.unit} {record.sha256}".encode())
            stage.read(record)
            if name == "generate":
                rows.append(record.facts["rows"])
    samples = storage.read_json(storage.join(output, "run.json"))["config"]["generate"]["samples"]
    assert sum(rows) == samples, f"{sum(rows)} rows of {samples}"
    filesystem, folder = storage.resolve(storage.join(output, "prune", "checkpoint"))
    for path in sorted(filesystem.find(folder)):
        total.update(path.rsplit("/", 1)[-1].encode() + filesystem.cat_file(path))
    report = storage.read_json(storage.join(output, "report", "report.json"))
    total.update(json.dumps(report["perplexity"], sort_keys=True).encode())
    return total.hexdigest()


@dataclass
class Leaks:
    """Finds what is left in a cluster, on this machine and in a store that was not there when this object was made.

    `temporary` is the folder where this process and all that it starts keep temporary files.
    """

    cluster: Cluster
    temporary: Path
    shared_memory: frozenset[str] = field(default_factory=lambda: frozenset(_shared_memory()))

    def found(self, outputs: Sequence[str], since: float = 0.0) -> dict[str, list[str]]:
        """Returns the names of things left, by kind, once the runs have ended; empty where nothing leaks.

        `since` is the time of the last kill: a process that is killed while it writes leaves a temporary file, which
        nothing reads.
        """
        actors, groups, missing = self._in_cluster()
        left = {
            "processes": [" ".join(one.cmdline())[:60] for one in _ours((*ACTORS, "VLLM::"))],
            "actors": actors,
            "placement groups": groups,
            "CPUs": missing,
            "shared memory": sorted(set(_shared_memory()) - self.shared_memory),
            "temporary files": [path.name for path in self.temporary.iterdir()],
            "half written": [one for output in outputs for one in _half_written(output, since)],
            "multipart uploads": [one for output in outputs for one in _multipart_uploads(output)],
        }
        return {kind: names for kind, names in left.items() if names}

    def _in_cluster(self) -> tuple[list[str], list[str], list[str]]:
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            for _ in range(50):  # deaths take a moment to be seen
                alive = [a for a in ray._private.state.actors().values() if a["State"] != "DEAD"]
                groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
                total, free = ray.cluster_resources(), ray.available_resources()
                missing = int(total.get("CPU", 0) - free.get("CPU", 0))
                if not (alive or groups or missing):
                    break
                time.sleep(0.2)
            return alive, groups, missing
        finally:
            ray.shutdown()


def kill(
    names: tuple[str, ...], choice: random.Random | None = None, number: int = signal.SIGKILL
) -> bool:
    """Signals a process started here whose title begins with one of `names`; returns whether there was one."""
    victims = _ours(names)
    if victims:
        with contextlib.suppress(psutil.Error):
            (choice or random.Random(0)).choice(victims).send_signal(number)
    return bool(victims)


def _ours(names: tuple[str, ...]) -> list[psutil.Process]:
    """Lists the processes of this machine that were started here and whose titles begin with one of `names`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if not " ".join(process.cmdline()).startswith(names) or process.status() == "zombie":
                continue
            if process.environ().get(MARK) == os.environ.get(MARK, ""):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def _half_written(output: str, since: float) -> list[str]:
    filesystem, folder = storage.resolve(output)
    return [
        path
        for path, facts in filesystem.find(folder, detail=True).items()
        if path.endswith("_lease.json")
        or (path.endswith(".tmp") and facts.get("mtime", since) >= since)
    ]


def _shared_memory() -> list[str]:
    """Lists Python's shared memory and semaphores that no process maps any more.

    They are listed first and checked again at the end, since processes start and end meanwhile.
    """
    there = {
        entry.name: str(entry.inode())
        for entry in os.scandir("/dev/shm")
        if entry.name.startswith(("psm_", "sem.mp-", "torch_"))
    }
    mapped = set()
    for process in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped |= {
                line.split()[4] for line in process.read_text().splitlines() if "/dev/shm/" in line
            }
    return [
        name
        for name, inode in there.items()
        if inode not in mapped and Path("/dev/shm", name).exists()
    ]


def _multipart_uploads(output: str) -> list[str]:
    if not output.startswith("s3://"):
        return []
    filesystem = fsspec.filesystem("s3")
    bucket = output.removeprefix("s3://").split("/")[0]
    found = filesystem.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
    return [upload["Key"] for upload in found]


def command(config: Path, output: str, through: str = "run") -> list[str]:
    return [sys.executable, "-m", "jobs", through, str(config), f"output={output}"]
