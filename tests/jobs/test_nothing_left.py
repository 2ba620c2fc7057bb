"""After a run, and between its stages, every CPU of the cluster is free again and no actor is left."""

import pytest

from calibprune.config import Config
from calibprune.config.model import ClusterSettings
from cluster.session import connect
from jobs.pipeline import run_stages
from jobs.stages import COMMANDS
from tests.cluster.leftovers import assert_nothing_left
from tests.tiny import write_tiny_llama


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_leaves_the_cluster_as_it_was(tmp_path):
    model = write_tiny_llama(tmp_path / "model", layers=2, hidden=128)
    config = Config.model_validate(
        {
            "model": {"path": str(model)},
            "output": str(tmp_path / "out"),
            "cluster": {"workers": 2, "cpus_per_worker": 1},
            "generate": {"samples": 12, "max_tokens": 64, "min_tokens": 64, "engines": 1, "cpu_kvcache_gib": 1},
            "curate": {"sequences": 6, "sequence_tokens": 64},
            "prune": {"batch_sequences": 2},
            "evaluate": {
                "perplexity": [{"name": "docs", "path": "python-docs"}], "sequences": 2, "sequence_tokens": 64,
            },
        }
    )  # fmt: skip
    with connect(ClusterSettings()) as started_here:
        assert started_here
        for stage in COMMANDS:
            run_stages(config, [stage])
            assert_nothing_left()
    assert (tmp_path / "out" / "report" / "index.html").exists()
