"""The layout in which OpenLM publishes DCLM: its configuration, its tensors' names, and its fused matrices.

Both directions are renamings and splits between rows, so no bit of any tensor changes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:  # vLLM imports this in each of its processes
    from calibprune.checkpoint import Location

MODEL_TYPE = "openlm"
OUTSIDE = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "model.output.weight": "lm_head.weight",
}
"""Names outside the layers: OpenLM's, ours."""
FREQUENCIES = "attention.pos_embed.inv_freq"
"""Kept for OpenLM's own code, and not required: our model computes them."""
INSIDE = {
    "attention.in_proj.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "attention.out_proj.weight": ("self_attn.o_proj.weight",),
    "attention.q_norm.weight": ("self_attn.q_norm.weight",),
    "attention.k_norm.weight": ("self_attn.k_norm.weight",),
    FREQUENCIES: ("self_attn.rotary_emb.inv_freq",),
    "feed_forward.w12.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "feed_forward.w3.weight": ("mlp.down_proj.weight",),
    "attention_norm.weight": ("input_layernorm.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
}
"""Names inside a layer: OpenLM's, and ours of the equal parts that its rows are made of, in order."""
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")

NORMS = ("gain_only_lp_layer_norm", "gain_only_layer_norm")
"""LayerNorm with weights and without bias; `lp` only names the precision that it is computed in."""
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "norm_type": NORMS,
    "ffn_type": ("swiglu", "swiglu_torch"),
    "positional_embedding_type": ("rotary",),
    "apply_qk_norm": (True,),
    "post_embed_norm": (False,),
    "weight_tying": (False,),
    "moe_freq": (0,),
    "attn_name": ("auto", "torch_attn", "xformers_attn"),
    "attn_activation": (None,),
    "attn_seq_scalar": (None,),
}
"""Values that we implement of settings that change the model."""
IF_ABSENT = {"norm_type": "default_layer_norm", "apply_qk_norm": False}
"""What OpenLM takes where a setting is absent and that is not the first of those we implement."""
SIZES = ("dim", "n_layers", "n_heads", "vocab_size", "seq_len")
OTHERS = {"norm_eps", "rope_dtype"}
"""Settings that we implement with any value; `rope_dtype` is ours."""
WITHOUT_EFFECT = {
    "attn_seq_scalar_alpha", "linear_device", "linear_type", "model", "moe_capacity_factor",
    "moe_expert_model_parallelism", "moe_loss_weight", "moe_num_experts", "moe_top_k", "moe_weight_parallelism",
}  # fmt: skip
"""Settings that change nothing where the others are as we support them."""
SYNONYMS = {
    "model_norm": "norm_type",
    "qk_norm": "apply_qk_norm",
    "tie_word_embeddings": "weight_tying",
}
KEPT = ("bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype")
"""Settings of transformers that our configuration has under the same names."""
DROPPED = {
    "_name_or_path", "architectures", "auto_map", "chunk_size_feed_forward", "id2label", "is_encoder_decoder",
    "label2id", "model_type", "output_attentions", "output_hidden_states", "params_args_dict", "problem_type",
    "return_dict", "transformers_version", "use_cache",
}  # fmt: skip
TRAINED_ROPE_DTYPE = "bfloat16"
END_OF_TEXT = 0
"""The token of gpt-neox-20b's tokenizer, which DCLM was trained with, where a configuration names none."""


def model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the contents of an OpenLM config.json into the settings of DclmConfig.

    OpenLM's settings are at the top of the file, or together under `params_args_dict`. Raises ValueError naming a
    setting that is missing, unknown, or that we do not implement.
    """
    nested = config.get("params_args_dict") or {}
    if not isinstance(nested, Mapping):
        raise ValueError(f"params_args_dict is {nested!r}, not a table of settings")
    given: dict[str, Any] = {}
    for name, value in [*config.items(), *nested.items()]:
        key = SYNONYMS.get(name, name)
        if key in SUPPORTED or key in SIZES or key in OTHERS:
            if given.get(key, value) != value:
                raise ValueError(f"it says both {key}={given[key]!r} and {name}={value!r}")
            given[key] = value
        elif value is not None and name not in {*WITHOUT_EFFECT, *KEPT, *DROPPED}:
            raise ValueError(f"calibprune does not know the OpenLM setting {name}={value!r}")
    _check_supported(given)
    return {
        "eos_token_id": END_OF_TEXT,
        **{key: config[key] for key in KEPT if config.get(key) is not None},
        "vocab_size": given["vocab_size"],
        "hidden_size": given["dim"],
        "intermediate_size": mlp_width(given["dim"]),
        "num_hidden_layers": given["n_layers"],
        "num_attention_heads": given["n_heads"],
        "max_position_embeddings": given["seq_len"],
        "rms_norm_eps": given.get("norm_eps", 1e-5),
        **({"rope_dtype": given["rope_dtype"]} if "rope_dtype" in given else {}),
        "openlm_settings": dict(config),
    }


def mlp_width(width: int) -> int:
    """Returns the width inside the MLPs of a model of this width."""
    return 256 * -(-int(8 * width / 3) // 256)


def _check_supported(given: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first setting that is missing or that we do not implement."""
    for key in SIZES:
        size = given.get(key)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"the OpenLM setting {key} is {size!r}, not a positive number")
    if given["dim"] % (2 * given["n_heads"]):
        raise ValueError(
            f"the OpenLM setting dim={given['dim']} does not give n_heads={given['n_heads']} heads of an even width"
        )
    for key, supported in SUPPORTED.items():
        value = given.get(key, IF_ABSENT.get(key, supported[0]))
        if value not in supported:
            absent = "" if key in given else ", which is what its absence means,"
            raise ValueError(
                f"the OpenLM setting {key}={value!r}{absent} is not supported, only "
                f"{' or '.join(map(repr, supported))}"
            )


