"""The command line's help, and bad input: one clear line, exit code 2, nothing half-written."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from calibprune import storage
from calibprune.config.load import load_config
from jobs.run import Run
from tests.jobs.command import calibprune, calibprune_here
from tests.servers import s3_at, s3_server

BASE = """
model: {{path: {model}}}
output: {output}
generate: {{samples: 20, max_tokens: 64}}
curate: {{sequences: 4, sequence_tokens: 64}}
evaluate: {{perplexity: [{{name: docs, path: python-docs}}], sequences: 2, sequence_tokens: 64}}
"""


@pytest.fixture
def config(tmp_path, tiny_llama):
    path = tmp_path / "run.yaml"
    path.write_text(BASE.format(model=tiny_llama, output=tmp_path / "out"))
    return path


def test_help_teaches_and_answers_at_once():
    result = calibprune("--help")
    assert result.returncode == 0
    heavy = "import sys, jobs.__main__; print({'torch', 'ray', 'pydantic'} & sys.modules.keys())"
    imported = subprocess.run(
        [sys.executable, "-c", heavy], capture_output=True, text=True, check=True
    )
    assert imported.stdout.strip() == "set()"
    for word in ("generate", "curate", "prune", "evaluate", "report", "check", "status", "resumes"):
        assert word in result.stdout
    assert result.stdout.index("calibprune demo-model") < result.stdout.index("calibprune check")
    assert "key.path=value" in calibprune("run", "--help").stdout


def test_version():
    assert calibprune("--version").stdout.startswith("calibprune 0.")


def test_check_says_what_a_run_will_need_and_writes_nothing(capsys, config, tmp_path):
    code, out, errors = calibprune_here(capsys, "check", config)
    assert code == 0, errors
    assert "worker memory" in out and "the configuration is fine" in out
    assert sorted(path.name for path in tmp_path.iterdir()) in (["run.yaml"], ["out", "run.yaml"])
    assert not list(tmp_path.glob("out/*"))


def test_a_file_that_ends_too_early_is_named(capsys, config, monkeypatch):
    """Typer takes an EOFError for the end of a user's input and prints "Aborted."."""

    def read(*arguments):
        raise EOFError("model.safetensors: bytes 8 to 16 were asked for, 2 came")

    monkeypatch.setattr("calibprune.config.load.load_config", read)
    code, _, errors = calibprune_here(capsys, "check", config)
    assert code == 1 and "failed: OSError: a file ends too early: model.safetensors: " in errors
    assert "Aborted" not in errors and len(errors.strip().splitlines()) == 1


def test_a_tokenizer_of_another_model_is_refused(capsys, config, tmp_path, tiny_llama):
    model = shutil.copytree(tiny_llama, tmp_path / "smaller")
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"vocab_size": 200}))
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:200].contiguous()
    save_file(tensors, model / "model.safetensors")
    code, _, errors = calibprune_here(capsys, "check", config, f"model.path={model}")
    assert code == 2 and "its tokenizer gives token ids up to 257" in errors, errors
    own = ["prune.pool=/no/pool", "evaluate.perplexity=[]"]  # no text is read with it
    _, _, errors = calibprune_here(capsys, "check", config, f"model.path={model}", *own)
    assert "tokenizer" not in errors and "/no/pool" in errors


def test_truncated_weights_are_refused_before_work_starts(capsys, config, tmp_path, tiny_llama):
    model = shutil.copytree(tiny_llama, tmp_path / "cut")
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-100])
    code, _, errors = calibprune_here(capsys, "check", config, f"model.path={model}")
    assert code == 2 and "model.safetensors is damaged: it has" in errors, errors
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "label"),
    [([], "worker memory"), (["cluster.gpus_per_worker=1"], "worker GPU memory")],
)
def test_check_tells_sizes_alike_and_the_memory_where_it_is_needed(
    capsys, config, overrides, label
):
    odd = ["prune.allocation={type: list, sparsities: [0.97, 0.97, 0.97]}"]
    code, out, errors = calibprune_here(capsys, "check", config, *overrides, *odd)
    told = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line.strip())
    assert code == 0, errors
    assert told["sparsity of prunable"].strip() == "0.9702"
    assert told["pruned checkpoint"].split() == told["checkpoint"].split()
    assert "not all held at the same time" in told[label]


def test_check_notes_that_nothing_will_be_measured(capsys, config):
    for texts, noted in (([], False), (["evaluate.perplexity=[]"], True)):
        code, _, errors = calibprune_here(capsys, "check", "--local", config, *texts)
        assert code == 0 and noted == ("note: evaluate.perplexity names no text" in errors)


