"""Jobs on a real Ray that wants a token: exit codes, one job a run, a log that survives its connection, no secrets."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibprune.config.load import load_config
from calibprune.errors import UserError
from calibprune.stage import Stage
from cluster.jobs_api import STOPPED, Client, exit_code, follow, reach
from jobs.packing import Tree, source_tree
from jobs.submit import check_paths, metadata
from jobs.submitted import job_name
from tests.jobs.command import calibprune_here
from tests.jobs.head import Head, Line, head_with_token
from tests.servers import Fault, faulty_proxy, free_ports
from tests.tiny import write_tiny_llama

HERE = Path(__file__).parents[2]
PLANTED = "planted-0123456789"
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_with_token() as head:
        yield head


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """Makes a checkout with a version of its own and files with credentials."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in source_tree(HERE).files:  # type: ignore[union-attr]
        if name.split("/")[0] in ("calibprune", "cluster", "jobs"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HERE / name, folder / name)
    (folder / "calibprune" / "__init__.py").write_text('__version__ = "0.0.0+submitted"\n')
    for name in (".env", "credentials.json", "id_rsa", ".netrc", *(f"{n}.pem" for n in range(21))):
        (folder / name).write_text(PLANTED)
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    sequences = [[2 + (7 * row + column) % 250 for column in range(32)] for row in range(4)]
    pq.write_table(pa.table({"token_ids": sequences}), folder / "pool.parquet")
    return folder


def write_config(folder: Path, model: Path, pool: Path, method: str = "magnitude") -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"model: {{path: {model}}}\noutput: {folder / 'out'}\n"
        f"prune: {{method: {method}, pool: {pool}}}\ncluster: {{workers: 1, cpus_per_worker: 1}}\n"
    )
    return path


def command(
    head: Head, where: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "jobs", *map(str, arguments)]
    return subprocess.run(
        line, cwd=where, env=head.environment | environment, capture_output=True, text=True, timeout=240, check=False
    )  # fmt: skip


def _closed_pipe(_: str) -> None:
    raise BrokenPipeError(32, "Broken pipe")


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)


@pytest.mark.slow
def test_two_submits_at_once_start_one_job_which_a_third_follows_to_its_end(
    head, checkout, pool, tiny_llama, tmp_path
):
    config = write_config(tmp_path, tiny_llama, pool)
    line = ("submit", config, "--address", head.address)
    with ThreadPoolExecutor() as both:
        started = list(both.map(lambda _: command(head, checkout, *line, "--no-wait"), range(2)))
    assert [one.returncode for one in started] == [0, 0], started
    assert started[0].stdout == started[1].stdout
    job_id = started[0].stdout.strip()
    assert job_id == job_name(str(tmp_path / "out"))
    assert len(head.client().list_jobs()) == 1

    followed = command(head, checkout, *line)
    assert followed.returncode == 0, followed
    assert "prune: magnitude removes 50.00%" in followed.stdout
    assert str(tmp_path / "out" / "report" / "index.html") in followed.stdout
    assert Stage(str(tmp_path / "out" / "prune")).finished
    assert '"calibprune": "0.0.0+submitted"' in (tmp_path / "out" / "run.json").read_text()

    kept = tmp_path / "token"
    kept.write_text(head.token)
    by_file = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(kept)}
    listed = command(head, checkout, "jobs", RAY_API_SERVER_ADDRESS=head.address, **by_file)
    assert job_id in listed.stdout and "SUCCEEDED  exit 0" in listed.stdout, listed
    assert str(tmp_path / "out") in listed.stdout

    for told in (followed.stdout, followed.stderr, listed.stdout, str(head.client().list_jobs())):
        assert PLANTED not in told and head.token not in told
    for content in head.everything_written():
        assert PLANTED.encode() not in content and head.token.encode() not in content
    assert ".env" in started[0].stderr + started[1].stderr


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr("cluster.jobs_api.POLL_SECONDS", 0.1)


def waits_for(flag: Path) -> str:
    return f"until [ -e {flag} ]; do sleep 0.1; done"


