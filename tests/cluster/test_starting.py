"""A Ray that calibprune starts and that does not come up in time, as on a busy machine, is started again."""

import psutil
import pytest
import ray

from calibprune.config.model import ClusterSettings
from calibprune.errors import UserError
from cluster import session
from cluster.session import connect

SLOW_AGENTS = """
import os, sys, time
from pathlib import Path
command = Path("/proc/self/cmdline").read_text()
if "dashboard/agent.py" in command and len(list(Path({folder!r}).glob("slow.*"))) < {times}:
    Path({folder!r}, f"slow.{{os.getpid()}}").touch()
    time.sleep(40)
"""


def test_a_start_that_runs_out_of_time_is_tried_again_and_given_up_in_one_line(monkeypatch, capsys):
    tried = []

    def start(**options):
        tried.append(options)
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session.ray, "init", start)
    with pytest.raises(UserError, match=r"did not start in 3 tries, .* timed out") as told:
        connect(ClusterSettings()).__enter__()
    assert len(tried) == 3 and "\n" not in str(told.value)
    assert capsys.readouterr().err.count("starting it again\n") == 2


@pytest.mark.parametrize("error", [ValueError("no such setting"), ConnectionError("it timed out")])
def test_what_no_further_start_mends_is_told_at_once(monkeypatch, error):
    tried = []

    def start(**options):
        tried.append(options)
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session.ray, "init", start)
    with pytest.raises(UserError, match=f"cannot reach Ray at this machine: {error}"):
        connect(ClusterSettings()).__enter__()
    assert len(tried) == 1


@pytest.mark.slow  # Ray gives its agents 15 s and the node 30
def test_a_ray_whose_agents_came_too_late_is_ended_and_another_one_works(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "sitecustomize.py").write_text(SLOW_AGENTS.format(folder=str(tmp_path), times=1))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with connect(ClusterSettings()) as started_here:
        assert started_here and ray.get(ray.remote(lambda: 5).remote()) == 5
        assert len(list(tmp_path.glob("slow.*"))) == 1
        names = [p.name() for p in psutil.Process().children() if p.pid not in before]
        assert names.count("gcs_server") == names.count("raylet") == 1, names
    assert capsys.readouterr().err.count("starting it again\n") == 1
    assert not ray.is_initialized()
