"""Runs the Slurm script on one node: Ray's symmetric-run, the run, and the exit codes that follow.

Only `srun` is left out, which on one node would just start the same command. The script runs in process
and network namespaces of its own, since `ray symmetric-run` ends with `ray stop`, which stops every Ray that it sees.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from calibprune.stage import Stage

SCRIPT = Path(__file__).parents[2] / "cluster" / "deploy" / "slurm.sbatch"
BIN = Path(sys.executable).parent
APART = ("unshare", "--pid", "--net", "--fork", "--kill-child", "--mount-proc")
LOOPBACK_UP = """import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 0x1))  # SIOCSIFFLAGS, IFF_UP"""
CONFIG = """
model: {{path: {model}}}
output: {output}
cluster: {{workers: 1, cpus_per_worker: 1}}
curate:
  sources: [{{type: text, name: docs, path: python-docs, documents: 40}}]
  filters: []
  sequences: 4
  sequence_tokens: 64
prune: {{method: wanda, sparsity: 0.5}}
evaluate: {{perplexity: [{{name: docs, path: python-docs}}], sequences: 2, sequence_tokens: 64}}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which(APART[0]) is None
        or subprocess.run([*APART, "true"], capture_output=True, check=False).returncode != 0,
        reason="this user may not make namespaces",
    ),
]


@pytest.fixture
def run(tmp_path, tiny_llama) -> Iterator[tuple[Path, Path]]:
    """Writes a configuration that needs no vLLM; returns it and its output."""
    config, output = tmp_path / "run.yaml", tmp_path / "out"
    config.write_text(CONFIG.format(model=tiny_llama, output=output))
    yield config, output
    shutil.rmtree(ray_folder(), ignore_errors=True)  # the script keeps it after an error


def slurm_job(folder: Path, *arguments: object, before: str = "") -> subprocess.CompletedProcess:
    """Runs the script as Slurm would on one node; `before` runs first, in the same namespaces."""
    text, replaced = re.subn(
        r"^per_node=\(srun .*\)", "per_node=()", SCRIPT.read_text(), flags=re.M
    )
    assert replaced == 1
    script = folder / "slurm.sbatch"
    script.write_text(text)
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "2",
        "HEAD_IP": "127.0.0.1",
        "TRIES": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # the only address here, since the name of this machine means another one
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(SCRIPT.parents[2]),
        "RAY_ADDRESS": "192.0.2.1:6379",  # another user's Ray, which must not be joined
    }
    command = f"python -c '{LOOPBACK_UP}'\n{before}\nbash {script} {' '.join(map(str, arguments))}"
    return subprocess.run(
        [*APART, "bash", "-c", command],
        capture_output=True, text=True, timeout=240, check=False, env=os.environ | slurm,
    )  # fmt: skip


def ray_folder() -> Path:
    return Path(f"/tmp/ray-{os.getpid()}-0")


def test_whole_run_and_nothing_left(run, tmp_path):
    config, output = run
    done = slurm_job(tmp_path, config, output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"done: {output}/report/index.html" in done.stdout
    assert all(Stage(str(output / name)).finished for name in ("curate", "prune", "evaluate"))
    assert not ray_folder().exists()


def test_what_only_the_user_can_mend_is_not_tried_again(run, tmp_path):
    config, output = run
    config.write_text(config.read_text().replace("0.5", "1.5"))
    done = slurm_job(tmp_path, config, output)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "prune.sparsity" in done.stderr
    assert "a retry would not help" in done.stderr


def test_driver_that_dies_fails_the_job(run, tmp_path):
    config, output = run
    lease = output / "_lease.json"
    pid = f'python -c \'import json; print(json.load(open("{lease}"))["pid"])\''
    killer = f"(until kill -KILL $({pid} 2>/dev/null) 2>/dev/null; do sleep 0.2; done) &"
    done = slurm_job(tmp_path, config, output, before=killer)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (
        "the run ended with exit code 247: giving up after 1 tries" in done.stderr
    )  # 256 - SIGKILL
    assert not (output / "report").exists()


def test_ray_that_does_not_start_fails_the_job(run, tmp_path):
    """symmetric-run prints that Ray did not start and ends with 0."""
    config, output = run
    port = 20000 + os.getpid() % 10000
    taken = (
        f"python -c 'import socket, time; s = socket.create_server((\"127.0.0.1\", {port})); time.sleep(200)' &"
        f"until python -c 'import socket; socket.create_connection((\"127.0.0.1\", {port}))' 2>/dev/null; do :; done"
    )
    done = slurm_job(tmp_path, config, output, before=taken)
    assert "Failed to start Ray" in done.stderr, done.stdout + done.stderr
    assert done.returncode == 1
    assert "the run is not finished, though Ray ended with exit code 0: giving up" in done.stderr
    assert not output.exists()
