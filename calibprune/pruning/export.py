"""Completes a folder of pruned layers to a Hugging Face checkpoint: the other tensors, the index, the side files.

`config.json` is copied as it is: vLLM refuses a `sparsity_config`, so the facts of the pruning are in `pruning.json`.
"""

from collections.abc import Mapping

from torch import Tensor

from calibprune import __version__, storage
from calibprune.checkpoint import INDEX, index_bytes, side_files, to_bytes
from calibprune.config.prune import PruneSettings
from calibprune.stage import Record, Stage

REST = "rest"
ALLOCATION = "allocation"
"""Name of the unit with the measurements that the allocation is computed from."""
FOLDER = "checkpoint"


def copy_rest(tensors: Mapping[str, Tensor], stage: Stage) -> Record:
    """Commits the tensors outside the decoder layers, unchanged, as one shard."""
    published = stage.put(REST, to_bytes(tensors), "safetensors", FOLDER, "model")
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    facts = {
        "bytes_read": sum(sizes.values()),
        "bytes_written": published.bytes,
        "tensors": sizes,
    }
    return stage.commit(REST, published, facts)


def finish_checkpoint(stage: Stage, source_url: str, settings: PruneSettings) -> None:
    """Writes the index, the copied side files and `pruning.json` once every shard is committed."""
    folder = storage.join(stage.url, FOLDER)
    weight_map, total = {}, 0
    layers, allocation = [], None
    for record in stage.done(stage.read_plan()["units"]).values():
        if record.unit == ALLOCATION:
            allocation = record.facts
            continue
        assert record.file is not None
        for name, size in record.facts["tensors"].items():
            weight_map[name] = record.file.removeprefix(f"{FOLDER}/")
            total += size
        if record.unit != REST:
            layers.append({"layer": record.facts["layer"], "linears": record.facts["linears"]})
    for name in side_files(source_url):
        storage.write(
            storage.join(folder, name), storage.read_bytes(storage.join(source_url, name))
        )
    facts = {
        "calibprune": __version__,
        "settings": settings.model_dump(mode="json", exclude={"pool"}),
        "allocation": allocation,
        "sparsity": overall_sparsity([layer["linears"] for layer in layers]),
        "layers": layers,
    }
    storage.write_json(storage.join(folder, "pruning.json"), facts)
    storage.write(storage.join(folder, INDEX), index_bytes(weight_map, total))


def overall_sparsity(layers: list[dict]) -> float:
    """Returns the share of zeros in all pruned linears, from their recorded facts."""
    linears = [facts for layer in layers for facts in layer.values()]
    return sum(f["zeros"] for f in linears) / max(1, sum(f["parameters"] for f in linears))
