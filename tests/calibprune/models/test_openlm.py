"""OpenLM's published layout: read as it is, pruned as split matrices, written back; what is refused and how."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.errors import UserError
from calibprune.model import build_skeleton, config_of_pruned, load_tokenizer
from calibprune.models import openlm
from calibprune.models.dclm import DclmForCausalLM
from calibprune.models.layouts import export
from calibprune.pruning.export import REST, finish_checkpoint
from calibprune.pruning.layer import layer_unit
from calibprune.pruning.loop import prune_layers
from calibprune.stage import Stage
from tests.jobs.command import calibprune_here
from tests.openlm import TINY, formula_tensors, reference_logits, write_tiny_openlm

LAYERS = TINY["n_layers"]
TOKENS = torch.randint(0, 258, (6, 48), generator=torch.Generator().manual_seed(1))
LINEARS = {*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return write_tiny_openlm(tmp_path_factory.mktemp("openlm") / "published")


@pytest.fixture
def copy(published, tmp_path) -> Path:
    return shutil.copytree(published, tmp_path / "copy")


def build(path: Path, **settings):
    return build_skeleton(ModelSettings(path=str(path), **settings))


def prune(path: Path, folder: Path, **settings) -> Path:
    """Prunes the model in this process; returns the checkpoint's folder."""
    model, stage = ModelSettings(path=str(path)), Stage(str(folder))
    prune_settings = PruneSettings.model_validate({"batch_sequences": 2} | settings)
    stage.plan({}, [REST, *map(layer_unit, range(LAYERS))])
    list(prune_layers(build_skeleton(model), TOKENS, prune_settings, stage))
    finish_checkpoint(stage, str(path), prune_settings, config_of_pruned(model, str(path)))
    return folder / "checkpoint"


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    loaded = map(load_file, sorted(folder.glob("*.safetensors")))
    return {name: tensor for tensors in loaded for name, tensor in tensors.items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("nested", [False, True])
def test_the_published_layout_is_read_as_split_linears(tmp_path, nested):
    path = write_tiny_openlm(tmp_path, nested=nested)
    skeleton, tensors = build(path), formula_tensors()
    assert set(skeleton.linears(0)) == LINEARS
    found = skeleton.checkpoint.read(skeleton.layer_tensors(1))
    fused = tensors["model.layers.1.attention.in_proj.weight"]
    for part, name in zip(fused.chunk(3), "qkv", strict=True):
        assert torch.equal(found[f"model.layers.1.self_attn.{name}_proj.weight"], part)
    fused = tensors["model.layers.1.feed_forward.w12.weight"]
    for part, name in zip(fused.chunk(2), ("gate", "up"), strict=True):
        assert torch.equal(found[f"model.layers.1.mlp.{name}_proj.weight"], part)
    down = tensors["model.layers.1.feed_forward.w3.weight"]
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], down)
    assert skeleton.checkpoint.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert skeleton.model.config.max_position_embeddings == TINY["seq_len"]
    assert skeleton.model.config.eos_token_id == 1 and load_tokenizer(str(path)).eos_token_id == 1


def test_the_view_reads_every_byte_once(published):
    checkpoint = build(published).checkpoint
    headers, size = checkpoint.bytes_read, (published / "model.safetensors").stat().st_size
    checkpoint.read(checkpoint.locations)
    assert checkpoint.bytes_read == size and headers < size


@torch.no_grad()
def test_the_pruned_checkpoint_is_split_loads_in_transformers_and_computes_what_is_stored(
    published, tmp_path
):
    made = prune(published, tmp_path / "prune", method="wanda", sparsity=0.5)
    before, after = build(published).checkpoint, build(made).checkpoint
    assert before.locations.keys() == after.locations.keys()
    old, new = before.read(before.locations), after.read(after.locations)
    for name, tensor in new.items():
        path = name.split(".", 3)[-1].removesuffix(".weight")
        if path in LINEARS:  # Wanda removes half of every row
            assert ((tensor == 0).sum(1) == tensor.shape[1] // 2).all(), name
        else:
            assert same_bytes(tensor, old[name]), name
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float64).eval()
    assert isinstance(model, DclmForCausalLM) and model.config.rope_dtype == "bfloat16"
    export(str(made), str(tmp_path / "openlm"), "openlm")
    expected = reference_logits(all_tensors(tmp_path / "openlm"), TOKENS)
    assert (model(TOKENS).logits - expected).abs().max() < 1e-10


