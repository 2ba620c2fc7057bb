"""DCLM by the command line: its true size from headers alone, what vLLM needs, and all stages on a tiny one."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from calibprune.models import register
from jobs import engines
from tests.jobs.command import calibprune, calibprune_here
from tests.openlm import PUBLISHED, reference_logits, write_shapes, write_tiny_openlm
from tests.plugin import plugin_paths, with_plugin

CONFIGS = Path(__file__).parents[2] / "configs"
OFFLINE = [
    "generate.prefixes={type: vocabulary, draw: uniform, tokens: 2, bos: false}",
    "evaluate.perplexity=[]",
]  # fmt: skip


@pytest.fixture
def plugged_in(tmp_path, monkeypatch):
    """vLLM's entry point, found in this process."""
    for path in plugin_paths(tmp_path / "plugin"):
        monkeypatch.syspath_prepend(path)


@pytest.mark.parametrize(
    ("config", "size", "parameters"),
    [("dclm-7b-wanda", "DCLM-7B", 6_889_672_704), ("dclm-7b-sparsegpt", "DCLM-1B", 1_439_893_504)],
)
def test_the_true_size_is_checked_from_headers_alone(
    tmp_path, capsys, plugged_in, config, size, parameters
):
    model = write_shapes(tmp_path / "model", PUBLISHED[size])
    code, out, errors = calibprune_here(
        capsys, "check", CONFIGS / f"{config}.yaml", f"model.path={model}", f"output={tmp_path / 'out'}",
        "cluster.workers=8", *OFFLINE,
    )  # fmt: skip
    assert code == 0, errors
    found = dict(
        re.split(r"  +", line, maxsplit=1) for line in out.splitlines() if "  " in line[1:]
    )
    shapes = PUBLISHED[size]
    assert found["model"] == "OpenLMForCausalLM" and found["layers"] == str(shapes["n_layers"])
    assert found["parameters"] == f"{parameters:,}"
    assert found["rotary frequencies"] == "bfloat16" and found["dtype"] == "bfloat16"
    assert found["calibration tokens"] == "262,144"
    assert "worker GPU memory" in found
    assert (tmp_path / "model" / "model.safetensors").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["generate.max_tokens=2047"], "generate.max_tokens with its prefix is 2049, the model's context is 2048"),
        (["curate.sequence_tokens=4096"], "curate.sequence_tokens is 4096, the model's context is 2048 tokens"),
        (["model.rope_dtype=float8"], "model.rope_dtype"),
    ],
)  # fmt: skip
def test_the_context_includes_the_prefix(tmp_path, capsys, plugged_in, changes, message):
    model = write_shapes(tmp_path / "model", PUBLISHED["DCLM-1B"])
    code, _, errors = calibprune_here(
        capsys, "check", CONFIGS / "dclm-7b-wanda.yaml", f"model.path={model}", f"output={tmp_path / 'out'}", *OFFLINE,
        *changes,
    )  # fmt: skip
    assert code == 2 and message in errors and errors.count("\n") == 1, errors


def test_what_is_not_there_is_named_in_one_line(tmp_path, capsys, plugged_in, monkeypatch):
    def check(path) -> str:
        code, _, errors = calibprune_here(
            capsys, "check", CONFIGS / "dclm-7b-wanda.yaml", f"model.path={path}", f"output={tmp_path / 'out'}",
            "generate.max_tokens=300", "curate.sequence_tokens=300", "evaluate.sequence_tokens=300", *OFFLINE,
        )  # fmt: skip
        assert code == 2 and errors.count("\n") == 1, errors
        return errors

    bare = write_tiny_openlm(tmp_path / "bare", tokenizer=False)
    assert f"cannot read the tokenizer of {bare}" in check(bare)
    model = write_tiny_openlm(tmp_path / "model", ffn_type="moe")
    assert f"{model}: the OpenLM setting ffn_type='moe' is not supported" in check(model)
    model = write_tiny_openlm(tmp_path / "model")
    monkeypatch.setattr(engines.importlib.metadata, "entry_points", lambda group: ())
    assert f"knows {model} by a plugin that comes with an installed calibprune" in check(model)


PIPELINE = """
model: {{path: {model}, dtype: float32, rope_dtype: float32}}
output: {output}
cluster: {{workers: 1, cpus_per_worker: 1}}
generate:
  {{prefixes: {{type: vocabulary, draw: model, tokens: 1}}, samples: 12, max_tokens: 62, min_tokens: 62,
    shard_rows: 6, cpu_kvcache_gib: 1}}
curate: {{sequences: 8, sequence_tokens: 64}}
prune: {{method: sparsegpt, sparsity: 0.5, batch_sequences: 4}}
evaluate: {{perplexity: [{{name: docs, path: python-docs}}], sequences: 2, sequence_tokens: 128}}
"""


def logprob(tensors: dict, sample: dict, rope: torch.dtype) -> float:
    """The sum of the log-probabilities of what was generated, after the prefix."""
    ids, first = sample["token_ids"], sample["prefix_length"]
    after = reference_logits(tensors, torch.tensor([ids]), rope=rope)[0].log_softmax(-1)
    return sum(after[i - 1, ids[i]].item() for i in range(first, len(ids)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@torch.no_grad()
def test_all_stages_from_the_published_layout_and_back(tmp_path):
    model, run = write_tiny_openlm(tmp_path / "model", nested=True), tmp_path / "run"
    config = tmp_path / "run.yaml"
    config.write_text(PIPELINE.format(model=model, output=run))
    environment = with_plugin(tmp_path / "plugin")
    ended = calibprune("run", config, timeout=800, **environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    report = json.loads((run / "report" / "report.json").read_text())
    assert set(report["stages"]) == {"generate", "curate", "prune", "evaluate", "report"}
    assert report["generate"]["samples"] == 12 and abs(report["sparsity"] - 0.5) < 1e-3
    assert 1 < report["perplexity"]["docs"]["dense"] < 1e6

    original = load_file(model / "model.safetensors")
    samples = pq.read_table(run / "generate" / "data").slice(0, 4).to_pylist()
    for rope, most, least in ((torch.float32, 1e-3, 0), (torch.bfloat16, 100, 0.01)):
        off = [abs(logprob(original, one, rope) - one["cumulative_logprob"]) for one in samples]
        assert least <= max(off) < most, (rope, off)

    register()
    checkpoint, exported = run / "prune" / "checkpoint", tmp_path / "exported"
    pruned = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
    ended = calibprune("export", checkpoint, exported, "--layout", "openlm")
    assert ended.returncode == 0, ended.stderr
    tensors = {name: t for file in exported.glob("*.safetensors") for name, t in load_file(file).items()}  # fmt: skip
    assert tensors.keys() == original.keys()
    assert all(tensors[name].dtype == original[name].dtype for name in tensors)
    ids = torch.arange(2, 66)[None]
    expected = reference_logits(tensors, ids, rope=torch.float32)
    assert (pruned(ids).logits - expected).abs().max() < 1e-10

    # the first pruned model writes text of its own: generated from the checkpoint that prune wrote
    config.write_text(PIPELINE.format(model=checkpoint, output=tmp_path / "again"))
    ended = calibprune("generate", config, timeout=800, **environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    shutil.rmtree(tmp_path / "again")
