"""The whole run by its command line: real Ray, real vLLM, a random Llama."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibprune.config.model import ClusterSettings
from cluster.session import connect
from tests import chaos
from tests.jobs.command import ENVIRONMENT, calibprune, calibprune_here, done, stop_when
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.timeout(600)
LAYERS = 8
CONFIG = """
model: {{path: {model}, dtype: float32}}
output: {output}
cluster: {{workers: 2, cpus_per_worker: 1}}
generate:
  {{engines: 1, prefixes: {{type: bos}}, samples: 80, max_tokens: 96, min_tokens: 96, shard_rows: 10,
    cpu_kvcache_gib: 1}}
curate: {{sequences: 48, sequence_tokens: 96}}
prune: {{method: {{type: sparsegpt}}, sparsity: 0.5, batch_sequences: 8}}
evaluate:
  perplexity: [{{name: docs, path: python-docs}}]
  sequences: 4
  sequence_tokens: 128
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_tiny_llama(
        folder / "model", layers=LAYERS, hidden=192, intermediate=512, dtype=torch.bfloat16
    )
    return folder


def write_config(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.format(model=folder / "model", output=folder / name))
    return path


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """Makes an undisturbed run of all stages."""
    result = calibprune("run", write_config(folder, "undisturbed"))
    assert result.returncode == 0, result.stderr
    assert "report/index.html" in result.stdout
    assert re.search(r"prune: 9 of 9 layers and rest", result.stderr), result.stderr
    return folder / "undisturbed"


def checkpoint_bytes(run: Path) -> dict[str, bytes]:
    checkpoint = run / "prune" / "checkpoint"
    return {file.name: file.read_bytes() for file in sorted(checkpoint.iterdir())}


def test_the_folder_is_laid_out_as_promised(finished):
    for file in (
        "run.json", "generate/_plan.json", "generate/_done/00007.json", "generate/manifest.json",
        "generate/_SUCCESS", "curate/manifest.json", "curate/_SUCCESS", "prune/_plan.json",
        "prune/_done/layer-00007.json", "prune/checkpoint/config.json", "prune/checkpoint/pruning.json",
        "prune/checkpoint/generation_config.json", "prune/checkpoint/tokenizer.json",
        "prune/checkpoint/model.safetensors.index.json", "prune/_SUCCESS", "evaluate/_SUCCESS",
        "report/index.html", "report/report.json",
    ):  # fmt: skip
        assert (finished / file).exists(), file
    assert len(list((finished / "generate" / "data").glob("part-*.parquet"))) == 8
    assert len(list((finished / "curate" / "data").glob("*.parquet"))) == 1
    assert len(list((finished / "curate" / "dropped").glob("*.parquet"))) == 1
    assert len(list((finished / "prune" / "checkpoint").glob("*.safetensors"))) == LAYERS + 1


def test_the_report_holds_the_numbers_and_the_page_shows_them(finished):
    report = json.loads((finished / "report" / "report.json").read_text())
    perplexity = report["perplexity"]["docs"]
    assert 1 < perplexity["dense"] < 1e4 and 1 < perplexity["pruned"] < 1e4
    assert perplexity["sequence_tokens"] == 128
    assert abs(report["sparsity"] - 0.5) < 1e-3
    assert set(report["stages"]) == {"generate", "curate", "prune", "evaluate", "report"}
    assert all(stage["seconds"] > 0 for stage in report["stages"].values())
    assert report["generate"]["samples"] == 80 and report["curate"]["dropped"] == {"perplexity": 16}
    assert len(report["prune"]["layers"]) == LAYERS and len(report["samples"]) == 3
    assert report["config"]["prune"]["method"]["type"] == "sparsegpt"
    page = (finished / "report" / "index.html").read_text()
    assert f"{perplexity['pruned']:.2f}"[:3] in page
    assert not re.search(r'(src|href)="https?:', page)