def test_the_sparsity_is_that_of_each_of_the_seven_matrices(published, tmp_path):
    """With a threshold for each fused matrix, its parts would lose unequal shares."""
    tensors = load_file(published / "model.safetensors")
    width = TINY["dim"]
    for i in range(LAYERS):
        tensors[f"model.layers.{i}.attention.in_proj.weight"][:width] *= 0.01  # the queries
    loud = shutil.copytree(published, tmp_path / "loud")
    save_file(tensors, loud / "model.safetensors", metadata={"format": "pt"})
    made = prune(loud, tmp_path / "prune", method="magnitude", sparsity=0.5)
    for name, tensor in all_tensors(made).items():
        if name.split(".", 3)[-1].removesuffix(".weight") in LINEARS:
            assert (tensor == 0).sum() == tensor.numel() // 2, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_every_tensor_has_the_same_bytes(tmp_path, dtype):
    original = write_tiny_openlm(tmp_path / "original", dtype=dtype, nested=True)
    ours, back = tmp_path / "ours", tmp_path / "back"
    written = export(str(original), str(ours), "transformers")
    assert export(str(ours), str(back), "openlm") == written
    before, after = all_tensors(original), all_tensors(back)
    assert before.keys() == after.keys()
    assert all(same_bytes(before[name], after[name]) for name in before)
    assert config_of(back) == config_of(original)
    assert (back / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()
    assert config_of(ours)["model_type"] == "dclm"
    assert len(list(back.glob("*.safetensors"))) == LAYERS + 1
    assert build(ours).checkpoint.locations.keys() == build(original).checkpoint.locations.keys()


def test_a_model_that_never_was_openlm_s_is_exported_too(tmp_path):
    ours = tmp_path / "ours"
    export(str(write_tiny_openlm(tmp_path / "original")), str(ours), "transformers")
    AutoModelForCausalLM.from_pretrained(ours).save_pretrained(tmp_path / "saved")
    config = config_of(tmp_path / "saved")
    del config["openlm_settings"]
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    export(str(tmp_path / "saved"), str(tmp_path / "back"), "openlm")
    before, after = all_tensors(tmp_path / "original"), all_tensors(tmp_path / "back")
    assert after.keys() == {name for name in before if not name.endswith("inv_freq")}
    assert all(same_bytes(before[name], after[name]) for name in after)
    a, b = (openlm.model_settings(config_of(tmp_path / f)) for f in ("original", "back"))
    assert a | {"openlm_settings": None} == b | {"openlm_settings": None}


def test_export_s_command_and_what_it_refuses(published, tiny_llama, tmp_path, capsys):
    def command(source, target, layout):
        return calibprune_here(capsys, "export", source, tmp_path / target, "--layout", layout)

    code, out, errors = command(published, "ours", "transformers")
    assert code == 0 and re.search(r"ours: [\d,]+ bytes of tensors written", out), errors
    for source, target, layout, message in (
        (published, "ours", "transformers", "ours holds a checkpoint already: choose another"),
        (published, "new", "openlm", "published is in the layout openlm already"),
        (tiny_llama, "new", "openlm", "is of the type llama, only DCLM has layouts"),
        (tmp_path / "nothing", "new", "openlm", "there is no model at"),
    ):
        code, _, errors = command(source, target, layout)
        assert code == 2 and message in errors and errors.count("\n") == 1, errors
    (tmp_path / "ours" / "model.safetensors.index.json").unlink()  # as after a kill
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    before = {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()}
    assert command(published, "ours", "transformers")[0] == 0
    after = {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()}
    assert after.items() > before.items()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "default_layer_norm"}, "norm_type='default_layer_norm' is not supported"),
        ({"norm_type": "lp_layer_norm"}, "norm_type='lp_layer_norm' is not supported"),
        ({"norm_type": "rms_norm"}, "norm_type='rms_norm' is not supported"),
        ({"positional_embedding_type": "head_rotary"}, "='head_rotary' is not supported"),
        ({"positional_embedding_type": "llama_rotary"}, "='llama_rotary' is not supported"),
        ({"moe_freq": 2}, "moe_freq=2 is not supported, only 0"),
        ({"ffn_type": "moe"}, "ffn_type='moe' is not supported, only 'swiglu'"),
        ({"ffn_type": "gelu"}, "ffn_type='gelu' is not supported"),
        ({"ffn_type": "gemma_geglu"}, "ffn_type='gemma_geglu' is not supported"),
        ({"apply_qk_norm": False}, "apply_qk_norm=False is not supported, only True"),
        ({"post_embed_norm": True}, "post_embed_norm=True is not supported"),
        ({"weight_tying": True}, "weight_tying=True is not supported"),
        ({"attn_name": "custom_attn"}, "attn_name='custom_attn' is not supported"),
        ({"mystery": 3}, "calibprune does not know the OpenLM setting mystery=3"),
        ({"dim": "64"}, "the OpenLM setting dim is '64', not a positive number"),
        ({"n_layers": None}, "the OpenLM setting n_layers is None, not a positive number"),
        ({"n_heads": 3}, "dim=64 does not give n_heads=3 heads of an even width"),
        ({"rope_dtype": "int8"}, "rope_dtype is 'int8'"),
    ],
)
def test_unsupported_variants_are_refused_by_name(tmp_path, changes, message, nested):
    path = write_tiny_openlm(tmp_path / "model", nested=nested, **changes)
    with pytest.raises(UserError) as error:
        build(path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_norm_that_is_not_named_has_a_bias(copy):
    config = config_of(copy)
    del config["norm_type"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"norm_type='default_layer_norm', which is what its absence"
    ):
        build(copy)


def test_two_ways_of_writing_that_contradict_each_other_are_refused(copy):
    config = config_of(copy)
    config["params_args_dict"] = {"qk_norm": True, "n_heads": 4}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="it says both n_heads=2 and n_heads=4"):
        build(copy)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.layers.1.attention.in_proj.weight", lambda t: t[:-1],
         r"model\.layers\.1\.attention\.in_proj\.weight has shape \(191, 64\), its config gives \(192, 64\)"),
        ("model.layers.0.feed_forward.w12.weight", lambda t: t[:-2],
         r"w12\.weight has shape \(510, 64\), its config gives \(512, 64\)"),
        ("model.layers.0.feed_forward.w12.weight", lambda t: t.flatten(),
         r"w12\.weight has shape \(32768,\), its config gives \(512, 64\)"),
        ("model.layers.2.feed_forward.w12.weight", None,
         r"the checkpoint has no tensor model\.layers\.2\.feed_forward\.w12\.weight"),
        ("model.layers.1.attention_norm.bias", torch.zeros(64),
         r"OpenLM has no tensor model\.layers\.1\.attention_norm\.bias"),
        ("model.layers.1.feed_forward.experts.0.weight", torch.zeros(64), "OpenLM has no tensor model"),
        ("model.output.weight", lambda t: t[:-1], r"lm_head\.weight .* has shape \(257, 64\)"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(copy, name, change, message):
    tensors = load_file(copy / "model.safetensors")
    if change is None:
        del tensors[name]
    elif isinstance(change, torch.Tensor):
        tensors[name] = change
    else:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        build(copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_tokenizer_is_refused(tmp_path):
    path = write_tiny_openlm(tmp_path / "model", tokenizer=False)
    with pytest.raises(UserError, match="cannot read the tokenizer of") as error:
        load_tokenizer(str(path))
    assert "\n" not in str(error.value)


def test_the_other_rounding_goes_into_the_pruned_config(published):
    model = ModelSettings(path=str(published), rope_dtype="float32")
    config = json.loads(config_of_pruned(model, str(published)) or "")
    assert config["rope_dtype"] == "float32" and config["architectures"] == ["DclmForCausalLM"]
    assert config["dtype"] == "float32" and "vocab_size" in config


def test_the_other_rounding_survives_every_way_of_saving(published, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(published, rope_dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    assert build(tmp_path / "saved").model.config.rope_dtype == "float32"
    export(str(tmp_path / "saved"), str(tmp_path / "ours"), "transformers")
    assert build(tmp_path / "ours").model.config.rope_dtype == "float32"
    export(str(tmp_path / "ours"), str(tmp_path / "back"), "openlm")
    assert config_of(tmp_path / "back") == config_of(published) | {"rope_dtype": "float32"}
    assert build(tmp_path / "back", rope_dtype="bfloat16").model.config.rope_dtype == "bfloat16"


def test_other_models_keep_their_own_config(tiny_llama):
    assert config_of_pruned(ModelSettings(path=str(tiny_llama)), str(tiny_llama)) is None