def test_the_exit_code_is_the_drivers_and_that_of_a_stopped_job_is_no_success(head, quick):
    client = head.client()
    codes = {"exit 7": 7, "kill -9 $$": 137, "sleep 100": STOPPED}
    started = {client.submit_job(entrypoint=entry): code for entry, code in codes.items()}
    for job_id, code in started.items():
        if code == STOPPED:
            client.stop_job(job_id)
        assert exit_code(follow(client, job_id, lambda _: None)) == code
    assert STOPPED != 0


def test_a_log_is_shown_once_though_its_connection_is_lost_for_a_while(
    head, quick, caplog, tmp_path
):
    """The connection is lost in the middle of the log, and the job ends meanwhile."""
    caplog.set_level("INFO", "calibprune")
    line, flag, shown = Line(head.dashboard), tmp_path / "flag", []
    entry = f"seq 0 9; {waits_for(flag)}; seq 10 19; exit 3"
    job_id = head.client().submit_job(entrypoint=entry)

    def cut() -> None:
        wait_until(lambda: "\n9\n" in "".join(shown))
        line.cut()
        wait_until(lambda: "the log goes on when it answers" in caplog.text)
        flag.touch()
        wait_until(lambda: head.client().get_job_status(job_id).is_terminal())
        line.mend()

    with ThreadPoolExecutor() as beside:
        cutting = beside.submit(cut)
        job = follow(head.client(line.port), job_id, shown.append)
        cutting.result()
    assert exit_code(job) == 3
    lines = "".join(shown).splitlines()  # Ray's own lines are among them
    assert [int(line) for line in lines if line.isdigit()] == list(range(20))


def test_the_log_of_a_silent_job_is_read_less_often_than_its_state(head, quick, tmp_path):
    flag, shown = tmp_path / "flag", []
    with faulty_proxy(head.address) as proxy:
        job_id = head.client().submit_job(entrypoint=f"echo begun; {waits_for(flag)}; echo over")

        def count(part: str) -> int:
            return proxy.count("GET", f"/api/jobs/{job_id}{part}")

        with ThreadPoolExecutor() as beside:
            client = head.client(int(proxy.endpoint.rsplit(":", 1)[1]))
            following = beside.submit(follow, client, job_id, shown.append)
            wait_until(lambda: "begun" in "".join(shown) and count("") >= 60)
            flag.touch()
            following.result()
        assert count("/logs") < count("") / 3  # which counts both
    assert "".join(shown).endswith("over\n")


def test_a_proxy_whose_cluster_is_away_for_a_moment_ends_nothing(head, quick, tmp_path):
    """Its "not found" does not mean either that the job is gone."""
    with faulty_proxy(head.address) as proxy:
        client = head.client(int(proxy.endpoint.rsplit(":", 1)[1]))
        output = f"output={tmp_path}/plain"
        entry = f"echo begun; sleep 1000; : python -m jobs run x.yaml {output}"
        job_id = client.submit_job(entrypoint=entry)
        with pytest.raises(BrokenPipeError):  # the reader of the log is gone, not the cluster
            follow(head.client(), job_id, _closed_pipe)
        job = f"/api/jobs/{job_id}"
        proxy.faults += [Fault("GET", job, 1, code) for code in (502, 500, 404, None)]
        proxy.faults += [Fault("GET", f"{job}/logs", 1, code) for code in (500, 404)]
        with ThreadPoolExecutor() as beside:
            shown: list[str] = []
            following = beside.submit(follow, client, job_id, shown.append)
            wait_until(lambda: not any(fault.times for fault in proxy.faults))
            faults = [Fault("GET", "/api/version", 1, 503), Fault("GET", "/api/jobs/", 1, 502)]
            proxy.faults[:] = [*faults, Fault("POST", "/stop", 1, 504)]
            done = command(head, HERE, "stop", tmp_path / "plain", "--address", proxy.endpoint)
            assert done.returncode == 0 and "is stopped" in done.stdout, done
            assert exit_code(following.result()) == STOPPED and "begun" in "".join(shown)
        with pytest.raises(UserError, match="knows no job nosuch"):
            client.job("nosuch")


