"""Measures the overhead of submitting a run as a job: time to the first token, and the job's time over a direct run's.

    PYTHONPATH=. python benchmarks/submit.py [--samples 2000] [--repeats 1]

Uses a Ray of one node on this machine on which a job has run already, a tiny random Llama, real vLLM and all stages.
The time to the first token lasts from the command until the first shard of samples is committed. Most of it is the
engine's start, so a direct run, `python -m jobs run` on the same Ray, is measured too and compared. On a machine with
other work the difference says little; so the time that a job adds before its driver's process starts and after it has
ended is also printed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.jobs_api import follow
from tests.jobs.head import Head, head_with_token
from tests.tiny import write_tiny_llama

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--samples", type=int, default=2000)
parser.add_argument("--repeats", type=int, default=1)
options = parser.parse_args()

AIM_SECONDS, AIM_SHARE = 5.0, 0.02


def write_config(folder: Path) -> Path:
    write_tiny_llama(folder / "model", layers=8, hidden=128, intermediate=320, max_positions=256)
    path = folder / "config.yaml"
    path.write_text(
        f"""
model: {{path: {folder / "model"}}}
output: {folder / "run"}
cluster: {{workers: 1, cpus_per_worker: 1}}
generate: {{samples: {options.samples}, max_tokens: 64, min_tokens: 64, shard_rows: 20, cpu_kvcache_gib: 1}}
curate: {{sequences: 32, sequence_tokens: 128}}
prune: {{method: wanda}}
"""
    )
    return path


@dataclass
class Times:
    """Seconds since the command was given."""

    driver: float
    """Seconds until the driver's process began."""
    first: float
    """Seconds until the first shard of samples was committed."""
    driver_ended: float
    whole: float


def timed(head: Head, output: Path, line: list[str]) -> Times:
    begun, driver, first, ended = time.time(), None, None, None
    process = subprocess.Popen(line, env=head.environment, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if driver is None:
            found = head.processes("python -m jobs run")
            driver = found[0] if found else None
        elif ended is None and not (driver.is_running() and driver.status() != "zombie"):
            ended = time.time() - begun
        if first is None and any((output / "generate" / "_done").glob("[0-9]*")):
            first = time.time() - begun
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(line)} ended with exit code {process.returncode}")
    whole = time.time() - begun
    start = 0.0 if driver is None else driver.create_time() - begun
    return Times(start, first or whole, ended or whole, whole)


def main() -> None:
    with head_with_token() as head, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_config(folder)
        client = head.client()
        warm = client.submit_job(entrypoint=f"cd {Path.cwd()} && python -c 'import jobs.pipeline'")
        follow(client, warm, print)
        pairs = []
        for repeat in range(options.repeats):
            job = submitted(head, config, folder / f"job-{repeat}")
            pairs.append((job, directly(head, config, folder / f"direct-{repeat}")))
            print_pair(*pairs[-1])
        over = statistics.median(job.whole - direct.whole for job, direct in pairs)
        first = statistics.median(job.first - direct.first for job, direct in pairs)
        added = statistics.median(job.driver + job.whole - job.driver_ended for job, _ in pairs)
        aim = AIM_SECONDS + AIM_SHARE * statistics.median(direct.whole for _, direct in pairs)
        print(
            f"overhead   first shard {first:+6.1f} s   whole run {over:+6.1f} s   (aim {aim:.1f} s)"
        )
        print(f"a job adds before and after its driver {added:.1f} s")


def print_pair(job: Times, direct: Times) -> None:
    print(f"submitted  first shard {job.first:6.1f} s   whole run {job.whole:6.1f} s", end="   ")
    print(f"driver from {job.driver:.1f} s to {job.driver_ended:.1f} s")
    print(
        f"directly   first shard {direct.first:6.1f} s   whole run {direct.whole:6.1f} s", end="   "
    )
    print(f"load of this machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)


def submitted(head: Head, config: Path, output: Path) -> Times:
    line = [sys.executable, "-m", "jobs", "submit", str(config), f"output={output}"]
    return timed(head, output, [*line, "--address", head.address])


def directly(head: Head, config: Path, output: Path) -> Times:
    line = [sys.executable, "-m", "jobs", "run", str(config), f"output={output}"]
    return timed(head, output, [*line, f"cluster.address=127.0.0.1:{head.port}"])


if __name__ == "__main__":
    main()
