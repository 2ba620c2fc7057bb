"""DCLM as OpenLM has it: checkpoints in its layout, and the model in float64, line by line, without any of our code."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny import byte_tokenizer

SETTINGS = {
    "norm_type": "gain_only_lp_layer_norm", "norm_eps": 1e-5, "apply_qk_norm": True, "post_embed_norm": False,
    "weight_tying": False, "positional_embedding_type": "rotary", "ffn_type": "swiglu_torch", "attn_name": "auto",
    "moe_freq": 0, "moe_num_experts": 8, "moe_top_k": 2, "moe_loss_weight": 0.1, "moe_capacity_factor": 1.25,
    "moe_expert_model_parallelism": False, "moe_weight_parallelism": False,
}  # fmt: skip
PUBLISHED = {
    "DCLM-7B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432, "seq_len": 2048},
    "DCLM-1B": {"dim": 2048, "n_layers": 24, "n_heads": 16, "vocab_size": 50432, "seq_len": 2048},
}
TINY = {"dim": 64, "n_layers": 3, "n_heads": 2, "vocab_size": 258, "seq_len": 512}


def config_json(sizes: dict[str, int] = TINY, *, nested: bool = False, **changes: Any) -> dict:
    """A config.json as OpenLM's own class saved it or, nested, as the script of DCLM wrote it."""
    settings = SETTINGS | sizes | changes
    common = {"model_type": "openlm", "torch_dtype": "float32", "transformers_version": "4.40.2"}
    if not nested:
        return settings | common | {"architectures": ["OpenLMForCausalLM"]}
    settings["model_norm"], settings["qk_norm"] = (
        settings.pop("norm_type"),
        settings["apply_qk_norm"],
    )
    settings |= {"model": None, "attn_activation": None, "attn_seq_scalar": None}
    return common | {
        "architectures": ["OpenLMModel"],
        "params": None,
        "params_args_dict": settings,
    }


def shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of OpenLM's state dict, by name."""
    width, vocab = sizes["dim"], sizes["vocab_size"]
    inside = 256 * ((int(2 * 4 * width / 3) + 256 - 1) // 256)
    found: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (vocab, width)}
    for i in range(sizes["n_layers"]):
        found |= {
            f"model.layers.{i}.{name}": shape
            for name, shape in {
                "attention.in_proj.weight": (3 * width, width),
                "attention.out_proj.weight": (width, width),
                "attention.pos_embed.inv_freq": (width // sizes["n_heads"] // 2,),
                "attention.q_norm.weight": (width,),
                "attention.k_norm.weight": (width,),
                "feed_forward.w12.weight": (2 * inside, width),
                "feed_forward.w3.weight": (width, inside),
                "attention_norm.weight": (width,),
                "ffn_norm.weight": (width,),
            }.items()
        }
    return found | {"model.norm.weight": (width,), "model.output.weight": (vocab, width)}


def frequencies(head: int) -> Tensor:
    return 1.0 / (10000 ** (torch.arange(0, head, 2).float() / head))


def formula_tensors(sizes: dict[str, int] = TINY, dtype: torch.dtype = torch.float32) -> dict:
    """Weights without structure, from a formula and not from a generator: the same with every version of torch."""
    made, start = {}, 0
    for name, shape in shapes(sizes).items():
        count = math.prod(shape)
        numbers = torch.arange(start, start + count, dtype=torch.float64)
        start += count
        noise = (numbers * 12.9898).sin() * 43758.5453
        noise = ((noise - noise.floor()) * 2 - 1).view(shape)  # between -1 and 1
        if name.endswith("inv_freq"):
            made[name] = frequencies(2 * count)
        elif len(shape) == 1:
            made[name] = (1 + 0.4 * noise).to(dtype)
        else:
            made[name] = (noise * (3 / shape[1]) ** 0.5).to(dtype)
    return made


def write_tiny_openlm(
    folder: Path,
    sizes: dict[str, int] = TINY,
    *,
    nested: bool = False,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """Writes a checkpoint in OpenLM's layout with a byte-level tokenizer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_json(sizes, nested=nested, **changes) | {"eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        formula_tensors(sizes, dtype), folder / "model.safetensors", metadata={"format": "pt"}
    )
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def write_shapes(folder: Path, sizes: dict[str, int]) -> Path:
    """Writes a float32 checkpoint that has every tensor's header and none of its bytes: a sparse file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(sizes)))
    byte_tokenizer().save_pretrained(folder)
    header, end = {}, 0
    for name, shape in shapes(sizes).items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    packed = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        file.truncate(8 + len(packed) + end)
    return folder


def reference_logits(
    tensors: dict, ids: Tensor, sizes: dict[str, int] = TINY, rope: torch.dtype = torch.bfloat16
) -> Tensor:
    """OpenLM's forward in float64, with frequencies rounded to `rope`: [batch, tokens] to [batch, tokens, vocab]."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    heads, head = sizes["n_heads"], sizes["dim"] // sizes["n_heads"]
    batch, length = ids.shape

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    angle = torch.arange(length).double()[:, None] * frequencies(head).to(rope).double()
    cos, sin = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]

    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    x = t["model.tok_embeddings.weight"][ids]
    for i in range(sizes["n_layers"]):
        layer = {n.split(".", 3)[3]: w for n, w in t.items() if n.startswith(f"model.layers.{i}.")}
        fused = norm(x, layer["attention_norm.weight"]) @ layer["attention.in_proj.weight"].T
        queries, keys, values = fused.chunk(3, -1)
        queries = norm(queries, layer["attention.q_norm.weight"])
        keys = norm(keys, layer["attention.k_norm.weight"])
        queries, keys, values = (
            part.view(batch, length, heads, head) for part in (queries, keys, values)
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(queries), rotate(keys)) / head**0.5
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, values).reshape(batch, length, -1)
        x = x + attended @ layer["attention.out_proj.weight"].T
        gate, up = (norm(x, layer["ffn_norm.weight"]) @ layer["feed_forward.w12.weight"].T).chunk(
            2, -1
        )
        x = x + (gate / (1 + (-gate).exp()) * up) @ layer["feed_forward.w3.weight"].T
    return norm(x, t["model.norm.weight"]) @ t["model.output.weight"].T