def test_a_job_whose_log_is_gone_ends_with_its_exit_code(head, quick, caplog, monkeypatch):
    caplog.set_level("INFO", "calibprune")
    monkeypatch.setattr("cluster.jobs_api.LOG_SECONDS", 1.0)
    with faulty_proxy(head.address) as proxy:
        client = head.client(int(proxy.endpoint.rsplit(":", 1)[1]))
        job_id = client.submit_job(entrypoint="exit 7")
        proxy.faults.append(Fault("GET", "/logs", 10**6, 500))
        assert exit_code(follow(client, job_id, lambda _: None)) == 7
    assert "the end of the log is missing" in caplog.text


def test_a_job_server_that_fails_for_long_is_not_the_users_fault(head, pool, tiny_llama, tmp_path):
    config = write_config(tmp_path, tiny_llama, pool)
    soon = (
        "import cluster.jobs_api; cluster.jobs_api.PATIENCE_SECONDS = 1\n"
        "from jobs.__main__ import main; main()"
    )
    with faulty_proxy(head.address) as proxy:
        for method, code in (("GET", 503), ("POST", 500)):
            proxy.faults[:] = [Fault(method, "/api/jobs/", 10**6, code)]
            line = [sys.executable, "-c", soon, "submit", config, "--address", proxy.endpoint]
            done = subprocess.run(
                line, cwd=HERE, env=head.environment, capture_output=True, text=True, timeout=240, check=False
            )  # fmt: skip
            assert done.returncode == 1, done
            assert f"answers {code}" in done.stderr.strip().splitlines()[-1]
    assert not [job for job in head.client().list_jobs() if str(tmp_path) in str(job.metadata)]


def test_a_running_job_is_followed_with_its_own_settings_alone(head, pool, tiny_llama, tmp_path):
    path = write_config(tmp_path, tiny_llama, pool)
    config = load_config(str(path), ["prune.sparsity=0.5"])
    job_id = head.client().submit_job(
        entrypoint="sleep 1000",
        submission_id=job_name(config.output),
        metadata=metadata(config, str(path), ["prune.sparsity=0.5"]),
    )
    line = ("submit", path, "--no-wait", "--address", head.address)
    same = (*line, "cluster.address=1.2.3.4:6379", f"output={config.output}/", "prune.sparsity=0.5")
    same = command(head, HERE, *same)
    assert same.returncode == 0 and same.stdout.strip() == job_id, same
    assert f"job {job_id} has been working on this run for" in same.stderr

    others = ("prune.sparsity=0.6", "prune.method=wanda")
    for count, told in (
        (1, "settings: prune.sparsity is 0.5 there, 0.6 here; stop it first"),
        (2, 'prune.method.type is "magnitude" there, "wanda" here, prune.sparsity is'),
    ):
        refused = command(head, HERE, *line, *others[:count])
        assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1, refused
        assert told in refused.stderr and f"`calibprune stop {job_id} --address" in refused.stderr
    more = ("evaluate.sequences=3", "generate.samples=7", "curate.sequences=4")
    assert "and 2 more; stop it first" in command(head, HERE, *line, *others, *more).stderr
    head.client().stop_job(job_id)


def test_a_job_whose_answer_was_lost_is_found_and_what_stayed_is_named(
    head, checkout, pool, tiny_llama, tmp_path
):
    path = write_config(tmp_path, tiny_llama, pool)
    with faulty_proxy(head.address) as proxy:
        proxy.faults.append(Fault("POST", "/api/jobs/", 1))
        done = command(head, checkout, "submit", path, "--no-wait", "--address", proxy.endpoint)
        assert done.returncode == 0, done
        assert done.stdout.strip() == job_name(str(tmp_path / "out"))
        assert proxy.count("POST", "/api/jobs/") == 1
    assert "25 files are not sent" in done.stderr and "and 5 more" in done.stderr
    assert all(name in done.stderr for name in (".env", ".netrc", "0.pem", "7.pem"))
    stopped = command(head, checkout, "stop", tmp_path / "out", "--address", head.address)
    assert stopped.returncode == 0, stopped