def test_a_worker_that_does_not_fit_this_machine_is_told_what_takes_most(
    capsys, config, monkeypatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("jobs.check.os.sysconf", lambda name: 1)
    large = ["generate.samples=1000", "curate.sequences=400", "evaluate.perplexity=[]"]
    told = {
        batch: calibprune_here(
            capsys, "check", "--local", config, *large, f"prune.batch_sequences={batch}"
        )[2]
        for batch in (1, 400)
    }
    assert "of this machine" in told[1] and "lower curate.sequences" in told[1]
    assert "lower prune.batch_sequences" in told[400]
    for elsewhere in ("cluster.gpus_per_worker=1", "cluster.address=127.0.0.1:1"):
        _, _, errors = calibprune_here(
            capsys, "check", "--local", config, elsewhere, "evaluate.perplexity=[]"
        )
        assert "of this machine" not in errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=/no/such/folder"], "there is no model at /no/such/folder"),
        (["model.path=models/nosuch"], "there is no folder models/nosuch here, so it was taken"),
        (["prune.sparsity=1.2"], "prune.sparsity: Input should be less than 1"),
        (["prune.pattern=4:2"], 'pattern "4:2"'),
        (["prune.pattern=3:7"], "multiple of 7"),
        (["prune.pattern=32:64"], "leave it dense with prune.keep='[mlp\\.down_proj]'"),
        (["prune.method={type: sparsegpt, blocksize: 130}", "prune.pattern=2:4"], "blocksize 130"),
        (["curate.sequence_tokens=1024", "generate.max_tokens=400"], "context is 512 tokens"),
        (["generate.max_tokens=512"], "generate.max_tokens with its prefix is 513"),
        (["evaluate.sequence_tokens=600"], "evaluate.sequence_tokens is 600"),
        (["curate.sequences=1000"], "raise generate.samples"),
        (
            ["curate.filters=[{type: length, min_tokens: 66}]"],
            "curate.filters.0 drops every sample of self-generated: its min_tokens is 66, and none has more than 65",
        ),
        (["evaluate.sequences=1000000"], "held-out text docs has"),
        (["evaluate.perplexity=[{name: a, path: /no/text.txt}]"], "/no/text.txt"),
        (["generate.prefixes={type: dataset, path: /no/text.txt}"], "/no/text.txt"),
        (["curate.references=[{name: a, path: /no/text.txt}]"], "/no/text.txt"),
        (
            [
                "curate.sources=[{type: text, name: docs, path: python-docs}]",
                "curate.sequence_tokens=512",
                "curate.sequences=1",
            ],
            "documents of source docs with one token more (curate.sources' document_tokens) is 513",
        ),
        (["prune.pool=/no/pool"], "/no/pool"),
        (
            ["curate.sources=[{type: generated, path: /no/where}]"],
            "there are no finished samples at /no/where: give the `generate` folder of a finished run",
        ),
        (
            ["prune.method=sparsgpt"],
            "prune.method: there is no 'sparsgpt': did you mean sparsegpt?",
        ),
        (["prune.allocation={type: owl, lambda: 1}"], "unknown key prune.allocation.lambda"),
        (["prune.allocation={type: list, sparsities: [0.5]}"], "has 1 entries, the model"),
    ],
)
def test_bad_input_is_told_in_one_line(capsys, config, tmp_path, overrides, message):
    code, _, errors = calibprune_here(capsys, "run", config, *overrides)
    assert code == 2, errors
    assert message in errors and len(errors.strip().splitlines()) == 1
    assert not list(tmp_path.glob("out/*"))


def test_a_pattern_has_to_fit_the_linears_that_are_pruned(capsys, config):
    left_dense = "prune.keep=[mlp\\.down_proj]"
    code, _, errors = calibprune_here(capsys, "check", config, "prune.pattern=32:64", left_dense)
    assert code == 0, errors


