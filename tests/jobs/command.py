"""Runs the command line as users do, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from jobs.__main__ import main

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def calibprune(
    *arguments: object, timeout: float = 550, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, env=ENVIRONMENT | environment
    )  # fmt: skip


def calibprune_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Runs it in this process, which has imported everything already; returns (exit code, stdout, stderr)."""
    capsys.readouterr()
    with mock.patch.object(sys, "argv", ["calibprune", *map(str, arguments)]):
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        else:
            code = 0
    return code, *capsys.readouterr()


def stop_when(
    condition: Callable[[], bool], number: signal.Signals, *arguments: object, timeout: float = 500
) -> tuple[int, str]:
    """Sends the signal to the command as soon as the condition holds; returns (exit code, its stderr).

    Raises AssertionError when the command ended before that.
    """
    command = [sys.executable, "-m", "jobs", *map(str, arguments)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    )
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"ended early: {process.communicate()[1]}"
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=200)
    return process.returncode, errors


def done(run: Path, stage: str) -> int:
    """Counts the committed units of a stage."""
    return len(list((run / stage / "_done").glob("*.json")))
