"""What submitting a run as a job costs: time to the first token, and the job's time over a direct run's.

    PYTHONPATH=. python benchmarks/submit.py [--samples 2000] [--repeats 1]

A Ray of one node on this machine, warm: one job has run on it. A tiny random Llama, real vLLM, all stages. First token:
from giving the command until the first shard of samples is committed, the engine's start included, which is most
of it; so the same is measured of the direct run, `python -m jobs run` on the same Ray, and the two are compared.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
output: {folder / "warm"}
cluster: {{workers: 1, cpus_per_worker: 1}}
generate: {{samples: {options.samples}, max_tokens: 64, min_tokens: 64, shard_rows: 20, cpu_kvcache_gib: 1}}
curate: {{sequences: 32, sequence_tokens: 128}}
prune: {{method: wanda}}
"""
    )
    return path


def timed(output: Path, line: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds until the first shard of samples is committed, and until the command has ended."""
    begun = time.monotonic()
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL)
    first = None
    while process.poll() is None:
        if first is None and any((output / "generate" / "_done").glob("[0-9]*")):
            first = time.monotonic() - begun
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(line)} ended with exit code {process.returncode}")
    whole = time.monotonic() - begun
    return whole if first is None else first, whole


def main() -> None:
    with head_with_token() as head, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_config(folder)
        submitted(head, config, folder / "warm", "generate.samples=200")
        pairs = []
        for repeat in range(options.repeats):
            job = submitted(head, config, folder / f"job-{repeat}")
            pairs.append((job, directly(head, config, folder / f"direct-{repeat}")))
        for way, place in (("submitted", 0), ("directly", 1)):
            first = statistics.median(pair[place][0] for pair in pairs)
            whole = statistics.median(pair[place][1] for pair in pairs)
            print(f"{way:<9}  first shard {first:6.1f} s   whole run {whole:6.1f} s")
        over = statistics.median(job[1] - direct[1] for job, direct in pairs)
        first = statistics.median(job[0] - direct[0] for job, direct in pairs)
        aim = AIM_SECONDS + AIM_SHARE * statistics.median(direct[1] for _, direct in pairs)
        print(
            f"overhead   first shard {first:+6.1f} s   whole run {over:+6.1f} s   (aim {aim:.1f} s)"
        )
        print(
            f"load of this machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        )


def submitted(head: Head, config: Path, output: Path, *overrides: str) -> tuple[float, float]:
    line = [sys.executable, "-m", "jobs", "submit", str(config), f"output={output}", *overrides]
    return timed(output, [*line, "--address", head.address], head.environment)


def directly(head: Head, config: Path, output: Path) -> tuple[float, float]:
    line = [sys.executable, "-m", "jobs", "run", str(config), f"output={output}"]
    return timed(output, [*line, f"cluster.address=127.0.0.1:{head.port}"], head.environment)


if __name__ == "__main__":
    main()
