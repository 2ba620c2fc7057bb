"""Identities of the stages of the shipped configurations: runs that earlier versions began can be resumed.

A difference from the recorded values refuses every run that was begun before: change them only where the result
changes. Left out are versions of libraries and hashes of this test's own data.
"""

import json
from pathlib import Path

import pytest

from calibprune.config.load import load_config
from calibprune.errors import UserError
from calibprune.stage import flat
from jobs.run import Run
from jobs.stages import module

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
RECORDED = json.loads((Path(__file__).parent / "identities.json").read_text())
STAGES = ("generate", "curate", "prune", "evaluate")
CPUS = ["cluster.workers=2", "cluster.gpus_per_worker=0", "cluster.cpus_per_worker=1"]


class OfTest:
    """Stands for a pool; only its identity matters."""

    identity = "pool"


def test_every_shipped_configuration_is_recorded():
    assert RECORDED.keys() == {config.stem for config in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_identities_and_units_are_as_ever(tiny_llama, tmp_path, config):
    overrides = [f"model.path={tiny_llama}", f"output={tmp_path}", "model.dtype=auto", *CPUS]
    run = Run(load_config(str(config), overrides), STAGES)
    run.__dict__ |= {"windows": {}, "pool": OfTest()}
    run.stage("prune").plan({}, [])
    run.stage("prune").finish()
    run.stage("generate").plan({"model": run.model_identity}, [])
    run.stage("generate").finish({"model": run.model_identity})
    for name in STAGES:
        plan = module(name).plan(run)
        assert plan is not None
        identity = json.loads(json.dumps(flat(plan.identity)))
        found = {key: value for key, value in identity.items() if not key.startswith("versions.")}
        found["model"] = "model" if "model" in identity else None
        for key in found:
            if key == "pruned" or key.startswith("generated."):
                found[key] = {"pruned": "pruned"}.get(key, "content")
        units = list(plan.units)
        recorded = RECORDED[config.stem][name]
        assert found == recorded["identity"], name
        assert [len(units), units[:2], units[-2:]] == recorded["units"], name


def run_on_gpus(model: Path, output: Path, *more: str) -> Run:
    """Returns a run of a shipped configuration with one GPU for each worker."""
    config = next(path for path in CONFIGS if "wanda" in path.stem)
    where = [f"model.path={model}", f"output={output}", *CPUS, "cluster.gpus_per_worker=1"]
    return Run(load_config(str(config), [*where, *more]), STAGES)


def test_results_of_gpus_are_those_of_their_kind(tiny_llama, tmp_path):
    run = run_on_gpus(tiny_llama, tmp_path)
    kind = {"gpu": "NVIDIA H200", "multiprocessors": 132, "cuda": "13.0", "triton": "3.9.0"}
    run.__dict__ |= {"windows": {}, "pool": OfTest(), "gpu_kind": kind}
    plan = module("prune").plan(run)
    assert plan is not None
    run.stage("prune").plan(plan.identity, plan.units)
    again = plan.identity | {"device": kind | {"gpu": "NVIDIA A100"}}
    with pytest.raises(UserError, match=r"device\.gpu"):
        run.stage("prune").plan(again, plan.units)


def test_samples_that_any_batch_leaves_the_same_are_others(tiny_llama, tmp_path):
    identities = []
    for more in ([], ["generate.batch_invariant=true"], ["generate.pipeline_parallel=2"]):
        run = run_on_gpus(tiny_llama, tmp_path, *more)
        run.__dict__["gpu_kind"] = {"gpu": "NVIDIA H200"}
        plan = module("generate").plan(run)
        assert plan is not None
        identities.append(flat(plan.identity))
    default, invariant, in_parts = identities
    assert default == in_parts and "generate.batch_invariant" not in default
    more = {"generate.batch_invariant": True, "device.gpu": "NVIDIA H200"}
    assert invariant == default | more
