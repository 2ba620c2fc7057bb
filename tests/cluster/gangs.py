"""Pruning with gangs in tests: models, a pool, the files of a run without a gang, and runs that survive failures."""

from collections.abc import Iterator
from pathlib import Path

import torch

from calibprune.config.model import ClusterSettings, ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.events import Event
from calibprune.pruning.layer import layer_unit
from calibprune.stage import Stage
from cluster.gang_driver import run_gang
from cluster.label import label_of
from cluster.places import Bundle
from tests.hearing import Hearing

LAYERS = 5
BUNDLE = Bundle(cpus=1, gpus=0)
SETTINGS = ClusterSettings(start_timeout_seconds=280)
TOKENS = torch.randint(0, 258, (11, 40), generator=torch.Generator().manual_seed(1))
GENERATED = torch.arange(40) >= torch.tensor([2, 9, 40, 40, 38, 1, 20, 0, 40, 40, 40])[:, None]
"""Positions that count in one of the pools; none in the second and in the last micro-batch of two sequences."""
WAYS = [
    {"method": {"type": method}, "pattern": pattern, "batch_sequences": 2}
    for method in ("wanda", "sparsegpt")
    for pattern in ("unstructured", "2:4")
]
MORE_WAYS = [
    {"method": {"type": "alps", "max_iterations": 12}, "batch_sequences": 2, "sparsity": 0.6},
    {"method": "ria", "refine": {"type": "swaps", "max_swaps": 5}, "batch_sequences": 2,
     "allocation": {"type": "owl", "m": 2}},
    {"method": "dsnot", "pattern": "4:8", "batch_sequences": 2, "allocation": "alphapruning"},
]  # fmt: skip
"""Settings that together cover the other methods, refinement, and allocations that measure the model."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shards(stage: Stage) -> dict[str, bytes]:
    found = Path(stage.url, "checkpoint").glob("*.safetensors")
    return {path.name: path.read_bytes() for path in found}


class Run:
    """A pruning on a gang that has to survive its failpoints."""

    def __init__(self, models, pool, folder: Path, heard: Hearing) -> None:
        self.stage, self.heard = Stage(str(folder)), heard
        self.way = WAYS[2]
        settings = PruneSettings.model_validate(self.way | {"layer_timeout_seconds": None})
        self.arguments = (ModelSettings(path=models["float32"]), settings, pool, self.stage.url)

    def events(self, workers: int = 2, **options) -> Iterator[Event]:
        return run_gang(
            "prune", self.arguments, workers=workers, bundle=BUNDLE, cluster=SETTINGS,
            stage=self.stage, unit_of=layer_unit, label=label_of(self.stage.url), **options,
        )  # fmt: skip

    def __call__(self, workers: int = 2, **options) -> "Run":
        for _ in self.events(workers, **options):
            pass
        return self

    @property
    def losses(self) -> list[str]:
        return [str(loss) for loss in self.heard.losses]
