"""Every family of models through the same code, with no table of architectures."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.errors import UserError
from calibprune.evaluation.perplexity import sweep_perplexity
from calibprune.events import UnitDone, result_of
from calibprune.model import build_skeleton
from calibprune.pruning import layer
from calibprune.pruning.export import REST, finish_checkpoint
from calibprune.pruning.layer import layer_unit
from calibprune.pruning.loop import prune_layers
from calibprune.stage import Stage

TOKENS = torch.randint(0, 300, (6, 48), generator=torch.Generator().manual_seed(1))
LAYERS = 4
COMMON = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Llama": {"tie_word_embeddings": False},  # Llama 2
    "Llama-3": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }},
    "Mistral": {"sliding_window": 16},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 32},
    "Gemma2": {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32},
    "Gemma3Text": {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32},
    "Olmo2": {},
    "Phi3": {},
}  # fmt: skip
SHARED_INPUTS = {"Phi3": {("self_attn.qkv_proj",), ("mlp.gate_up_proj",)}}


def write_model(folder: Path, family: str, dtype: torch.dtype) -> Path:
    name = family.split("-", maxsplit=1)[0]
    config = getattr(transformers, f"{name}Config")(**COMMON | FAMILIES[family])
    causal = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(0)
    model = causal(config).to(dtype)
    with torch.no_grad():  # random norms, which change the result
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "pattern", "dtype"),
    [
        ("wanda", "unstructured", torch.float32),
        ("sparsegpt", "2:4", torch.bfloat16),
        ("alps", "2:4", torch.float32),
    ],
)
def test_zeros_where_asked_and_the_saved_checkpoint_computes_what_the_sweep_did(
    tmp_path, family, method, pattern, dtype, monkeypatch
):
    path = write_model(tmp_path / "model", family, dtype)
    stage = Stage(str(tmp_path / "prune"))
    skeleton = build_skeleton(ModelSettings(path=str(path)))
    stage.plan({}, [REST, *map(layer_unit, range(LAYERS))])
    settings = PruneSettings.model_validate(
        {"method": method, "pattern": pattern, "batch_sequences": 2}
        | ({"refine": "swaps"} if method == "alps" else {})
    )
    last = list(skeleton.linears(LAYERS - 1))[-1]
    seen, groups = [], set()  # the input of the very last linear while the model was being pruned
    prune = layer.LayerInWork.prune

    def watch(self, stop):
        groups.add(stop.linears)
        if stop.layer == LAYERS - 1 and last in stop.linears:
            seen.extend(x.clone() for x in stop.inputs)
        prune(self, stop)

    monkeypatch.setattr(layer.LayerInWork, "prune", watch)
    events = list(prune_layers(skeleton, TOKENS, settings, stage))
    assert sum(isinstance(event, UnitDone) for event in events) == LAYERS + 1
    expected = SHARED_INPUTS.get(
        family,
        {("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")},
    )  # fmt: skip
    assert groups == expected | {("self_attn.o_proj",), ("mlp.down_proj",)}
    finish_checkpoint(stage, str(path), settings)

    dense = AutoModelForCausalLM.from_pretrained(path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "prune" / "checkpoint")
    pruned = {
        f"{skeleton.layer_prefix(index)}{name}.weight"
        for index in range(LAYERS)
        for name in skeleton.linears(index)
    }
    for (name, before), after in zip(dense.named_parameters(), saved.parameters(), strict=True):
        assert after.dtype == dtype
        if name not in pruned:
            assert torch.equal(before, after), name
        elif pattern == "2:4":
            assert ((after.reshape(-1, 4) != 0).sum(1) == 2).all(), name
        else:
            assert ((after == 0).sum(1) == after.shape[1] // 2).all(), name

    inputs = []
    module = saved.get_submodule(f"{skeleton.layer_prefix(LAYERS - 1)}{last}")
    module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for ids in TOKENS.split(2):
            saved(ids, use_cache=False)
    assert torch.equal(torch.cat(seen), torch.cat(inputs))


def fused_experts(folder: Path) -> Path:
    """Makes a mixture of experts whose experts are one tensor per layer, in the model and in its checkpoint."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **COMMON | {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
                    "layer_types": ["full_attention"] * LAYERS}
    )  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(config).save_pretrained(folder)
    return folder


def test_fused_experts_are_refused_or_left_dense_if_asked(tmp_path):
    path = str(fused_experts(tmp_path / "moe"))
    stage = Stage(str(tmp_path / "prune"))
    skeleton = build_skeleton(ModelSettings(path=path))
    settings = PruneSettings.model_validate({"method": {"type": "wanda"}, "batch_sequences": 2})
    with pytest.raises(UserError, match=r"experts as one fused tensor.*prune\.keep"):
        list(prune_layers(skeleton, TOKENS, settings, stage))
    settings = settings.model_copy(update={"keep": ("experts",)})
    stage.plan({}, [REST, *map(layer_unit, range(LAYERS))])
    list(prune_layers(skeleton, TOKENS, settings, stage))
    finish_checkpoint(stage, path, settings)
    dense = AutoModelForCausalLM.from_pretrained(path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "prune" / "checkpoint")
    for (name, before), after in zip(dense.named_parameters(), saved.parameters(), strict=True):
        if "_proj.weight" in name:
            assert (after == 0).sum() == after.numel() // 2, name
        else:
            assert torch.equal(before, after), name
    facts = stage.done()[layer_unit(0)].facts
    assert set(facts["linears"]) == {f"self_attn.{x}_proj" for x in "qkvo"}
    assert any("experts" in name for name in facts["kept_dense"])


def test_experts_fused_in_the_model_but_not_in_the_checkpoint_are_refused(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2})
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="mixture-of-experts"):
        build_skeleton(ModelSettings(path=str(tmp_path)))


def test_buffers_that_the_checkpoint_stores_count(tmp_path):
    """Gemma 4 multiplies a layer's output by a number that it learned and that is no parameter."""
    own = {"global_head_dim": 16, "head_dim": 16, "hidden_size_per_layer_input": 0}
    config = transformers.Gemma4TextConfig(
        **COMMON | own, num_kv_shared_layers=0, enable_moe_block=False
    )
    model = transformers.Gemma4ForCausalLM(config).eval()
    for layer_here in model.model.layers:
        layer_here.layer_scalar.fill_(0.5)
    model.save_pretrained(tmp_path)
    skeleton = build_skeleton(ModelSettings(path=str(tmp_path)))
    found = result_of(sweep_perplexity(skeleton, {"text": TOKENS}, 2))
    with torch.no_grad():
        losses = model(TOKENS, labels=TOKENS).loss

    assert found["text"].perplexity == pytest.approx(losses.exp().item(), rel=1e-4)
