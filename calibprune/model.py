"""A causal language model without its weights: built on the meta device, filled and emptied module by module.

There is no table of architectures: the decoder layers are the only list of modules whose length is the config's
number of layers, and the `torch.nn.Linear`s inside them are pruned.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from calibprune.checkpoint import Checkpoint, local_side_files
from calibprune.config.model import ModelSettings
from calibprune.errors import StoreUnavailable, UserError
from calibprune.models import register
from calibprune.redact import one_line

_TORCH_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16
}  # fmt: skip


MAX_LAYERS = 10_000
MAX_BUFFER_BYTES = 1 << 30
"""Bytes of rotary tables and masks that a model may have beyond the size of its checkpoint."""


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, and the checkpoint that holds its tensors."""

    model: Any
    """A transformers PreTrainedModel with a language modelling head."""
    checkpoint: Checkpoint
    layers_path: str
    """Dotted path of the decoder layers, such as `model.layers`."""
    dtype: torch.dtype
    """dtype of the forwards."""
    device: torch.device

    @cached_property
    def layers(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.layers_path))

    @cached_property
    def outer_modules(self) -> dict[str, nn.Module]:
        """Modules outside the decoder layers that hold parameters themselves: embedding, norm, head."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if not name.startswith(f"{self.layers_path}.")
            and next(module.parameters(recurse=False), None) is not None
        }

    @cached_property
    def _alias(self) -> dict[str, str]:
        """Name under which the checkpoint stores a tied parameter, by each name that it does not store."""
        first: dict[int, str] = {}
        named = list(self.model.named_parameters(remove_duplicate=False))
        for name, parameter in named:
            if name in self.checkpoint.locations:
                first.setdefault(id(parameter), name)
        return {
            name: first[id(parameter)]
            for name, parameter in named
            if name not in self.checkpoint.locations and id(parameter) in first
        }

    @cached_property
    def parameters(self) -> set[str]:
        """Checkpoint names of the model's parameters."""
        named = self.model.named_parameters(remove_duplicate=False)
        return {self.stored_name(name) for name, _ in named}

    def stored_name(self, name: str) -> str:
        """Returns the name under which the checkpoint stores a parameter, which differs for a tied one."""
        return self._alias.get(name, name)

    def layer_prefix(self, index: int) -> str:
        return f"{self.layers_path}.{index}."

    def layer_tensors(self, index: int) -> list[str]:
        """Lists the checkpoint names of everything stored under one decoder layer."""
        prefix = self.layer_prefix(index)
        return sorted(name for name in self.checkpoint.locations if name.startswith(prefix))

    def rest_tensors(self) -> list[str]:
        """Lists the checkpoint names of everything outside the decoder layers."""
        prefixes = tuple(self.layer_prefix(index) for index in range(len(self.layers)))
        return sorted(n for n in self.checkpoint.locations if not n.startswith(prefixes))

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Finds the prunable linears of a decoder layer by their path inside it."""
        found = self.layers[index].named_modules()
        return {name: module for name, module in found if isinstance(module, nn.Linear)}

    def fused(self, index: int) -> list[str]:
        """Lists the paths of a decoder layer's parameters that hold several matrices, as fused experts do."""
        return [name for name, p in self.layers[index].named_parameters() if p.dim() > 2]

    def place(self, module: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Puts weights, given by checkpoint name, into a module, in the forwards' dtype, on the device."""
        for path, owner in module.named_modules():
            for leaf in list(owner._parameters):
                if owner._parameters[leaf] is None:
                    continue
                name = f"{prefix}{path}.{leaf}" if path else f"{prefix}{leaf}"
                tensor = tensors[self.stored_name(name)].to(self.device, self.dtype)
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises UserError naming a weight, among tensors by checkpoint name, that holds a NaN or an infinity.

        Buffers may hold infinities, as masks do.
        """
        for name in sorted(tensors.keys() & self.parameters):
            tensor = tensors[name]
            if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or not tensor.numel():
                continue
            if not torch.stack(torch.aminmax(tensor)).isfinite().all():
                raise UserError(
                    f"{self.checkpoint.url}: the weights of {name} are not finite: they hold a NaN or an infinity; "
                    f"use an intact checkpoint"
                )

    def place_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        self.place(self.layers[index], self.layer_prefix(index), tensors)

    @staticmethod
    def evict(module: nn.Module) -> None:
        """Frees a module's weights."""
        for owner in module.modules():
            for leaf, parameter in owner._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    empty = torch.empty_like(parameter, device="meta")
                    owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)


