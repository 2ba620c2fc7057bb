"""The tools that kill at random see what outlives its parents."""

import os
import subprocess
import sys

import psutil

from tests import chaos

TITLE = "VLLM::EngineCore of a test"
PARENT = f"""
import subprocess, sys
subprocess.Popen([{TITLE!r}, "100"], executable="/bin/sleep", start_new_session=True)
"""


def test_an_orphan_is_seen_and_another_s_process_is_not(monkeypatch):
    monkeypatch.setenv(chaos.MARK, "mine")
    subprocess.run([sys.executable, "-c", PARENT], check=True)
    subprocess.run(
        [sys.executable, "-c", PARENT], check=True, env=os.environ | {chaos.MARK: "other"}
    )
    try:
        (seen,) = chaos._ours((TITLE,))
        assert seen not in psutil.Process().children(recursive=True)
        assert chaos.kill((TITLE,))
        psutil.wait_procs([seen], timeout=20)
        assert not chaos._ours((TITLE,))
    finally:
        monkeypatch.setenv(chaos.MARK, "other")
        assert chaos.kill((TITLE,))
