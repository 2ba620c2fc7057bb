"""Checks of clusters unlike this machine: GPUs of different sizes, builds for some CUDA, heads without vLLM."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from calibprune.errors import UserError
from cluster import probe
from cluster.gpus import check_gpus, kind
from cluster.places import Bundle, Need, Node
from cluster.survey import Survey, Surveyed, version_skew
from jobs.preflight import assess

ROOT, PACKAGES = Path(__file__).parents[2], ("calibprune", "cluster", "jobs")
GIB = 1 << 30
GPU = {"name": "NVIDIA H100 80GB HBM3", "bytes": 80 * GIB, "free_bytes": 79 * GIB}


CUDA = {
    "driver": 13000, "error": None, "built_for": "13.0", "triton": "3.9.0",
    "devices": [{"name": GPU["name"], "multiprocessors": 132}] * 8,
}  # fmt: skip


def node(
    name, *, gpus=0, memory=64, torch="2.13.0+cu130", vllm="0.33.0", cpus=8, free=None, **more
):
    total = {"CPU": float(cpus), "GPU": float(gpus)} if gpus else {"CPU": float(cpus)}
    versions = {"torch": torch, "transformers": "5.19.0", "ray": "2.60.0", "vllm": vllm}
    facts = {
        "host": name, "python": "3.12.4", "versions": versions, "source": "0123456789ab",
        "gpus": more.pop("found", [GPU] * gpus), "memory_bytes": memory * GIB, "free_memory_bytes": memory * GIB,
        "cuda": CUDA if gpus else None, "compiler_lacks": None,
    } | more  # fmt: skip
    return Surveyed(Node(name * 8, f"10.0.0.{name}", total, total if free is None else free), facts)


def survey(*nodes):
    driver = node("d", torch="2.13.0+cpu", vllm=None).facts
    return Survey(nodes, (), driver)


def need(**changes):
    values = {
        "stage": "prune", "actor": "worker", "count": 4, "least": 4, "bundle": Bundle(1, 1), "host_bytes": 4 * GIB,
        "gpu_bytes": 20 * GIB, "movable_bytes": 15 * GIB, "gpu_share": 0.9, "work": "",
    }  # fmt: skip
    return Need(**(values | changes))


TWO = survey(node("1", gpus=2), node("2", gpus=2))


@pytest.mark.parametrize(
    ("changes", "missing", "note"),
    [
        ({}, None, None),
        ({"gpu_bytes": 85 * GIB}, None, "the smallest has 80.0 GiB: 15.0 GiB move to host memory"),
        ({"gpu_bytes": 90 * GIB}, "a worker needs 90.0 GiB on every GPU", None),
        ({"host_bytes": 33 * GIB}, "4 workers of 33.0 GiB of host memory do not fit", None),
        # what moves to host memory counts as host memory
        ({"gpu_bytes": 85 * GIB, "host_bytes": 20 * GIB}, "4 workers of 35.0 GiB of host", "move"),
        ({"count": 5, "least": 5}, "5 x (1 CPU, 1 GPU) were asked for", None),
        ({"actor": "engine", "count": 5, "least": 1}, None, "room for 4 of 5 engines; the others"),
        ({"actor": "engine", "movable_bytes": 0, "gpu_bytes": 73 * GIB}, "an engine needs", None),
        ({"bundle": Bundle(1, 3)}, "no node has room for 1 CPU, 3 GPU", None),
    ],
)
def test_what_a_stage_needs_is_held_against_the_nodes(changes, missing, note):
    problems, notes = assess(need(**changes), TWO)
    assert bool(problems) == (missing is not None) and bool(notes) == (note is not None)
    assert (missing or "") in " ".join(problems) and (note or "") in " ".join(notes)


def test_a_node_that_gave_no_answer_may_have_the_memory():
    bare = Node("3" * 8, "10.0.0.3", {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0})
    silent = Survey(TWO.nodes[:1], ((bare, "no answer within 60 s"),), TWO.driver)
    assert assess(need(host_bytes=30 * GIB), silent) == ([], [])
    (missing,), _ = assess(need(host_bytes=33 * GIB), silent)  # the node that answered has not
    assert "4 workers of 33.0 GiB of host memory do not fit" in missing


def test_busy_places_are_no_reason_to_refuse():
    busy = survey(node("1", gpus=2, free={"CPU": 8.0}), node("2", gpus=2))
    problems, (note,) = assess(need(), busy)
    assert not problems and "find 2 places free and 2 busy now" in note


def test_a_driver_and_a_head_without_gpus_need_no_vllm_and_no_cuda():
    head = node("1", torch="2.13.0+cpu", vllm=None)
    assert version_skew(survey(head, node("2", gpus=8), node("3", gpus=8))) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"torch": "2.13.0+cu126"}, "torch's build is 2.13.0+cu130 on 2 10.0.0.2 and 2.13.0+cu126"),
        ({"torch": "2.12.1+cu130"}, "torch is 2.13.0 on 2 10.0.0.2, this machine and 2.12.1 on 3"),
        ({"vllm": None}, "vllm is 0.33.0 on 2 10.0.0.2 and not installed on 3 10.0.0.3"),
        ({"vllm": "0.32.0"}, "vllm is 0.33.0 on 2 10.0.0.2 and 0.32.0 on 3 10.0.0.3"),
    ],
)
def test_workers_that_differ_are_told(change, told):
    skew = version_skew(survey(node("2", gpus=8), node("3", gpus=8, **change)))
    assert skew is not None and told in skew


def test_every_package_of_ours_counts_for_the_version(tmp_path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.pyc"))
    hashes = {_hash_at(tmp_path)}
    for package in PACKAGES:
        with (tmp_path / package / "__init__.py").open("a") as file:
            file.write("# another line\n")
        hashes.add(_hash_at(tmp_path))
    assert len(hashes) == 1 + len(PACKAGES)


def _hash_at(folder):
    code = "from cluster.probe import source_hash; print(source_hash())"
    line = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, check=True).stdout


def test_gpus_are_read_off_the_lines_of_nvidia_smi(tmp_path, monkeypatch):
    """The lines are as one H100 and one smaller GPU print them."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe.gpus() is None
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 81081'\necho 'NVIDIA L4, 23034, 22565'\n"
    )
    script.chmod(0o755)
    assert probe.gpus() == [
        {"name": "NVIDIA H100 80GB HBM3", "bytes": 81559 << 20, "free_bytes": 81081 << 20},
        {"name": "NVIDIA L4", "bytes": 23034 << 20, "free_bytes": 22565 << 20},
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"driver": 12080}, "the driver is for CUDA 12.8, PyTorch there for CUDA 13.0: install driver 580 or later"),
        ({"error": "error 999 (unknown)", "devices": []}, "CUDA does not start, error 999 (unknown): restart that"),
        ({"built_for": None}, "PyTorch there is a build for CPUs"),
    ],
)  # fmt: skip
def test_gpus_that_cannot_be_used_are_named_once(change, told):
    broken = [node(name, gpus=8, cuda=CUDA | change) for name in ("2", "3")]
    with pytest.raises(UserError, match=r"^the GPUs of 2 10.0.0.2, 3 10.0.0.3 cannot") as refused:
        check_gpus(survey(node("1", gpus=8), *broken))
    assert told in str(refused.value) and ";" not in str(refused.value)
    check_gpus(survey(node("1", gpus=8), node("2", cuda=CUDA | change)))  # no GPU of Ray's


