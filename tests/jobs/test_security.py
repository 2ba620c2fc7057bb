"""A run writes and prints no secret, leaves nothing outside its folder, and opens no way in through its Ray."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import EndpointConnectionError

from calibprune import storage
from calibprune.config.load import load_config
from calibprune.errors import UserError
from tests.jobs.command import ENVIRONMENT, calibprune, calibprune_here
from tests.servers import Fault, faulty_proxy, moto, s3_at

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "tester-secret-wJalrXUtnFEMI",
    "AWS_SESSION_TOKEN": "session-FwoGZXIvYXdzEBYaDG",
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlanted",
    "RAY_AUTH_TOKEN": "ray-0123456789abcdef0123456789abcdef",
    "WANDB_API_KEY": "wandb-9876543210fedcba",
}
USER, PASSWORD = "endpoint-user", "endpoint-pa55word"
CONFIG = """
model: {{path: {model}}}
output: {output}
cluster: {{workers: 2, cpus_per_worker: 1}}
prune: {{method: magnitude, batch_sequences: 2, pool: {pool}}}
evaluate: {{perplexity: [], sequence_tokens: 32}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_llama):
    """Writes a run that needs no vLLM; the command gives its output."""
    folder = tmp_path_factory.mktemp("security")
    (folder / "pool").mkdir()
    tokens = [[(7 * i + j) % 200 + 2 for j in range(32)] for i in range(4)]
    pq.write_table(pa.table({"token_ids": tokens}), folder / "pool" / "a.parquet")
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(model=tiny_llama, output=folder / "out", pool=folder / "pool"))
    return path


def check_clean(*texts: str | bytes) -> None:
    """Checks that no text has a planted secret or the signature of an address."""
    for text in texts:
        data = text if isinstance(text, bytes) else text.encode()
        for secret in (*PLANTED.values(), PASSWORD, "X-Amz-Signature=abc"):
            assert secret.encode() not in data, (secret, data[:2000])


def watched(arguments, environment):
    """Runs a command; returns it, and the addresses its processes listened on, with the processes' names."""
    command = [sys.executable, "-m", "jobs", *map(str, arguments)]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    listening: dict[tuple[str, str], None] = {}
    while True:
        try:
            out, errors = process.communicate(timeout=0.1)
        except subprocess.TimeoutExpired:
            for one in psutil.Process(process.pid).children(recursive=True):
                try:
                    if "LayerWorker" not in one.name():
                        continue
                    for found in one.net_connections("inet"):
                        if found.status == psutil.CONN_LISTEN:
                            listening[one.name(), found.laddr.ip] = None
                except psutil.Error:
                    continue
        else:
            return subprocess.CompletedProcess(command, process.returncode, out, errors), listening


@pytest.fixture(scope="module")
def finished(config):
    """Makes a whole run on an S3 server, with secrets in many variables of the environment."""
    scratch = Path(tempfile.mkdtemp(prefix="sec-"))  # a short path, since sockets will be in it
    with moto() as endpoint, s3_at(endpoint):
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("runs")
        environment = ENVIRONMENT | PLANTED | {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "tester", "AWS_DEFAULT_REGION": "us-east-1",
            "TMPDIR": str(scratch),  "PYTHONPATH": str(Path.cwd()),
        }  # fmt: skip
        environment = {
            k: v
            for k, v in environment.items()
            if k not in ("RAY_TMPDIR", "RAY_ADDRESS", "RAY_AUTH_MODE")
        }
        done, listening = watched(["run", config, "output=s3://runs/one"], environment)
        files = storage.tree("s3://runs/one")
        contents = {name: storage.read_bytes(f"s3://runs/one/{name}") for name in files}
        yield done, listening, contents, scratch
    shutil.rmtree(scratch)


def test_no_secret_is_in_a_run_or_in_what_it_says(finished):
    done, _, contents, _ = finished
    assert done.returncode == 0, done.stderr
    assert {
        "run.json",
        "report/index.html",
        "prune/manifest.json",
        "prune/checkpoint/pruning.json",
    } <= contents.keys()
    check_clean(done.stdout, done.stderr, *contents.values())


def test_a_run_leaves_nothing_in_the_temporary_folder(finished):
    _, _, _, scratch = finished
    assert [path.name for path in scratch.iterdir()] == []


def test_workers_of_one_machine_meet_on_loopback(finished):
    _, listening, _, _ = finished
    workers = {address for name, address in listening if "LayerWorker" in name}
    assert "127.0.0.1" in workers


