"""Kills engines, workers, nodes and the driver at random, lets the store fail, and compares with an undisturbed run.

    PYTHONPATH=. python benchmarks/chaos.py [--kills 10] [--seeds 0 1 2 3 4] [--stages prune evaluate] [--store s3]

Runs the whole job on a cluster of real raylets on this machine, with a tiny random Llama in float32, real vLLM engines,
and a real S3 server that refuses requests and loses answers (or a disk). Whenever the driver ends too early the same
command is run again, as a user or a job scheduler would do. Prints what was killed and when, how often the driver gave
up by itself, whether samples, pool, checkpoint and perplexities equal those of the undisturbed run bit for bit, the
time that a kill cost, and what was left behind.
"""

import argparse
import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--kills", type=int, default=10, help="kills for every seed")
parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
parser.add_argument("--store", default="s3", choices=["s3", "disk"])
parser.add_argument("--samples", type=int, default=1500)
parser.add_argument("--layers", type=int, default=16)
parser.add_argument(
    "--windows", type=int, default=16, help="windows of held-out text; many make evaluate long"
)
parser.add_argument("--nodes", type=int, default=3, help="with one CPU each; two are asked for")
parser.add_argument("--stages", nargs="+", help="kill only in these; default: in all")
parser.add_argument("--kinds", nargs="+", help="kinds of kills; default: all")
parser.add_argument("--least", type=float, default=5, help="seconds between two kills")
parser.add_argument("--most", type=float, default=30)
parser.add_argument("--keep-log", help="a file for all that the drivers said")
options = parser.parse_args()

ROOT = Path(tempfile.mkdtemp(prefix="chaos-"))
TEMPORARY = ROOT / "tmp"
TEMPORARY.mkdir()
os.environ |= {  # before anything else reads them
    "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "TMPDIR": str(TEMPORARY),
    "RAY_TMPDIR": str(ROOT / "ray"), "PYTHONPATH": ".",
}  # fmt: skip
tempfile.tempdir = None

from tests.chaos import KINDS, STAGES, Chaos, Leaks, command, digest, nodes  # noqa: E402
from tests.servers import Proxy, faulty_proxy, make_bucket, moto, s3_at  # noqa: E402
from tests.tiny import write_tiny_llama  # noqa: E402


def write_config(address: str) -> Path:
    write_tiny_llama(
        ROOT / "model", layers=options.layers, hidden=128, intermediate=320, max_positions=256
    )
    path = ROOT / "config.yaml"
    path.write_text(
        f"""
model: {{path: {ROOT / "model"}}}
output: {ROOT / "run"}
cluster: {{address: "{address}", workers: 2, cpus_per_worker: 1, start_timeout_seconds: 180}}
generate: {{samples: {options.samples}, max_tokens: 128, min_tokens: 128, shard_rows: 50, cpu_kvcache_gib: 1,
  engines: 2, attempts: 10, shard_timeout_seconds: 120}}
curate: {{sequences: 128, sequence_tokens: 128}}
prune: {{method: sparsegpt, batch_sequences: 8, layer_timeout_seconds: 120}}
evaluate: {{perplexity: [{{name: docs, path: python-docs}}], sequences: {options.windows},
  sequence_tokens: 128}}
"""
    )
    return path


@contextlib.contextmanager
def store() -> Iterator[tuple[str, Proxy | None]]:
    """Yields the URL for the runs, and the proxy that can make it fail."""
    if options.store == "disk":
        yield str(ROOT), None
        return
    with moto() as backend, faulty_proxy(backend) as proxy, s3_at(proxy.endpoint):
        make_bucket("chaos")
        yield "s3://chaos", proxy


def main() -> None:
    log = Path(options.keep_log) if options.keep_log else ROOT / "log"
    identical = made = gave_up = 0
    lost = 0.0
    with store() as (base, proxy), nodes(options.nodes) as cluster:
        config = write_config(cluster.address)
        leaks = Leaks(cluster, TEMPORARY)
        begun = time.monotonic()
        with log.open("a") as said:
            line = command(config, f"{base}/undisturbed")
            subprocess.run(line, check=True, stdout=said, stderr=said)
        undisturbed = time.monotonic() - begun
        print(f"undisturbed: {undisturbed:.0f} s", flush=True)
        outputs = [f"{base}/undisturbed"]
        wanted = digest(outputs[0])
        for seed in options.seeds:
            output = f"{base}/seed-{seed}"
            chaos = Chaos(
                cluster, command(config, output), output, log, seed, options.kills,
                (options.least, options.most), proxy,
                options.kinds or KINDS, options.stages or STAGES,
            )  # fmt: skip
            seconds = chaos.run()
            same = digest(output) == wanted
            outputs.append(output)
            kills = len(chaos.strikes)
            identical, made, gave_up = identical + same, made + kills, gave_up + chaos.gave_up
            lost += seconds - undisturbed
            print(
                f"seed {seed}: {kills} kills in {seconds:.0f} s, {'identical' if same else 'DIFFERENT'}, the driver "
                f"gave up {chaos.gave_up} times; {chaos.counts()}",
                flush=True,
            )
        print(f"{identical} of {len(options.seeds)} runs identical after {made} kills in all")
        print(
            f"the driver gave up by itself {gave_up} times; a kill cost {lost / max(1, made):.1f} s"
        )
        print(f"left behind: {leaks.found(outputs) or 'nothing'}")


if __name__ == "__main__":
    main()
