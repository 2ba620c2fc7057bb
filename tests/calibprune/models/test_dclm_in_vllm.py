"""DCLM in vLLM, as it is published and as prune writes it: greedy tokens are those of transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from calibprune.models import register
from calibprune.models.layouts import export
from tests.jobs.command import ENVIRONMENT
from tests.openlm import write_tiny_openlm
from tests.plugin import with_plugin

PROMPTS = [[0], [0, 50, 60], [7 * i % 250 + 2 for i in range(90)]]
NEW_TOKENS = 24
CODE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == '__main__':
    path, ranks, prompts, count = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
    llm = LLM(path, dtype='float32', tensor_parallel_size=ranks, enforce_eager=True, max_model_len=128,
              max_num_seqs=4, disable_log_stats=True)
    sampling = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False)
    made = llm.generate([{'prompt_token_ids': prompt} for prompt in prompts], sampling, use_tqdm=False)
    print('TOKENS', json.dumps([list(one.outputs[0].token_ids) for one in made]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dclm-in-vllm")
    published = write_tiny_openlm(folder / "published")
    export(str(published), str(folder / "ours"), "transformers")
    return {"published": published, "ours": folder / "ours"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR", "TORCH_COMPILE_DISABLE": "1",
    }  # fmt: skip
    return ENVIRONMENT | settings | with_plugin(tmp_path_factory.mktemp("plugin"))


@torch.no_grad()
def greedy(path: Path) -> list[list[int]]:
    register()
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    made = []
    for prompt in PROMPTS:
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        made.append(ids[0, len(prompt) :].tolist())
    return made


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ("published", 1),
        pytest.param("ours", 1, marks=pytest.mark.slow),
        pytest.param("published", 2, marks=pytest.mark.slow),
        pytest.param("ours", 2, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_are_those_of_transformers(models, environment, tmp_path, layout, ranks):
    script = tmp_path / "greedy.py"
    script.write_text(CODE)
    command = [sys.executable, script, models[layout], ranks, json.dumps(PROMPTS), NEW_TOKENS]
    ended = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=500, check=False, env=environment
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.split("TOKENS ")[1].splitlines()[0])
    assert found == greedy(models[layout])
    assert len({tuple(tokens) for tokens in found}) == len(PROMPTS)
