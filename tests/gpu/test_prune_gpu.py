"""Whole prunings on one GPU: bytes that do not depend on the number of workers, offloading, and memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.model import build_skeleton
from calibprune.pruning.memory import worker_memory
from tests.gpu.conftest import Size
from tests.gpu.gang_of import prune_model, pruned_by

SETTINGS: list[dict[str, Any]] = [
    {"method": {"type": "sparsegpt"}},
    {"method": {"type": "sparsegpt"}, "pattern": "2:4"},
    {"method": {"type": "wanda"}},
    {"method": {"type": "magnitude"}},
    {"method": {"type": "ria"}},
    {"method": {"type": "dsnot"}},
    {"method": {"type": "wanda"}, "refine": "swaps"},
    {"method": {"type": "alps", "max_iterations": 31}},
]


def job(model: Path, stage: Path, size: Size, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": str(model),
        "stage": str(stage),
        "settings": {"batch_sequences": 2, **settings},
        "sequences": size.sequences,
        "tokens": size.tokens,
    }


@pytest.fixture(scope="module")
def digests(
    device: torch.device, size: Size, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, str]]]:
    """By the number of workers, the sha256 of every unit that each of the settings makes."""
    return {
        workers: pruned_by(
            workers,
            device,
            [job(model, tmp_path_factory.mktemp(f"{workers}"), size, one) for one in SETTINGS],
        )
        for workers in (1, 2, 3)
    }


@pytest.mark.timeout(3600)  # the first one waits for the prunings of all
@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=[json.dumps(one) for one in SETTINGS])
def test_any_number_of_workers_writes_the_same_bytes(
    number: int, size: Size, digests: dict[int, list[dict[str, str]]]
):
    alone = digests[1][number]
    assert len(alone) == size.layers + 1
    assert digests[2][number] == alone
    assert digests[3][number] == alone


def test_hidden_states_in_host_memory_change_no_byte(
    device: torch.device, size: Size, model: Path, tmp_path: Path
):
    held, offloaded = (
        prune_model(device, **job(model, tmp_path / str(offload), size, {"offload": offload}))
        for offload in (False, True)
    )
    assert {u: r.sha256 for u, r in held.items()} == {u: r.sha256 for u, r in offloaded.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_a_worker_needs_the_memory_that_was_estimated(
    method: str, device: torch.device, size: Size, model: Path, tmp_path: Path
):
    if device.type == "cpu":
        pytest.skip("on CPUs `benchmarks/workers.py memory` measures it")
    settings = {"method": {"type": method}, "batch_sequences": 2, "offload": False}
    skeleton = build_skeleton(ModelSettings(path=str(model)), device)
    parsed = PruneSettings.model_validate(settings)
    estimate = worker_memory(skeleton, parsed, size.sequences, size.tokens, 1).bytes
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    prune_model(device, **job(model, tmp_path / "stage", size, settings))
    peak = torch.cuda.max_memory_allocated(device) - before
    assert 0.6 * estimate <= peak <= 1.1 * estimate
