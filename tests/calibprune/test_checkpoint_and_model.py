"""Reading checkpoints by byte range, and models that are refused before any work."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibprune import storage
from calibprune.checkpoint import Checkpoint, from_bytes, local_side_files, side_files, to_bytes
from calibprune.config.model import ModelSettings
from calibprune.errors import CorruptionError, UserError
from calibprune.model import build_skeleton, check_tokenizer, load_tokenizer
from tests.tiny import byte_tokenizer, write_tiny_llama


@pytest.fixture
def copy(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "copy")


def test_tensors_are_read_as_stored_and_bytes_are_counted(tiny_llama):
    checkpoint = Checkpoint(str(tiny_llama))
    expected = load_file(tiny_llama / "model.safetensors")
    read = checkpoint.read(expected)
    assert read.keys() == expected.keys() == checkpoint.locations.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read.values())
    assert checkpoint.bytes == sum(t.nbytes for t in expected.values())
    assert checkpoint.bytes_read == (tiny_llama / "model.safetensors").stat().st_size


def test_sharded_and_remote_checkpoints_read_alike(tiny_llama):
    tensors = load_file(tiny_llama / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        storage.write(f"memory://sharded/{file}", to_bytes({name: tensors[name] for name in part}))
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    storage.write_json("memory://sharded/model.safetensors.index.json", index)
    for name in side_files(str(tiny_llama)):
        storage.write(f"memory://sharded/{name}", (tiny_llama / name).read_bytes())
    skeleton = build_skeleton(ModelSettings(path="memory://sharded"))
    layer = skeleton.checkpoint.read(skeleton.layer_tensors(1))
    assert len(layer) == 9 and all(torch.equal(layer[name], tensors[name]) for name in layer)
    with local_side_files("memory://sharded") as folder:
        assert json.loads(Path(folder, "config.json").read_text())["vocab_size"] == 258
    storage.remove("memory://sharded/b.safetensors")
    with pytest.raises(UserError, match=r"the index names b\.safetensors, which is not there"):
        Checkpoint("memory://sharded")


def test_bytes_of_tensors_do_not_depend_on_their_order():
    a, b = torch.arange(6.0).view(2, 3).T, torch.ones(3, dtype=torch.bfloat16)
    assert to_bytes({"a": a, "b": b}) == to_bytes({"b": b, "a": a.contiguous()})
    assert torch.equal(from_bytes(to_bytes({"a": a}))["a"], a)


def test_identity_sees_weights_config_and_names(copy):
    first = Checkpoint(str(copy)).identity()
    assert Checkpoint(str(copy)).identity() == first
    tensors = load_file(copy / "model.safetensors")
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
    second = Checkpoint(str(copy)).identity()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert len({first, second, Checkpoint(str(copy)).identity()}) == 3


def test_a_file_given_with_its_hash_is_verified_when_it_is_used(copy):
    data = (copy / "model.safetensors").read_bytes()
    name = "model.norm.weight"
    assert name in Checkpoint(str(copy), {"model.safetensors": storage.sha256(data)}).read([name])
    with pytest.raises(CorruptionError, match=r"model\.safetensors is damaged"):
        Checkpoint(str(copy), {"model.safetensors": storage.sha256(b"other")}).read([name])


def test_tied_heads_are_found_under_the_name_they_are_stored_by(tmp_path):
    skeleton = build_skeleton(ModelSettings(path=str(write_tiny_llama(tmp_path / "m", tied=True))))
    assert skeleton.stored_name("lm_head.weight") == "model.embed_tokens.weight"
    assert skeleton.rest_tensors() == ["model.embed_tokens.weight", "model.norm.weight"]


def build(path, **settings):
    return build_skeleton(ModelSettings(path=str(path), **settings))


def change_config(copy, **changes):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))


def test_missing_and_foreign_folders_are_told(tmp_path, copy):
    with pytest.raises(UserError, match=r"there is no model at .*`calibprune demo-model FOLDER`"):
        build(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no model folder"):
        build(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="opens no pickle"):
        build(tmp_path / "empty")
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="cannot use the model at"):
        build(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "T5ForCondition"),
        ({"architectures": None}, "not a causal language model"),
        ({"model_type": "no-such-model"}, "cannot use the model"),
        ({"intermediate_size": 128}, r"has shape \(160, 64\), its config gives \(128, 64\)"),
        ({"num_hidden_layers": 4}, r"has no tensor model\.layers\.3"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused(copy, changes, message):
    change_config(copy, **changes)
    with pytest.raises(UserError, match=message):
        build(copy)


IN_LITTLE_MEMORY = """
import resource, sys
from calibprune.config.model import ModelSettings
from calibprune.model import build_skeleton
from calibprune.process import host_memory
resource.setrlimit(resource.RLIMIT_AS, (host_memory("VmSize") + (256 << 20),) * 2)
for folder in sys.argv[1:]:
    try: build_skeleton(ModelSettings(path=folder))
    except Exception as error: print(type(error).__name__, error)
