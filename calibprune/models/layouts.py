"""Copies a DCLM checkpoint from OpenLM's layout to ours and back, one layer at a time, without changing a bit of it."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calibprune import storage
from calibprune.checkpoint import INDEX, Checkpoint, index_bytes, side_files, to_bytes
from calibprune.config.model import ModelSettings
from calibprune.errors import UserError
from calibprune.model import build_skeleton, config_of_pruned
from calibprune.models import openlm

LAYOUTS = {"openlm": "openlm", "transformers": "dclm"}
"""The model_type of each layout's config.json."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def export(source: str, target: str, layout: str) -> int:
    """Writes the checkpoint at `source` in one of LAYOUTS to the folder `target`; returns the bytes of its tensors.

    The index is written last, so that a folder without one is incomplete: the same call then writes it again. Raises
    UserError for a model other than DCLM, one that has the layout already, and a folder that holds a checkpoint.
    """
    settings = ModelSettings(path=source)
    skeleton = build_skeleton(settings)
    checkpoint, config = skeleton.checkpoint, skeleton.model.config
    if config.model_type not in LAYOUTS.values():
        raise UserError(f"{source} is of the type {config.model_type}, only DCLM has layouts")
    if config.model_type == LAYOUTS[layout]:
        raise UserError(f"{source} is in the layout {layout} already")
    if INDEX in storage.names(target):
        raise UserError(f"{target} holds a checkpoint already: choose another folder")
    try:
        if layout == "openlm":
            parts = openlm.fused_names(checkpoint.locations)
            stored = storage.read_json(storage.join(checkpoint.url, "config.json"))
            described = json.dumps(openlm.openlm_settings(stored), indent=2).encode()
        else:
            parts = {name: (name,) for name in checkpoint.locations}
            described = config_of_pruned(settings, checkpoint.url)
            assert described is not None
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    weight_map = _write_tensors(checkpoint, parts, target)
    for name in side_files(checkpoint.url):
        if name != "config.json":
            data = storage.read_bytes(storage.join(checkpoint.url, name))
            storage.write(storage.join(target, name), data)
    storage.write(storage.join(target, "config.json"), described)
    storage.write(storage.join(target, INDEX), index_bytes(weight_map, checkpoint.bytes))
    return checkpoint.bytes


def _write_tensors(
    checkpoint: Checkpoint, parts: Mapping[str, Sequence[str]], target: str
) -> dict[str, str]:
    """Writes each tensor, made of the rows of its parts, with the others of its layer; returns the file of each."""
    shards: dict[int, list[str]] = defaultdict(list)
    for name in parts:
        layer = _LAYER.match(name)
        shards[int(layer[1]) + 1 if layer else 0].append(name)
    weight_map = {}
    for number, (_, names) in enumerate(sorted(shards.items()), 1):
        read = checkpoint.read(part for name in names for part in parts[name])
        tensors = {name: _joined([read.pop(part) for part in parts[name]]) for name in names}
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        storage.write(storage.join(target, file), to_bytes(tensors))
        weight_map |= dict.fromkeys(names, file)
    return weight_map


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