def test_importing_changes_no_log_level():
    code = (
        "import logging, ray.job_submission\n"
        "def levels(): return {n: logging.getLogger(n).level for n in list(logging.root.manager.loggerDict)}\n"
        "before = levels()\nimport cluster.jobs_api, jobs.submit\nafter = levels()\n"
        "assert before == {name: after[name] for name in before}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_a_token_or_with_a_wrong_one_the_error_says_what_to_set(head, tmp_path):
    nobody = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}
    refused = command(head, HERE, "jobs", "--address", head.address, **nobody)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
    assert "requires a token: set RAY_AUTH_MODE=token" in refused.stderr
    with pytest.raises(UserError, match="refuses the token"):
        Client(head.address, headers={"Authorization": f"Bearer {'x' * 64}"})


def test_an_address_that_is_no_job_server_is_refused_in_one_line(head, monkeypatch):
    (nobody,) = free_ports(1)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # so that what is set below goes afterwards
    for address, told in (
        (f"http://127.0.0.1:{nobody}", "connection refused"),
        (f"127.0.0.1:{head.port}", "does not speak HTTP"),
        ("nosuch://head:1", "is not a Ray job server"),
        (None, "--address http://HEAD:8265"),
    ):
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(UserError, match=told) as refused:
            reach(address)
        assert "\n" not in str(refused.value)


