"""Fixtures that several test files share."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve what runs beside them
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if "RAY_TMPDIR" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
    # A Ray started by a test writes its address to this folder, and the next driver would join it.
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
    atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

from calibprune.events import listening
from tests.hearing import Hearing
from tests.servers import PATIENT_RAY
from tests.tiny import write_tiny_llama

for name, value in PATIENT_RAY.items():
    os.environ.setdefault(name, value)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A 3-layer float32 random Llama checkpoint with a byte-level tokenizer."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def heard() -> Iterator[Hearing]:
    """Every event and line that this process logs during the test."""
    hearing = Hearing()
    with listening(hearing):
        yield hearing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the longest file first, so that the others run beside it and not before it."""
    items.sort(key=lambda item: "test_pipeline" not in item.nodeid)