def test_a_node_with_gpus_needs_a_compiler():
    lacks = {"compiler_lacks": "there is no C compiler"}
    with pytest.raises(UserError, match=r"2 10.0.0.2 cannot compile GPU kernels, there is no C"):
        check_gpus(survey(node("1", **lacks), node("2", gpus=1, **lacks)))


def test_gpus_of_two_kinds_are_refused_for_a_gang_and_not_for_engines():
    other = CUDA | {"devices": [{"name": "NVIDIA A100-SXM4-80GB", "multiprocessors": 108}] * 2}
    mixed = survey(node("1", gpus=2), node("2", gpus=2, cuda=other))
    (missing,), _ = assess(need(), mixed)
    assert "GPUs differ" in missing and "A100-SXM4-80GB (108 multiprocessors, CUDA 13.0" in missing
    assert assess(need(actor="engine"), mixed) == ([], [])
    assert kind(TWO) == {
        "gpu": GPU["name"], "multiprocessors": 132, "cuda": "13.0", "triton": "3.9.0",
    }  # fmt: skip
    assert kind(survey(node("1", gpus=2, cuda=None))) is None


def test_gpus_whose_memory_others_hold_are_told():
    found = [GPU, GPU | {"free_bytes": 3 * GIB}]
    one = TWO.nodes[0]
    problems, (note,) = assess(need(), survey(one, node("2", gpus=2, found=found)))
    assert not problems
    assert "others hold the memory of 1 GPU of 2 10.0.0.2, 3.0 GiB are free" in note
    engine = need(actor="engine", movable_bytes=0)
    _, (note,) = assess(
        engine, survey(one, node("2", gpus=2, found=[GPU, GPU | {"free_bytes": 60 * GIB}]))
    )
    assert "60.0 GiB are free" in note


LIBCUDA = """
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuInit(unsigned flags) { return RESULT; }
int cuGetErrorString(int code, const char **text) { *text = "unknown error"; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = 10 + index; return 0; }
int cuDeviceGetName(char *name, int length, int device) { name[0] = 'A' + device; name[1] = 0; return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { *value = what == 16 ? 100 + device : 0; return 0; }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("result", [0, 999])
def test_the_driver_is_asked_without_taking_memory(tmp_path, monkeypatch, result):
    """A library stands in for NVIDIA's driver: there is none without a GPU."""
    (tmp_path / "cuda.c").write_text(LIBCUDA.replace("RESULT", str(result)))
    library = ["-shared", "-fPIC", "-o", "libcuda.so.1", "cuda.c"]
    subprocess.run(["gcc", *library], cwd=tmp_path, check=True)
    assert probe.cuda() is None
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    found = probe.cuda()
    assert found is not None and found["driver"] == 13020
    devices = [{"name": "K", "multiprocessors": 110}, {"name": "L", "multiprocessors": 111}]
    assert found["devices"] == (devices if result == 0 else [])
    assert found["error"] == (None if result == 0 else "error 999 (unknown error)")