@pytest.mark.slow
def test_our_own_ray_lets_nobody_in_without_its_token(tmp_path):
    """Ray listens on every interface, whatever its settings; only its token keeps others out."""
    code = """
import os, subprocess, sys
from pathlib import Path
from calibprune.config import ClusterSettings
from cluster.session import connect
import ray
with connect(ClusterSettings()):
    folder = ray._private.worker._global_node.get_temp_dir_path()
    assert os.stat(os.path.dirname(folder)).st_mode & 0o077 == 0, folder
    assert (Path.home() / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    stranger = "import ray; ray.init(address=%r, log_to_driver=False, logging_level='ERROR'); print('in')"
    stranger %= ray.get_runtime_context().gcs_address
    token = (Path.home() / ".ray" / "auth_token").read_text()
    for given in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64},
                  {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}):
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": "/nonexistent"} | given
        try:
            done = subprocess.run([sys.executable, "-c", stranger], env=env, capture_output=True, text=True, timeout=20)
            print("in" if "in" in done.stdout.split() else "out", end=" ")
        except subprocess.TimeoutExpired:
            print("out", end=" ")
"""
    left_out = ("RAY_TMPDIR", "RAY_ADDRESS", "RAY_AUTH_MODE")
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in left_out} | {
        "HOME": str(tmp_path)
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.stdout == "out out in ", done.stdout + done.stderr


@pytest.mark.parametrize("traceback", [False, True])
def test_a_librarys_error_tells_no_secret(capsys, monkeypatch, traceback):
    """Tries botocore's own message, also as one of the causes in a traceback."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CALIBPRUNE_TRACEBACK", "1" if traceback else "")
    address = f"http://{USER}:{PASSWORD}@host:9/b/k?X-Amz-Signature=abc&X-Amz-Security-Token=x"

    def fail(url):
        try:
            raise EndpointConnectionError(endpoint_url=address)
        except EndpointConnectionError as error:
            raise RuntimeError(f"{error}\n{' '.join(PLANTED.values())}") from error

    monkeypatch.setattr("jobs.status.describe", fail)
    code, out, errors = calibprune_here(capsys, "status", "s3://runs/one")
    assert code == 1 and "http://***@host:9/b/k?X-Amz-Signature=***" in errors
    assert traceback == (len(errors.strip().splitlines()) > 1)
    check_clean(out, errors)


@pytest.mark.parametrize("traceback", [False, True])
def test_a_signed_address_that_is_refused_is_not_repeated(capsys, tmp_path, monkeypatch, traceback):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    if traceback:
        monkeypatch.setenv("CALIBPRUNE_TRACEBACK", "1")
    with moto() as backend, faulty_proxy(backend) as proxy:
        proxy.faults.append(Fault("GET", "/secret", 9, 400))
        proxy.faults.append(Fault("HEAD", "/secret", 9, 400))
        signed = (
            f"{proxy.endpoint}/secret/run?X-Amz-Signature=abc{PLANTED['AWS_SECRET_ACCESS_KEY']}"
        )
        for command in (
            ["status", signed],
            ["run", signed],
            ["publish", signed, "curate", str(tmp_path / "t")],
        ):
            code, out, errors = calibprune_here(capsys, *command)
            assert code in (1, 2) and errors
            check_clean(out, errors)


@pytest.mark.parametrize(
    "override",
    [
        "output=simplecache::s3://AKIA123:hunter2-hunter2@bucket/run",
        "model.path=https://host/model?X-Amz-Signature=hunter2-hunter2",
        "model.path=abfs://box/model?sig=hunter2-hunter2",
        "cluster.address=ray://me:hunter2-hunter2@head:10001",
        "prune.pool=zip://a::https://me:hunter2-hunter2@host/pool.zip",
        "generate.prefixes={type: prompts, path: a.jsonl, system: 'call with Bearer hunter2-hunter2-hunter2'}",
        "generate.prefixes={type: prompts, path: a.jsonl, system: hf_hunter2hunter2hunter2hunter2}",
        "generate.prefixes={type: prompts, path: a.jsonl, system: my-secret-hunter2}",
        "evaluate.perplexity=[{name: a, path: b.txt, dataset_name: my-secret-hunter2}]",
    ],
)
def test_credentials_have_no_place_in_a_configuration(config, monkeypatch, override):
    monkeypatch.setenv("SERVICE_PASSWORD", "my-secret-hunter2")
    with pytest.raises(UserError, match="must not hold credentials") as error:
        load_config(str(config), [override])
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:AWS_SECRET_ACCESS_KEY}",
        "s3://evil/${oc.env:HOME}/run",
        "${oc.${curate.pack}:HOME}",
        "${oc.decode:${oc.env:HOME}}",
        "${oc.env:HOME,/tmp}",
        "${ oc.env:HOME }",
    ],
)
def test_a_configuration_reads_nothing_from_the_environment(tmp_path, config, monkeypatch, text):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-planted")
    file = tmp_path / "evil.yaml"
    file.write_text(f"model: {{path: m}}\noutput: '{text}'\n")
    for arguments in ((str(file),), (str(config), [f"output={text}"])):
        with pytest.raises(UserError, match="not replaced here") as error:
            load_config(*arguments)
        assert "planted" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "model: !!python/object/apply:os.system ['touch {mark}']\noutput: x\n",
        "!!python/module:os\n",
        "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\n"
        "d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d]\n"
        "f: &f [*e, *e, *e, *e, *e, *e, *e, *e, *e]\ng: [*f, *f, *f, *f, *f, *f, *f, *f, *f]\n",
        "a: &a [*a]\n",
        "[" * 5000,
        "model: {{path: m}}\noutput: o\npreset: ../../../etc/passwd\n",
        "model: {{path: m}}\noutput: o\npreset: /etc/passwd\n",
        "model: {{path: m}}\noutput: o\ndefaults: [/etc/passwd]\n",
        "model: {{path: m}}\noutput: o\nevaluate: {{perplexity: [{{name: ../../x, path: a.txt}}]}}\n",
        'model: {{path: m}}\noutput: o\nevaluate: {{perplexity: [{{name: "a\\n", path: a.txt}}]}}\n',
        "model: {{path: m}}\noutput: o\ncurate: {{sources: [{{type: text, name: ../../x, path: a.txt}}]}}\n",
        "model: {{path: m}}\noutput: o\ncurate: {{references: [{{name: a/b, path: a.txt}}]}}\n",
    ],
)
def test_a_strangers_configuration_is_refused_in_one_line(capsys, tmp_path, content):
    path = tmp_path / "evil.yaml"
    path.write_text(
        content.replace("{mark}", str(tmp_path / "mark")).replace("{{", "{").replace("}}", "}")
    )
    code, _, errors = calibprune_here(capsys, "check", path)
    assert code == 2 and len(errors.strip().splitlines()) == 1 and errors.isprintable() is False
    assert not (tmp_path / "mark").exists() and len(errors) < 1000


def test_names_cannot_steer_the_terminal(capsys, config, tmp_path):
    evil = tmp_path / "a\x1b[2J\x1b]0;owned\x07\nerror: fine\u202e.txt"
    code, _, errors = calibprune_here(
        capsys, "check", config, f"evaluate.perplexity=[{{name: a, path: {str(evil)!r}}}]"
    )
    assert code == 2 and len(errors.strip().splitlines()) == 1
    assert (
        "\x1b" not in errors
        and "\x07" not in errors
        and "\u202e" not in errors
        and "\\x1b" in errors
    )


@pytest.mark.slow
def test_a_pool_of_another_vocabulary_is_refused(config, tmp_path):
    """On a GPU such an index ends the process; on any device the pool is not this model's."""
    pq.write_table(pa.table({"token_ids": [[5, 10**6], [1, 2]]}), tmp_path / "a.parquet")
    done = calibprune(
        "prune", config, f"prune.pool={tmp_path}", f"output={tmp_path}/out", "cluster.workers=1"
    )
    assert (
        done.returncode == 2
        and "holds token ids from 1 to 1000000, the model has 258" in done.stderr
    )


def test_an_address_file_of_somebody_else_is_not_followed(tmp_path, monkeypatch):
    from calibprune.config.model import ClusterSettings
    from cluster.session import _own_ray

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("203.0.113.1:6379")
    assert _own_ray(ClusterSettings()) == {}
    if os.getuid():
        pytest.skip("only root can make a file somebody else's")
    os.chown(tmp_path / "ray" / "ray_current_cluster", 12345, 12345)
    started = _own_ray(ClusterSettings())
    assert (
        started["address"] == "local"
        and Path(started["_temp_dir"]).parent.stat().st_mode & 0o777 == 0o700
    )
