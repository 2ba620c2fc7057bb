"""Fixtures for gangs: models and a pool on disk, failpoints that actors obey."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.model import build_skeleton
from calibprune.pruning.loop import prune_layers
from calibprune.stage import Stage
from tests.cluster.gangs import DTYPES, GENERATED, LAYERS, TOKENS, Run, shards
from tests.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def failpoints(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("failpoints")
    os.environ["CALIBPRUNE_FAILPOINTS"] = str(folder)
    yield folder
    del os.environ["CALIBPRUNE_FAILPOINTS"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: str(
            write_tiny_llama(
                folder / name, layers=LAYERS, hidden=128, intermediate=416, dtype=dtype, tied=name == "bfloat16"
            )
        )
        for name, dtype in DTYPES.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pool")
    table = pa.table({"token_ids": pa.array(TOKENS.tolist(), pa.list_(pa.int32()))})
    pq.write_table(table, folder / "pool.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def marked_pool(pool, tmp_path_factory) -> str:
    """The pool with positions marked as generated."""
    folder = tmp_path_factory.mktemp("marked-pool")
    table = pq.read_table(Path(pool) / "pool.parquet")
    marks = pa.array(GENERATED.tolist(), pa.list_(pa.bool_()))
    pq.write_table(table.append_column("generated", marks), folder / "pool.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """Prunes without a gang in this process; every other run must give the same files."""
    made: dict[tuple, dict[str, bytes]] = {}

    def files(dtype: str, way: dict, positions: torch.Tensor | None = None) -> dict[str, bytes]:
        key = (dtype, json.dumps(way, sort_keys=True), positions is None)
        if key not in made:
            stage = Stage(str(tmp_path_factory.mktemp("alone")))
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                skeleton = build_skeleton(ModelSettings(path=models[dtype]))
                settings = PruneSettings.model_validate(way)
                list(prune_layers(skeleton, TOKENS, settings, stage, positions=positions))
            finally:
                torch.set_num_threads(threads)
            made[key] = shards(stage)
        return made[key]

    return files


@pytest.fixture
def run(models, pool, tmp_path, heard) -> Run:
    return Run(models, pool, tmp_path / "run", heard)
