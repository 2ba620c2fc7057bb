"""DCLM in its published layout on a gang of real actors: the same bytes as without one, and the same perplexity."""

from dataclasses import asdict

import pytest
import torch

from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.evaluation.perplexity import sweep_perplexity
from calibprune.events import UnitDone, result_of
from calibprune.model import build_skeleton
from calibprune.pruning.loop import prune_layers
from calibprune.stage import Stage
from cluster.gang_driver import WorkerGroup
from tests.cluster.gangs import BUNDLE, SETTINGS, TOKENS, WAYS, shards
from tests.cluster.nodes import cluster_of
from tests.openlm import write_tiny_openlm

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_any_number_of_workers_writes_the_same_bytes(pool, tmp_path, one_thread, size):
    model = ModelSettings(path=str(write_tiny_openlm(tmp_path / "model")), dtype="bfloat16")
    ways = [PruneSettings.model_validate(way) for way in (WAYS[0], WAYS[3])]
    alone = []
    for number, settings in enumerate(ways):
        stage = Stage(str(tmp_path / f"alone-{number}"))
        list(prune_layers(build_skeleton(model), TOKENS, settings, stage))
        alone.append(shards(stage))
    windows = {"text": TOKENS[:4]}
    perplexity = result_of(sweep_perplexity(build_skeleton(model), windows, 1))["text"]
    with cluster_of(2, 1), WorkerGroup(size, BUNDLE, SETTINGS) as group:
        for number, settings in enumerate(ways):
            stage = Stage(str(tmp_path / str(number)))
            for _ in group.events("prune", (model, settings, pool, stage.url), None):
                pass
            assert shards(stage) == alone[number] != {}
        stage = Stage(str(tmp_path / "evaluate"))
        arguments = (model, windows, 1, None, stage.url, "dense")
        events = list(group.events("evaluate", arguments, None))
        (done,) = (event for event in events if isinstance(event, UnitDone))
        assert done.record.facts["perplexity"] == {"text": asdict(perplexity)}
