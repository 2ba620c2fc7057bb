"""A survey of real raylets: its report, and its refusals (different versions, unreachable folders and models)."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

import calibprune
import cluster as our_cluster
from calibprune.errors import UserError
from cluster import probe
from cluster.survey import check_survey, take_survey, unreachable, version_skew
from tests.cluster.nodes import cluster_of
from tests.jobs.command import calibprune_here


@pytest.fixture(scope="module")
def nodes():
    """A head and a node like it."""
    with cluster_of(1, 1) as found:
        yield found


@pytest.fixture(scope="module")
def differing(nodes, tmp_path_factory):
    """Starts a node with other packages and one without calibprune; returns (survey of all nodes, their two ids)."""
    other, bare = (tmp_path_factory.mktemp(name) for name in ("other", "bare"))
    for name, version in {"torch": "2.12.0+cpu", "transformers": "5.18.1"}.items():
        info = other / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for package in (calibprune, our_cluster):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, other / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "calibprune" / "errors.py").open("a") as file:
        file.write("# another line\n")
    # the driver's folder comes first on every node's path, as if it were on a disk that all share
    (other / "sitecustomize.py").write_text("import calibprune, cluster\n")
    (bare / "sitecustomize.py").write_text("import sys\nsys.modules['calibprune'] = None\n")
    added = [nodes.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(f)}) for f in (other, bare)]
    yield take_survey(str(tmp_path_factory.mktemp("out"))), *(node.node_id for node in added)
    for node in added:
        nodes.remove_node(node)


def model_files(folder: Path) -> list[str]:
    return [str(folder / name) for name in ("config.json", "model.safetensors")]


def test_nodes_that_agree_are_told_and_nothing_is_left(nodes, tiny_llama, tmp_path):
    survey = take_survey(str(tmp_path / "out"), model_files(tiny_llama))
    check_survey(survey)
    assert len(survey.nodes) == 2 and not survey.silent
    for one in survey.nodes:
        assert one.facts["versions"] == probe.versions()
        assert one.facts["source"] == probe.source_hash()
        assert one.facts["memory_bytes"] == probe.memory()[0] > one.facts["free_memory_bytes"]
        assert one.node.total == {"CPU": 1} and one.facts["temp_free_bytes"] > 0
    assert not list((tmp_path / "out").iterdir())


def test_what_a_node_cannot_reach_is_named_with_the_reason(nodes, tiny_llama, tmp_path):
    (tmp_path / "file").write_text("in the way")
    survey = take_survey(None, [str(tiny_llama / "config.json"), str(tmp_path / "no.safetensors")])
    with pytest.raises(
        UserError, match=r"the model cannot be read from .*not there: .*no.safetens"
    ):
        check_survey(survey)
    facts = probe.storage_errors(str(tmp_path / "file" / "out"))
    assert "file" in facts["output_error"] and facts["model_error"] is None


def test_a_folder_that_is_another_one_there_is_refused(tmp_path):
    """The same path on each machine's own disk is not a shared folder."""
    seen = str(tmp_path / "here" / "seen.tmp"), "what the driver wrote"
    (tmp_path / "here").mkdir()
    error = probe.storage_errors(str(tmp_path / "there"), seen)["output_error"]
    assert error.startswith("it is a different folder there than here")
    Path(seen[0]).write_text(seen[1])
    assert probe.storage_errors(str(tmp_path / "there"), seen)["output_error"] is None


def test_a_store_without_credentials_is_told_without_any_address(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    error = probe.storage_errors("s3://bucket/run")["output_error"]
    assert re.match(r"access denied: cannot write s3://bucket/run/.*check that there are", error)


def test_versions_that_differ_name_package_version_and_node(differing):
    survey, other, _ = differing
    (node,) = [one for one in survey.nodes if one.node.id == other]
    assert node.facts["versions"]["torch"] == "2.12.0+cpu"
    skew, here = str(version_skew(survey)), probe.versions()
    for package, public in {"torch": "2.12.0", "transformers": "5.18.1"}.items():
        ours = str(here[package]).split("+")[0]
        assert re.search(rf"{package} is {ours} on .*and {public} on {re.escape(node.name)}", skew)
    assert re.search(rf"calibprune .*and {node.facts['source']} on {re.escape(node.name)}", skew)
    assert "vllm is" not in skew and "ray is" not in skew and "Python is" not in skew
    with pytest.raises(UserError, match="versions differ: "):
        check_survey(survey)


def test_a_node_without_calibprune_is_told(differing):
    survey, _, bare = differing
    (node,) = [one for one in survey.nodes if one.node.id == bare]
    (told,) = unreachable(survey)
    assert f"output cannot be written from {node.name}: " in told and "calibprune" in told
    assert f"not installed on {node.name}" in str(version_skew(survey))


def test_a_run_is_refused_before_its_work_starts(differing, capsys, tiny_llama, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {tiny_llama}}}\noutput: {tmp_path / 'out'}\n"
        f"generate: {{samples: 20, max_tokens: 64}}\ncurate: {{sequences: 4, sequence_tokens: 64}}\n"
    )
    code, _, errors = calibprune_here(capsys, "run", config)
    assert code == 2 and len(errors.strip().splitlines()) == 1
    assert "error: versions differ: " in errors and "output cannot be written from" in errors
    assert not list((tmp_path / "out").iterdir())


def test_a_node_that_does_not_answer_is_named(nodes):
    stuck = nodes.add_node(num_cpus=1)
    process = stuck.all_processes["raylet"][0].process
    take_survey()  # starts the processes of the others
    os.kill(process.pid, signal.SIGSTOP)
    try:
        survey = take_survey(timeout_seconds=8)
    finally:
        os.kill(process.pid, signal.SIGCONT)
        nodes.remove_node(stuck, allow_graceful=False)
    told = [(node.id, why) for node, why in survey.silent]
    assert told == [(stuck.node_id, "no answer within 8 s")]
    assert stuck.node_id not in {one.node.id for one in survey.nodes}