def read_config(settings: ModelSettings, folder: str) -> Any:
    """Reads the transformers config of a causal language model from a local folder with its side files.

    Raises UserError for a missing or unreadable config, an encoder, or an unknown architecture.
    """
    # Imported late, here and below: transformers' Auto classes create a folder for compiled code on import, and a
    # worker's process must choose that folder first.
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    trust = settings.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    except Exception as error:  # untrusted input raises anything
        raise UserError(f"cannot use the model at {settings.path}: {_hint(error)}") from None
    architectures = list(config.architectures or ())
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    known = type(config) in AutoModelForCausalLM._model_mapping or hasattr(config, "auto_map")
    if not causal or encoder_decoder or not known:
        raise UserError(
            f"{settings.path} is not a causal language model that calibprune can prune: its "
            f"architecture is {', '.join(architectures) or config.model_type}"
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        raise UserError(
            f"{settings.path}: its config.json has num_hidden_layers {layers}, not a number from 1 to {MAX_LAYERS}"
        )
    if settings.rope_dtype is not None:
        if not hasattr(config, "rope_dtype"):
            raise UserError(
                f"model.rope_dtype is a setting for DCLM, {settings.path} is of the type {config.model_type}"
            )
        config.rope_dtype = settings.rope_dtype
    return config


def build_skeleton(
    settings: ModelSettings,
    device: torch.device | str = "cpu",
    hashes: Mapping[str, str] | None = None,
) -> Skeleton:
    """Builds the model without weights and checks it against the checkpoint's headers.

    Raises UserError when the architecture cannot be pruned or the checkpoint lacks tensors it needs.
    """
    checkpoint = Checkpoint(settings.path, hashes)
    # the folder holds a model's own code, which is needed until the model is built
    with local_side_files(checkpoint.url) as folder:
        config = read_config(settings, folder)
        layers = config.get_text_config().num_hidden_layers
        if layers > len(checkpoint.locations):
            raise UserError(
                f"{settings.path}: its config.json has num_hidden_layers {layers}, its checkpoint has only "
                f"{len(checkpoint.locations)} tensors"
            )
        _take_our_names(checkpoint, config, settings.path)
        dtype, device = forward_dtype(settings, config, checkpoint), _one_device(device)

        def build(context: AbstractContextManager[Any]) -> Skeleton:
            try:
                with context:
                    model = _from_config(config, dtype, settings.trust_remote_code)
            except Exception as error:  # untrusted input raises anything
                raise UserError(
                    f"cannot build the model at {settings.path}: {_hint(error)}"
                ) from None
            model.eval()
            model.tie_weights()
            return Skeleton(model, checkpoint, _layers_path(model, config), dtype, device)

        # The outline takes no memory. Only a model that matches its checkpoint gets buffers and, for a moment, norms.
        outline = build(torch.device("meta"))
        _check_tensors(outline, settings.path)
        _check_buffers(outline, settings.path)
        skeleton = build(init_empty_weights(include_buffers=False))
    _place_buffers(skeleton.model, checkpoint, device)
    _ = skeleton.parameters  # tied weights can be recognised only before any weight is put in place
    return skeleton


def _take_our_names(checkpoint: Checkpoint, config: Any, path: str) -> None:
    """Replaces the places of tensors in OpenLM's layout by those of our tensors inside them."""
    from calibprune.models import openlm

    if config.model_type != openlm.MODEL_TYPE:
        return
    try:
        checkpoint.locations = openlm.split_locations(
            checkpoint.locations,
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def config_of_pruned(settings: ModelSettings, url: str) -> bytes | None:
    """Returns the config.json of a checkpoint with this model's tensors under our names; None where that is the model's
    own config.json."""
    with local_side_files(url) as folder:
        config = read_config(settings, folder)
    from calibprune.models.dclm import DclmConfig, OpenLMConfig

    if not isinstance(config, OpenLMConfig) and settings.rope_dtype is None:
        return None
    return DclmConfig.under_our_names(config).to_json_string().encode()


def _check_buffers(skeleton: Skeleton, path: str) -> None:
    """Raises UserError where a config asks for buffers that are large compared to the weights."""
    size = sum(buffer.nbytes for buffer in skeleton.model.buffers())
    most = skeleton.checkpoint.bytes + MAX_BUFFER_BYTES
    if size > most:
        raise UserError(
            f"{path}: its config.json asks for buffers of {size:,} bytes, more than the {most:,} that a checkpoint of "
            f"this size may have"
        )


def _one_device(device: torch.device | str) -> torch.device:
    """Adds the number of a GPU, since PyTorch treats "cuda" and "cuda:0" as different devices."""
    device = torch.device(device)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def _place_buffers(model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> None:
    """Moves rotary tables and other buffers to the device, with the checkpoint's values where it stores them."""
    persistent = model.state_dict(keep_vars=True)
    buffers = [name for name, _ in model.named_buffers() if name in persistent]
    learned = checkpoint.read([name for name in buffers if name in checkpoint.locations])
    for path, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                value = learned.get(f"{path}.{leaf}" if path else leaf, buffer)
                module._buffers[leaf] = value.to(device, buffer.dtype)


def _from_config(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    build = partial(
        AutoModelForCausalLM.from_config, config, dtype=dtype, trust_remote_code=trust_remote_code
    )
    try:
        return build(attn_implementation="sdpa")  # its causal mask is implicit and takes no memory
    except ValueError:
        return build(
            attn_implementation="eager"
        )  # for the few models that have no other, such as gpt-oss


def forward_dtype(settings: ModelSettings, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """Returns the dtype of the settings or, for `auto`, the one that most of the checkpoint's bytes have."""
    if settings.dtype != "auto":
        return _TORCH_DTYPES[settings.dtype]
    bytes_of: dict[torch.dtype, int] = {}
    for location in checkpoint.locations.values():
        bytes_of[location.dtype] = bytes_of.get(location.dtype, 0) + location.bytes
    dtype = max(bytes_of, key=lambda dtype: bytes_of[dtype])
    if dtype not in _TORCH_DTYPES.values():
        raise UserError(
            f"{settings.path} is stored in {dtype}: set model.dtype to float32, float16 or bfloat16"
        )
    return dtype


def load_tokenizer(url: str, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer beside a checkpoint. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    register()
    try:
        with local_side_files(url) as folder:
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except StoreUnavailable:
        raise
    except Exception as error:  # untrusted input raises anything
        raise UserError(f"cannot read the tokenizer of {url}: {_hint(error)}") from None


def check_tokenizer(tokenizer: Any, skeleton: Skeleton, path: str) -> None:
    """Raises UserError where texts may become token ids that the model has no embedding for.

    A special token without an embedding is accepted, such as the image token of a text model that was made from a
    multimodal one, unless texts begin or end with it.
    """
    rows = skeleton.model.get_input_embeddings().num_embeddings
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    added = tokenizer.added_tokens_decoder
    beyond = {
        token: name
        for name, token in tokenizer.get_vocab().items()
        if token >= rows and (token not in added or not added[token].special or token in ends)
    }
    if beyond:
        largest = max(beyond)
        raise UserError(
            f"{path}: its tokenizer gives token ids up to {largest} ({one_line(repr(beyond[largest]))}), the model has "
            f"embeddings for {rows}: take the tokenizer that was saved with the model"
        )


def _hint(error: Exception) -> str:
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return (
            "it brings Python code of its own, which is not run; set model.trust_remote_code=true if you have read "
            "that code and trust it"
        )
    return (
        f"{type(error).__name__}: {one_line(error)}"
        if isinstance(error, LookupError)
        else one_line(error)
    )


def context_tokens(config: Any) -> int | None:
    """Returns the longest sequence that the model was made for; None where the config does not give it."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _layers_path(model: nn.Module, config: Any) -> str:
    count = config.get_text_config().num_hidden_layers
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(found)} lists of {count} modules, not one: its decoder layers cannot be "
            f"told apart from {', '.join(found) or 'the rest'}"
        )
    return found[0]


def _check_tensors(skeleton: Skeleton, path: str) -> None:
    named: dict[str, Tensor] = dict(skeleton.model.named_parameters(remove_duplicate=False))
    locations = skeleton.checkpoint.locations
    missing = [name for name in named if skeleton.stored_name(name) not in locations]
    fused = [name for name in missing if named[name].dim() > 2]
    if fused:
        raise UserError(
            f"{path}: its model holds experts as one fused tensor ({fused[0]}), its checkpoint does not: "
            f"mixture-of-experts models of this kind are not supported"
        )
    if missing:
        raise UserError(
            f"the checkpoint at {path} has no tensor {missing[0]}, which its model needs"
        )
    for name, parameter in named.items():
        location = locations[skeleton.stored_name(name)]
        if location.shape != tuple(parameter.shape):
            raise UserError(
                f"tensor {name} of {path} has shape {location.shape}, "
                f"its config gives {tuple(parameter.shape)}"
            )
    for index in range(len(skeleton.layers)):
        for name in skeleton.linears(index):
            location = skeleton.checkpoint.locations[f"{skeleton.layer_prefix(index)}{name}.weight"]
            if location.dtype not in _TORCH_DTYPES.values():
                raise UserError(f"{path}: {name} of layer {index} is quantised ({location.dtype})")
    if not skeleton.linears(0):
        raise UserError(f"{path}: its decoder layers hold no torch.nn.Linear to prune")