def test_the_checkpoint_is_pruned_where_asked_and_nowhere_else(finished, folder):
    before = load_file(folder / "model" / "model.safetensors")
    after = AutoModelForCausalLM.from_pretrained(finished / "prune" / "checkpoint")
    assert after.dtype == torch.bfloat16
    AutoTokenizer.from_pretrained(finished / "prune" / "checkpoint")
    for name, tensor in after.state_dict().items():
        if re.search(r"layers\.\d+\..*_proj\.weight", name):
            assert abs((tensor == 0).float().mean() - 0.5) < 2e-3, name
        else:
            assert torch.equal(tensor, before[name]), name
    assert "sparsity_config" not in (finished / "prune" / "checkpoint" / "config.json").read_text()


@pytest.mark.slow
def test_the_checkpoint_loads_in_vllm(finished):
    code = (
        "import sys\n"
        "from vllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        "    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=64)\n"
        "    out = llm.generate([{'prompt_token_ids': [0, 5]}], SamplingParams(max_tokens=4, temperature=0))\n"
        "    print('TOKENS', list(out[0].outputs[0].token_ids))\n"
    )
    script = finished / "load_in_vllm.py"
    script.write_text(code)
    environment = ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "2"}
    checkpoint = finished / "prune" / "checkpoint"
    result = subprocess.run(
        [sys.executable, script, checkpoint], capture_output=True, text=True, timeout=240, check=False, env=environment
    )  # fmt: skip
    script.unlink()
    assert result.returncode == 0, result.stderr[-3000:]
    tokens = json.loads(result.stdout.split("TOKENS ")[1].splitlines()[0])
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = model.generate(torch.tensor([[0, 5]]), max_new_tokens=4, do_sample=False)[0, 2:]
    assert tokens == expected.tolist()[: len(tokens)] and tokens


def test_engine_driver_and_node_are_killed_and_the_same_command_ends_with_the_same_bytes(
    finished, folder, monkeypatch, tmp_path
):
    config, run, log = write_config(folder, "killed"), folder / "killed", folder / "killed.log"
    temporary = Path(tempfile.mkdtemp())
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("CALIBPRUNE_FAILPOINTS", str(tmp_path))
    hold = tmp_path / "solve-6-0"  # so that pruning does not finish meanwhile
    hold.write_text(str(int(signal.SIGSTOP)))
    with chaos.nodes(2) as cluster:
        leaks = chaos.Leaks(cluster, temporary)

        @contextmanager
        def driver_until(stage: str, units: int) -> Iterator[subprocess.Popen]:
            """Runs the command until that many units of the stage are committed."""
            command = [*chaos.command(config, str(run)), f"cluster.address={cluster.address}"]
            with log.open("a") as said:
                driver = subprocess.Popen(command, stdout=said, stderr=said)
            try:
                wait_for(driver, stage, units)
                yield driver
            finally:
                driver.kill()
                driver.wait()

        def wait_for(driver: subprocess.Popen, stage: str, units: int) -> None:
            while done(run, stage) < units:
                assert not driver.poll(), log.read_text()
                time.sleep(0.01)

        def committed(stage: str) -> dict[str, bytes]:
            return {file.name: file.read_bytes() for file in (run / stage / "_done").iterdir()}

        with driver_until("generate", 1) as driver:
            assert chaos.kill(chaos.ENGINES)
            wait_for(driver, "prune", 3)
            samples = committed("generate")
            cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
            hold.write_text(str(int(signal.SIGSTOP)))
            cluster.add_node(num_cpus=1)
            wait_for(driver, "prune", 5)
        hold.unlink(missing_ok=True)
        killed = time.time()
        layers = committed("prune")
        assert 5 <= len(layers) < LAYERS + 1 and not (run / "prune" / "_SUCCESS").exists()
        with driver_until("evaluate", 1) as driver:
            assert driver.wait(timeout=300) == 0, log.read_text()
        for records, stage in ((samples, "generate"), (layers, "prune")):  # none was made again
            assert records.items() <= committed(stage).items()
        assert chaos.digest(str(run)) == chaos.digest(str(finished))
        assert "unfinished" not in calibprune("status", run).stdout
        assert leaks.found([str(run)], since=killed) == {}


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_stops_cleanly_and_says_how_to_resume(finished, folder, number):
    config, run = write_config(folder, number.name), folder / number.name
    shutil.copytree(finished, run)
    shutil.rmtree(run / "prune")
    code, errors = stop_when(lambda: done(run, "prune") >= 1, number, "run", config)
    assert code == 130
    assert "the same command resumes" in errors and "Traceback" not in errors
    assert "prune     unfinished" in calibprune("status", run).stdout


