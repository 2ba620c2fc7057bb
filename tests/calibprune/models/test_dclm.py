"""DCLM against an independent implementation in float64, and through transformers' own doors."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from calibprune.config.model import ModelSettings
from calibprune.errors import UserError
from calibprune.model import build_skeleton
from calibprune.models import register
from calibprune.models.dclm import (
    DclmConfig,
    DclmForCausalLM,
    DclmRotaryEmbedding,
    OpenLMForCausalLM,
)
from tests.openlm import TINY, formula_tensors, frequencies, reference_logits, write_tiny_openlm

IDS = torch.randint(0, 258, (2, 60), generator=torch.Generator().manual_seed(3))
DTYPES = ("bfloat16", "float16", "float32")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    register()
    return write_tiny_openlm(tmp_path_factory.mktemp("dclm") / "published")


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("rope", DTYPES)
def test_logits_are_those_of_a_float64_implementation(published, rope):
    expected = reference_logits(formula_tensors(), IDS, rope=getattr(torch, rope))
    model = load(published, dtype=torch.float64, rope_dtype=rope)
    assert isinstance(model, OpenLMForCausalLM)
    assert (model(IDS).logits - expected).abs().max() < 1e-10
    assert (load(published, rope_dtype=rope)(IDS).logits - expected).abs().max() < 1e-4
    assert expected.std() > 0.5


GOLDEN = [-0.6727647, 1.0291321, -1.2185563, -0.1922158, 0.9799529]
"""Logits of the second implementation, in float64, for weights from a formula."""


@torch.no_grad()
def test_golden_numbers(published):
    """A change of these is a change of the model: every pruned DCLM would compute something else."""
    ids = torch.arange(0, 250, 5)[None]
    logits = load(published, dtype=torch.float64)(ids).logits[0]
    found = [logits[49, 0], logits[49, 100], logits[20, 257], logits[0, 7], logits.square().mean()]
    assert [number.item() for number in found] == pytest.approx(GOLDEN, abs=1e-6)


@torch.no_grad()
def test_rounded_frequencies_are_another_function_far_apart():
    """The facts of the published sizes: heads of 128 dimensions, 2048 positions."""
    tables = {}
    for rope in DTYPES:
        config = DclmConfig(hidden_size=256, num_attention_heads=2, rope_dtype=rope)
        tables[rope] = DclmRotaryEmbedding(config)(torch.zeros(1), torch.arange(2048)[None])[0]
    exact = torch.arange(2048).double()[:, None] * frequencies(128).double()
    assert (tables["float32"][0, :, :64] - exact.cos()).abs().max() < 1e-3
    assert 1.8 < (tables["bfloat16"] - tables["float32"]).abs().max() < 2
    assert 0.2 < (tables["float16"] - tables["float32"]).abs().max() < 0.6
    relative = (frequencies(128).bfloat16().float() / frequencies(128) - 1).abs().max()
    assert 0.003 < relative < 2**-8
    radians = (frequencies(128).bfloat16().float() - frequencies(128)).abs().max()
    assert 0.3 < 256 * radians < 0.32 and 2.4 < 2047 * radians < 2.6
    near = (tables["bfloat16"] - tables["float32"])[0, :8].abs().max()
    assert near < 0.03


@torch.no_grad()
def test_the_model_s_dtype_does_not_decide_about_the_rounding(published):
    plain, rounded = load(published, rope_dtype="float32"), load(published)
    cast = load(published, rope_dtype="float32").to(torch.bfloat16).to(torch.float32)
    cast.load_state_dict(plain.state_dict())
    assert torch.equal(cast(IDS).logits, plain(IDS).logits)
    assert not torch.allclose(plain(IDS).logits, rounded(IDS).logits, atol=1e-3)


@torch.no_grad()
def test_cached_generation_is_the_full_forward(published):
    model = load(published)
    made = model.generate(IDS[:, :7], max_new_tokens=20, do_sample=False, eos_token_id=None)
    ids = IDS[:, :7]
    for _ in range(20):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(made, ids)


def test_transformers_saves_in_the_layout_that_it_loaded(published, tmp_path):
    load(published).save_pretrained(tmp_path / "openlm")
    saved, original = (load_file(f / "model.safetensors") for f in (tmp_path / "openlm", published))
    assert saved.keys() == {name for name in original if not name.endswith("inv_freq")}
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    assert isinstance(load(tmp_path / "openlm"), OpenLMForCausalLM)


def test_transformers_loads_what_it_saved_under_our_names(tmp_path):
    config = DclmConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = DclmForCausalLM(config)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, DclmForCausalLM) and again.config.rope_dtype == "bfloat16"
    assert torch.equal(model(IDS % 50).logits, again(IDS % 50).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_dtype": "int8"}, "rope_dtype is 'int8'"),
        ({"num_key_value_heads": 1}, "as many heads of keys and values"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "no rotary embedding"),
    ],
)  # fmt: skip
def test_what_dclm_does_not_have_is_refused(changes, message):
    with pytest.raises(Exception, match=message):
        DclmConfig(hidden_size=64, num_attention_heads=2, **changes)


def test_the_setting_for_the_frequencies_reaches_dclm_and_no_other_model(published, tiny_llama):
    for rope in DTYPES:
        settings = ModelSettings(path=str(published), rope_dtype=rope)
        assert build_skeleton(settings).model.model.rotary_emb.dtype == getattr(torch, rope)
    with pytest.raises(UserError, match=r"model\.rope_dtype is a setting for DCLM, .* llama"):
        build_skeleton(ModelSettings(path=str(tiny_llama), rope_dtype="float32"))


def test_heads_of_tiny_models_are_wide_enough_for_vllm():
    assert TINY["dim"] // TINY["n_heads"] == 32