"""


def test_a_config_of_another_size_than_the_checkpoint_costs_no_memory(tmp_path, tiny_llama):
    odd = [
        {"hidden_size": 10**7}, {"hidden_size": 10**7, "head_dim": None}, {"hidden_size": 10**11},
        {"head_dim": 10**9}, {"vocab_size": 10**9}, {"intermediate_size": 10**12}, {"num_hidden_layers": 9000},
    ]  # fmt: skip
    folders = [str(tmp_path / str(number)) for number in range(len(odd))]
    for folder, changes in zip(folders, odd, strict=True):
        change_config(shutil.copytree(tiny_llama, Path(folder)), **changes)
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, *folders]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = r"UserError .*(has shape .*, its config gives|num_hidden_layers 9000|Storage size)"
    assert len(told) == len(odd) and all(re.match(expected, line) for line in told), told


def test_a_config_that_asks_for_huge_tables_is_refused(tmp_path):
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(vocab_size=8, n_embd=64, n_layer=1, n_head=1, n_positions=16, rotary_dim=64)
    GPTJForCausalLM(config).save_pretrained(tmp_path)
    assert build(tmp_path).layers_path == "transformer.h"
    change_config(tmp_path, n_positions=10**8)  # rows of a table of sines
    with pytest.raises(UserError, match=r"config\.json asks for buffers of 25,600,000,000 bytes"):
        build(tmp_path)


def tokenizer_with(special=(), ordinary=(), eos=None):
    tokenizer = byte_tokenizer()  # of 258 tokens, as the model has
    tokenizer.add_tokens(list(ordinary))
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    if eos:
        tokenizer.eos_token = eos
    return tokenizer


@pytest.mark.parametrize(
    ("tokens", "fits"),
    [
        ({}, True),
        ({"special": ["<image>"]}, True),
        ({"ordinary": ["word"]}, False),
        ({"special": ["<end>"], "eos": "<end>"}, False),
    ],
)
def test_a_tokenizer_gives_no_token_that_the_model_does_not_have(tiny_llama, tokens, fits):
    skeleton, tokenizer = build(tiny_llama), tokenizer_with(**tokens)
    if fits:
        check_tokenizer(tokenizer, skeleton, "a/model")
        return
    with pytest.raises(
        UserError, match="a/model: its tokenizer gives token ids up to 258"
    ) as error:
        check_tokenizer(tokenizer, skeleton, "a/model")
    assert "embeddings for 258" in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tmp_path, tiny_llama):
    smaller = shutil.copytree(tiny_llama, tmp_path / "smaller")
    change_config(smaller, vocab_size=200)
    tensors = load_file(smaller / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:200].contiguous()
    save_file(tensors, smaller / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"token ids up to 257 .*, the model has embeddings for 200"
    ):
        check_tokenizer(load_tokenizer(str(smaller)), build(smaller), str(smaller))


def test_fused_experts_are_refused(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"expert|no tensor"):
        build(tmp_path)


@pytest.mark.parametrize(
    "damage", [b"", b"\xff" * 64, b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all!"]
)
def test_a_damaged_file_is_told(copy, damage):
    (copy / "model.safetensors").write_bytes(damage)
    with pytest.raises(CorruptionError, match=r"model\.safetensors"):
        Checkpoint(str(copy))


@pytest.mark.parametrize("kind", ["local", "memory"])
@pytest.mark.parametrize("change", [-1, -1000, 8])
def test_a_file_of_another_size_than_its_header_describes_is_refused(copy, kind, change):
    whole = (copy / "model.safetensors").read_bytes()
    data = whole[:change] if change < 0 else whole + bytes(change)
    url = str(copy) if kind == "local" else "memory://cut"
    storage.write(f"{url}/model.safetensors", data)
    message = rf"model\.safetensors is damaged: it has {len(data):,} bytes, .* {len(whole):,}:"
    with pytest.raises(CorruptionError, match=message):
        Checkpoint(url)


def test_a_shard_that_is_cut_short_in_its_header_is_named(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:200])
    with pytest.raises(CorruptionError, match=r"model\.safetensors"):
        Checkpoint(str(copy))


def test_tensors_that_overlap_or_leave_gaps_are_refused(tmp_path):
    for second in ([4, 12], [12, 20]):
        header = {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": second},
        }
        content = json.dumps(header).encode()
        data = len(content).to_bytes(8, "little") + content + bytes(second[1])
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(CorruptionError, match=r"b begins at byte .*, what lies before it ends"):
            Checkpoint(str(tmp_path))


def test_weights_that_are_a_loop_of_links_are_no_weights(copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to("other.safetensors")
    (copy / "other.safetensors").symlink_to("model.safetensors")
    with pytest.raises(UserError, match=r"is no model folder: no .*model\.safetensors in it"):
        Checkpoint(str(copy))


def test_the_forward_dtype_is_the_checkpoints_unless_told(copy):
    assert build(copy).dtype == torch.float32
    assert build(copy, dtype="bfloat16").dtype == torch.bfloat16


def test_a_snapshot_in_the_hubs_cache_is_a_model_folder(tiny_llama, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny_llama.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs", str(number)))
    linked, plain = Checkpoint(str(snapshot)), Checkpoint(str(tiny_llama))
    assert linked.identity() == plain.identity()
    assert side_files(str(snapshot)) == side_files(str(tiny_llama)) != []