def test_a_bad_configuration_is_refused_before_the_cluster_is_asked(capsys, tmp_path):
    path = write_config(tmp_path, tmp_path, tmp_path)
    for override, told in (
        ("prune.sparsty=0.5", "did you mean sparsity?"),
        ("output=runs/a", "output runs/a would be lost"),
    ):
        line = ("submit", path, override, "--address", "http://127.0.0.1:1")
        code, _, errors = calibprune_here(capsys, *line)
        assert code == 2 and told in errors and len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("output=runs/a", "output=/"),
        ("output=~/runs/a", "would be lost"),
        ("output=file://runs/a", "would be lost"),
        ("output=memory://a", "would be lost"),
        ("output=hf://datasets/a/b", "cannot live on the Hugging Face hub"),
        ("model.path=weights", "model.path=/"),
        ("evaluate.perplexity=[{name: a, path: texts/held-out.txt}]", "evaluate.perplexity.0.path"),
    ],
)
def test_paths_that_mean_nothing_on_a_cluster_are_refused(tmp_path, monkeypatch, override, told):
    monkeypatch.chdir(tmp_path)
    for name in ("weights/model.safetensors", "texts/held-out.txt", "texts/prompts.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    path = write_config(tmp_path, tmp_path / "nowhere", tmp_path / "nowhere")
    tree = Tree(tmp_path, ("texts/prompts.txt",))
    with pytest.raises(UserError, match=told):
        check_paths(load_config(str(path), [override]), tree)
    travels = (
        "evaluate.perplexity=[{name: a, path: texts/prompts.txt}, {name: b, path: python-docs}]"
    )
    for fine in ("output=s3://bucket/a", "output=/shared/a", "model.path=org/name", travels):
        check_paths(load_config(str(path), [fine]), tree)


def test_what_everybody_can_read_of_a_job_holds_no_credential(tmp_path):
    config = load_config(str(write_config(tmp_path, tmp_path, tmp_path)), [])
    for path in (
        "https://bucket.host/run.yaml?X-Amz-Credential=AK&X-Amz-Signature=" + PLANTED,
        f"https://me:{PLANTED}@bucket.host/run.yaml",
    ):
        overrides = [f"output=s3://u:{PLANTED}@h/x", "output=s3://b/x", "prune.sparsity=0.6"]
        told = metadata(config, path, overrides)
        assert PLANTED not in str(told) and told["config"] == "run.yaml"
        assert told["command"].startswith("calibprune submit https://bucket.host/run.yaml 'output=")
        assert told["command"].endswith(" output=s3://b/x prune.sparsity=0.6")


def test_a_run_has_one_name_however_its_url_is_written():
    for same in (
        (
            "/data/run",
            "/data/run/",
            "/data//run",
            "//data/run",
            "file:///data/run",
            "/data/x/../run",
        ),
        ("s3://bucket/run", "s3a://bucket/run/"),
        ("gs://bucket/run", "gcs://bucket/run"),
    ):
        assert len({job_name(url) for url in same}) == 1
    urls = (
        "/data/run",
        "s3://data/run",
        "gs://data/run",
        "/data/run2",
        "/other/run",
        "s3://b/Ü n/x",
    )
    assert len({job_name(url) for url in urls}) == len(urls)
    assert all(name.replace("-", "").isalnum() and name.isascii() for name in map(job_name, urls))


@pytest.fixture(scope="module")
def slow_config(tmp_path_factory, pool) -> Path:
    """Writes a run whose pruning takes some tens of seconds."""
    folder = tmp_path_factory.mktemp("slow")
    model = write_tiny_llama(folder / "model", layers=60, hidden=256, intermediate=640)
    return write_config(folder, model, pool, "sparsegpt")


@pytest.mark.slow
def test_a_stopped_job_resumes_at_once_under_the_next_name(head, slow_config):
    done = slow_config.parent / "out" / "prune" / "_done"
    at = ("--address", head.address)
    line = [sys.executable, "-m", "jobs", "submit", str(slow_config), *at]
    detaching = subprocess.Popen(line, env=head.environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: done.is_dir() and len(list(done.iterdir())) > 1)
    detaching.send_signal(signal.SIGINT)
    _, told = detaching.communicate(timeout=30)
    assert detaching.returncode == 130 and "goes on" in told and "calibprune stop" in told
    with ThreadPoolExecutor() as beside:
        following = beside.submit(command, head, HERE, "submit", slow_config, *at)
        wait_until(lambda: len(list(done.iterdir())) > 5)
        stopped = command(head, HERE, "stop", slow_config.parent / "out", *at)
        followed = following.result()
    assert stopped.returncode == 0 and f"calibprune submit {slow_config}" in stopped.stdout
    assert followed.returncode == STOPPED
    assert "stopped; what is committed is kept" in followed.stdout  # by the driver, within 3 s
    assert not (slow_config.parent / "out" / "_lease.json").exists()
    wait_until(lambda: not head.processes("ray::LayerWorker"), 20)

    resumed = command(head, HERE, "submit", slow_config, *at)
    assert resumed.returncode == 0, resumed
    assert f"job {job_name(str(slow_config.parent / 'out'))}-2 on" in resumed.stderr
    assert "layers and rest done already" in resumed.stdout
    assert "taking over" not in resumed.stdout


@pytest.mark.slow
def test_a_driver_that_is_killed_shows_in_the_exit_code_and_its_lease_is_not_in_the_way(
    head, slow_config
):
    output = slow_config.parent / "killed"
    line = ("submit", slow_config, f"output={output}", "--address", head.address)
    with ThreadPoolExecutor() as beside:
        following = beside.submit(command, head, HERE, *line)
        wait_until(lambda: len(list((output / "prune").glob("_done/*"))) > 5)
        for driver in head.processes("python -m jobs run"):
            driver.kill()
        assert following.result().returncode == 137
    resumed = command(head, HERE, *line)
    assert resumed.returncode == 0, resumed
    assert "taking over" not in resumed.stdout


@pytest.mark.slow
def test_rays_own_command_submits_a_run_too(head, pool, tiny_llama, tmp_path):
    config = write_config(tmp_path, tiny_llama, pool)
    ray = [Path(sys.executable).parent / "ray", "job", "submit", "--address", head.address]
    line = [*ray, "--working-dir", ".", "--", "python", "-m", "jobs", "run", config]
    done = subprocess.run(
        line, cwd=HERE, env=head.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    assert Stage(str(tmp_path / "out" / "prune")).finished
    assert "-m jobs run" in command(head, HERE, "jobs", "--address", head.address).stdout