def test_an_empty_text_is_told(capsys, config, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    code, _, errors = calibprune_here(
        capsys, "run", config, f"evaluate.perplexity=[{{name: a, path: {tmp_path}/empty.txt}}]"
    )
    assert code == 2 and "empty.txt" in errors


def test_an_encoder_is_refused(capsys, config, tmp_path, tiny_llama):
    model = shutil.copytree(tiny_llama, tmp_path / "encoder")
    content = json.loads((model / "config.json").read_text())
    content |= {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    (model / "config.json").write_text(json.dumps(content))
    code, _, errors = calibprune_here(capsys, "run", config, f"model.path={model}")
    assert code == 2 and "not a causal language model" in errors


def test_a_folder_that_is_no_run_is_left_alone(capsys, config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    code, _, errors = calibprune_here(capsys, "run", config)
    assert code == 2 and "holds no run of calibprune" in errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_an_output_that_cannot_be_written_is_told(capsys, config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for output in (f"{tmp_path}/file", f"{tmp_path}/file/run", "nosuch://bucket/run"):
        code, _, errors = calibprune_here(capsys, "run", config, f"output={output}")
        assert code == 2 and output in errors, output


def test_too_few_resources_say_what_was_asked_and_what_is_there(capsys, config):
    code, _, errors = calibprune_here(
        capsys, "run", config, "cluster.gpus_per_worker=1", "cluster.workers=3", "generate.tensor_parallel=3"
    )  # fmt: skip
    assert code == 2
    assert "3 GPU" in errors and "the cluster has" in errors


def test_an_engine_of_more_gpus_than_the_run_has_is_refused(capsys, config):
    code, _, errors = calibprune_here(
        capsys, "check", config, "cluster.gpus_per_worker=1", "cluster.workers=2", "generate.tensor_parallel=4"
    )  # fmt: skip
    assert code == 2 and "generate.tensor_parallel 4 is more GPUs" in errors


@pytest.mark.parametrize("command", ["run", "check", "submit"])
def test_a_misspelt_setting_costs_no_import_of_torch(config, command):
    code = (
        "import sys; from jobs.__main__ import main; sys.argv[0] = 'calibprune'\n"
        "try: main()\n"
        "except SystemExit as ended: print(ended.code, 'torch' in sys.modules, 'ray' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, command, str(config), "prune.sparsty=0.6"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "did you mean sparsity?" in ran.stderr
    assert ran.stdout.split()[:2] == ["2", "False"]


def test_a_cluster_that_is_not_there_is_told(capsys, config):
    code, _, errors = calibprune_here(capsys, "run", config, "cluster.address=127.0.0.1:1")
    assert code == 2 and "cannot reach Ray at 127.0.0.1:1" in errors


def test_without_vllm_the_message_says_what_to_install(config, tmp_path):
    blocked = tmp_path / "site"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(
        "from importlib import metadata\n"
        "version = metadata.version\n"
        "def without_vllm(name):\n"
        "    if name.startswith('vllm'): raise metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "metadata.version = without_vllm\n"
    )
    result = calibprune("run", config, PYTHONPATH=str(blocked))
    assert result.returncode == 2 and "vLLM is not installed" in result.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("runai_model_streamer") is not None, reason="the streamer is there"
)
def test_a_model_in_a_bucket_wants_what_vllm_reads_it_by(capsys, config, tiny_llama):
    with s3_server("models") as bucket:
        for file in tiny_llama.iterdir():
            storage.write(f"{bucket}/tiny/{file.name}", file.read_bytes())
        code, _, errors = calibprune_here(capsys, "check", config, f"model.path={bucket}/tiny")
    assert code == 2 and 'pip install "vllm[runai]"' in errors, errors


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_told(config):
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    result = calibprune("check", config, "model.path=some/model", **hub)
    assert result.returncode == 1 and "cannot read the model at some/model" in result.stderr


def test_a_store_that_is_out_for_long_is_no_bad_input(capsys, config, monkeypatch):
    """Exit code 2 would end a run for good: a scheduler would take it for an error that the user has to fix."""
    monkeypatch.setattr("calibprune.retry.RETRY_SECONDS", 0.5)
    with s3_at("http://127.0.0.1:9"):
        code, _, errors = calibprune_here(capsys, "run", config, "output=s3://bucket/run")
    assert code == 1 and len(errors.strip().splitlines()) == 1
    assert "failed: StoreUnavailable: cannot write s3://bucket/run" in errors


def test_a_report_of_nothing_is_told(capsys, config, tmp_path):
    code, _, errors = calibprune_here(capsys, "report", config)
    assert code == 2 and "to report on" in errors and not list(tmp_path.glob("out/*"))


def test_pruning_before_there_is_a_pool_says_what_to_run_first(capsys, config):
    code, _, errors = calibprune_here(capsys, "prune", config)
    assert code == 2 and "run the stage curate first" in errors


def test_a_report_needs_the_settings_of_its_run_and_no_cluster(capsys, config, tmp_path):
    run = Run(load_config(str(config)))
    run.open()
    stage = run.stage("evaluate")
    stage.plan({"evaluate": run.config.evaluate.model_dump(mode="json")}, ["dense", "pruned"])
    for unit in ("dense", "pruned"):
        stage.commit(unit, None, {"perplexity": {}})
    stage.finish({"seconds": 1.0})
    nowhere = "cluster.address=127.0.0.1:1"
    code, _, errors = calibprune_here(capsys, "report", config, nowhere, "evaluate.sequences=1")
    assert code == 2 and "evaluate.sequences was 2, now 1" in errors
    code, out, errors = calibprune_here(capsys, "report", config, nowhere, "generate.seed=1")
    assert code == 0 and "report/index.html" in out, errors


def test_status_of_nothing_is_told(capsys, tmp_path):
    code, _, errors = calibprune_here(capsys, "status", tmp_path)
    assert code == 2 and "there is no run at" in errors