def openlm_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the contents of a DCLM config.json of ours into OpenLM's.

    Those that it was made from are kept, but for the dtypes. Raises ValueError where OpenLM cannot describe the model.
    """
    settings = dict(config.get("openlm_settings") or _described(config))
    if config.get("dtype") is not None:
        settings.pop("dtype", None)
        settings["torch_dtype"] = config["dtype"]
    rounding = config.get("rope_dtype", TRAINED_ROPE_DTYPE)
    if rounding != settings.get("rope_dtype", TRAINED_ROPE_DTYPE):
        settings["rope_dtype"] = rounding
    return settings


def _described(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["intermediate_size"] != mlp_width(config["hidden_size"]):
        raise ValueError(
            f"OpenLM has no MLP of intermediate_size {config['intermediate_size']} beside hidden_size "
            f"{config['hidden_size']}"
        )
    return {
        **{key: values[0] for key, values in SUPPORTED.items()},
        "architectures": ["OpenLMForCausalLM"],
        "dim": config["hidden_size"],
        "model_type": MODEL_TYPE,
        "n_heads": config["num_attention_heads"],
        "n_layers": config["num_hidden_layers"],
        "norm_eps": config["rms_norm_eps"],
        "seq_len": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        **{key: config.get(key) for key in KEPT if key.endswith("_token_id")},
    }


def our_names(name: str) -> tuple[str, ...] | None:
    """Returns our names of the parts of an OpenLM tensor; None for a name that OpenLM does not have."""
    if name in OUTSIDE:
        return (OUTSIDE[name],)
    found = _LAYER.fullmatch(name)
    if found is None or found[2] not in INSIDE:
        return None
    return tuple(found[1] + part for part in INSIDE[found[2]])


def split_tensor(name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Returns the parts of an OpenLM tensor under our names; any other tensor as it is."""
    names = our_names(name) or (name,)
    return zip(names, tensor.chunk(len(names)) if len(names) > 1 else (tensor,), strict=True)


def split_locations(
    locations: Mapping[str, "Location"], layers: int, hidden: int, intermediate: int
) -> dict[str, "Location"]:
    """Returns the places of our tensors inside OpenLM's: byte ranges of whole rows.

    Raises ValueError naming a tensor that is missing, one that OpenLM does not have, or a fused one of the wrong shape.
    """
    inside = [name for name in INSIDE if name != FREQUENCIES]
    for name in (*OUTSIDE, *(f"model.layers.{i}.{name}" for i in range(layers) for name in inside)):
        if name not in locations:
            raise ValueError(f"the checkpoint has no tensor {name}")
    heights = {
        "attention.in_proj.weight": 3 * hidden,
        "feed_forward.w12.weight": 2 * intermediate,
    }
    split = {}
    for name, location in locations.items():
        names = our_names(name)
        if names is None:
            raise ValueError(f"OpenLM has no tensor {name}")
        if len(names) == 1:
            split[names[0]] = location
            continue
        expected = (heights[name.split(".", 3)[3]], hidden)
        if location.shape != expected:
            raise ValueError(
                f"tensor {name} has shape {location.shape}, its config gives {expected}"
            )
        rows, size = expected[0] // len(names), location.bytes // len(names)
        for part, ours in enumerate(names):
            start = location.start + part * size
            split[ours] = replace(location, shape=(rows, hidden), start=start, stop=start + size)
    return split


def fused_names(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Returns the OpenLM tensors that ours are parts of, each with its parts in order.

    Raises ValueError naming a tensor of ours that OpenLM does not have, or one that lacks a part.
    """
    left = set(names)
    outside = {ours: name for name, ours in OUTSIDE.items()}
    inside = {part: name for name, parts in INSIDE.items() for part in parts}
    fused: dict[str, tuple[str, ...]] = {}
    for name in sorted(left):
        if name in outside:
            fused[outside[name]] = (name,)
            continue
        found = _LAYER.fullmatch(name)
        if found is None or found[2] not in inside:
            raise ValueError(f"OpenLM has no place for the tensor {name}")
        parts = tuple(found[1] + part for part in INSIDE[inside[found[2]]])
        missing = [part for part in parts if part not in left]
        if missing:
            raise ValueError(f"the tensor {missing[0]} is not there")
        fused[found[1] + inside[found[2]]] = parts
    return fused
