"""DCLM (Li et al. 2024, https://arxiv.org/abs/2406.11794) for transformers: OpenLM's architecture under LLaMA's names.

A decoder like LLaMA's, with three differences: the norms are LayerNorm without bias, queries and keys are normed over
their full width before they are cut into heads, and the rotary frequencies are rounded as they were in training.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import Olmo2Config
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.olmo2 import modeling_olmo2 as olmo2

from calibprune.models import openlm

ROPE_DTYPES = ("bfloat16", "float16", "float32")


class DclmConfig(Olmo2Config):
    """Raises ValueError for what DCLM does not have."""

    model_type = "dclm"

    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = openlm.END_OF_TEXT
    rope_dtype: str = openlm.TRAINED_ROPE_DTYPE
    """dtype to which the rotary frequencies are rounded. OpenLM rounds them to that of the activations: bfloat16 in
    training, float16 where its code runs in float16. float32 is the textbook's rotary embedding, another function."""
    openlm_settings: dict[str, Any] | None = None
    """The contents of the OpenLM config.json that this configuration was made from."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.rope_dtype not in ROPE_DTYPES:
            raise ValueError(f"rope_dtype is {self.rope_dtype!r}, none of {', '.join(ROPE_DTYPES)}")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError("DCLM has as many heads of keys and values as of queries")
        if (self.rope_parameters or {}).get("rope_type", "default") != "default":
            raise ValueError(f"DCLM has no rotary embedding of the type {self.rope_parameters!r}")

    @staticmethod
    def under_our_names(config: "DclmConfig") -> "DclmConfig":
        """Returns the configuration of the same model with its tensors under our names."""
        own = {"model_type": DclmConfig.model_type, "architectures": ["DclmForCausalLM"]}
        return DclmConfig.from_dict(config.to_dict() | own)


class OpenLMConfig(DclmConfig):
    """The configuration of a published checkpoint, whose tensors have OpenLM's names and fusions."""

    model_type = openlm.MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """Reads the contents of an OpenLM config.json. Raises ValueError naming what is not supported in them."""
        settings = openlm.model_settings(config_dict)
        return super().from_dict(settings | {"architectures": ["OpenLMForCausalLM"]}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns what is saved: OpenLM's settings, as the tensors are saved under OpenLM's names."""
        return openlm.openlm_settings(self.to_dict())


class DclmRotaryEmbedding(nn.Module):
    """Computes cosines and sines from rounded frequencies.

    It has no buffers, so that the model's dtype does not decide about the rounding.
    """

    def __init__(self, config: DclmConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        parameters: dict[str, Any] = dict(config.rope_parameters or {})
        self.theta = float(parameters.get("rope_theta", 10000.0))
        self.dtype = getattr(torch, config.rope_dtype)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tables of cosines and of sines, [batch, tokens, head_dim], in float32, or float64 as x is."""
        evens = torch.arange(0, self.head_dim, 2, device=x.device, dtype=torch.float32)
        frequencies = (1.0 / self.theta ** (evens / self.head_dim)).to(self.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = position_ids[..., None].to(wide) * frequencies.to(wide)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class FullWidthNorm(nn.LayerNorm):
    """LayerNorm without bias over all heads, of which a vLLM worker has only some with tensor parallelism."""

    def forward(self, input: Tensor) -> Tensor:
        here, width = input.shape[-1], self.weight.shape[0]
        if here == width:
            return super().forward(input)
        from vllm.distributed import (
            get_tensor_model_parallel_rank,
            tensor_model_parallel_all_gather,
        )

        normed = super().forward(tensor_model_parallel_all_gather(input.contiguous()))
        return normed.split(here, dim=-1)[get_tensor_model_parallel_rank()].contiguous()


class DclmAttention(olmo2.Olmo2Attention):
    def __init__(self, config: DclmConfig, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx)
        self.q_norm = FullWidthNorm(config.hidden_size, eps=config.rms_norm_eps, bias=False)
        self.k_norm = FullWidthNorm(config.hidden_size, eps=config.rms_norm_eps, bias=False)


class DclmDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: DclmConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = DclmAttention(config, layer_idx)
        self.mlp = olmo2.Olmo2MLP(config)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DclmModel(olmo2.Olmo2Model):
    config_class = DclmConfig
    _no_split_modules: ClassVar[list[str]] = ["DclmDecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": DclmDecoderLayer,
        "attentions": DclmAttention,
    }
    # The frequencies that OpenLM stores with every layer; ours are computed.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"self_attn\.rotary_emb\.inv_freq$"]

    def __init__(self, config: DclmConfig) -> None:
        olmo2.Olmo2PreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DclmDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = _norm(config)
        self.rotary_emb = DclmRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class DclmForCausalLM(olmo2.Olmo2ForCausalLM):
    config_class = DclmConfig
    _no_split_modules: ClassVar[list[str]] = ["DclmDecoderLayer"]

    def __init__(self, config: DclmConfig) -> None:
        olmo2.Olmo2PreTrainedModel.__init__(self, config)
        self.model = DclmModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class OpenLMModel(DclmModel):
    config_class = OpenLMConfig


class OpenLMForCausalLM(DclmForCausalLM):
    config_class = OpenLMConfig


def _norm(config: DclmConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps, bias=False)


def register_published_names() -> None:
    """Makes `from_pretrained` split and rename the tensors of a published checkpoint, and `save_pretrained` undo it."""
    names = {**{name: (ours,) for name, ours in openlm.OUTSIDE.items()}, **openlm.INSIDE}
    mapping: list[WeightConverter | WeightRenaming] = []
    for name, ours in names.items():
        if len(ours) > 1:
            mapping.append(WeightConverter(name, list(ours), operations=[Chunk(dim=0)]))
        elif (name,) != ours:
            mapping.append(WeightRenaming(name, ours[0]))
    register_checkpoint_conversion_mapping(openlm.MODEL_TYPE, mapping, overwrite=True)
