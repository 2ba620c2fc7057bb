"""Tests of what only a GPU can show: `make test-gpu`. Without a GPU they run with small models on the CPU."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.tiny import write_tiny_llama


@dataclass(frozen=True)
class Size:
    """The model that the tests prune, large enough on a GPU for its kernels to be the real ones."""

    hidden: int
    layers: int
    sequences: int
    tokens: int


def pytest_addoption(parser: pytest.Parser) -> None:
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", default=found, choices=["cuda", "cpu"], help=f"here: {found}")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The first GPU, or the CPU where there is none."""
    wanted = request.config.getoption("--device")
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.fail("this machine has no NVIDIA GPU that PyTorch can use")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def size(device: torch.device) -> Size:
    return Size(1024, 3, 32, 512) if device.type == "cuda" else Size(64, 2, 6, 32)


@pytest.fixture(scope="session")
def model(size: Size, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16."""
    return write_tiny_llama(
        tmp_path_factory.mktemp("models") / "llama",
        layers=size.layers,
        hidden=size.hidden,
        intermediate=size.hidden * 11 // 4 // 32 * 32,
        heads=max(2, size.hidden // 64),
        kv_heads=2,
        dtype=torch.bfloat16,
        max_positions=size.tokens,
    )