@pytest.mark.slow
def test_a_sparsity_shared_out_over_layers_is_told_kept_and_reported(finished, folder):
    run = folder / "owl"
    settings = [
        folder / "undisturbed.yaml", f"output={run}", f"prune.pool={finished / 'curate'}",
        "prune.method=ria", "prune.allocation={type: owl, m: 2}", "prune.refine=swaps", "prune.sparsity=0.6",
    ]  # fmt: skip
    result = calibprune("prune", *settings)
    assert result.returncode == 0, result.stderr
    assert "ria and swaps removes 60.00% of the weights, allocated by owl" in result.stderr
    assert re.search(
        r"owl removes 60\.0\d% of the weights, from \d+\.\d% in layer \d", result.stderr
    )
    facts = json.loads((run / "prune" / "checkpoint" / "pruning.json").read_text())
    assert facts["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert facts["allocation"]["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert calibprune("report", *settings).returncode == 0
    page = (run / "report" / "index.html").read_text()
    assert "ria and swaps" in page and "allocated by owl" in page


@pytest.fixture(scope="module")
def joined():
    """Joins a Ray, so that the commands run in this process need not start one each."""
    with connect(ClusterSettings()):
        yield


def test_a_finished_run_does_nothing_again(finished, folder, joined, capsys):
    times = {file: file.stat().st_mtime_ns for file in finished.glob("*/data/*")}
    code, _, errors = calibprune_here(capsys, "run", folder / "undisturbed.yaml")
    assert code == 0, errors
    assert [
        f"{stage}: done already" in errors for stage in ("generate", "curate", "prune", "evaluate")
    ] == [True] * 4
    assert {file: file.stat().st_mtime_ns for file in finished.glob("*/data/*")} == times


def test_a_changed_setting_is_refused_by_name(finished, folder, joined, capsys):
    config = folder / "undisturbed.yaml"
    code, _, errors = calibprune_here(capsys, "run", config, "generate.temperature=0.7")
    assert code == 2 and "generate.temperature was 1.0, now 0.7" in errors
    code, _, errors = calibprune_here(capsys, "prune", config, "prune.sparsity=0.6")
    assert code == 2 and "prune.sparsity was 0.5, now 0.6" in errors


@pytest.mark.slow
def test_a_corrupted_pruned_shard_is_detected_and_named(finished, folder, joined, capsys):
    run = folder / "corrupted"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "evaluate")
    shard = sorted((run / "prune" / "checkpoint").glob("model-layer-00002-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(bytes(data))
    code, _, errors = calibprune_here(capsys, "evaluate", write_config(folder, "corrupted"))
    assert code == 2
    assert f"{shard.name} is damaged" in errors and len(errors.splitlines()) < 6


@pytest.mark.slow
def test_a_killed_pruning_worker_is_replaced_within_the_same_command(finished, folder):
    run = folder / "worker-killed"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "prune")
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", "prune", write_config(folder, "worker-killed")],
        stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    while done(run, "prune") < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    for worker in psutil.process_iter(["name", "cmdline"]):
        if "LayerWorker" in " ".join(worker.info["cmdline"] or ()):
            worker.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "2 of 2 workers at work again" in errors
    assert checkpoint_bytes(run) == checkpoint_bytes(finished)
