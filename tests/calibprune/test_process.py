"""How processes of calibprune choose the folder for compiled code."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from calibprune.process import BACKGROUND, yield_to_others

KEEP = "from calibprune.process import keep_compiled_code_private as keep; keep()"


def variable_of(code: str, folder: Path, **environment: str) -> str:
    """Returns TORCHINDUCTOR_CACHE_DIR after running the code in a process with this folder for temporary files."""
    left_out = ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
    given = {k: v for k, v in os.environ.items() if k not in left_out} | environment
    code += "; import os; print(os.environ.get('TORCHINDUCTOR_CACHE_DIR'))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=given | {"TMPDIR": str(folder), "PYTHONPATH": str(Path.cwd())},
    ).stdout.strip()  # fmt: skip


def test_work_makes_no_folder_for_compiled_code_in_the_one_that_all_share(tmp_path):
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir(), temporary.mkdir()
    found = Path(
        variable_of(
            f"{KEEP}; import torch._dynamo, transformers.models.llama.modeling_llama",
            temporary,
            HOME=str(home),
        )
    )
    assert found.is_relative_to(home) and found.stat().st_mode & 0o077 == 0
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("home", ["/dev/null", "/nonexistent"])
def test_who_has_no_folder_of_his_own_is_none_the_worse(tmp_path, home):
    assert variable_of(KEEP, tmp_path, HOME=home) == "None"
    assert not Path("/nonexistent").exists()


def test_a_folder_that_was_chosen_stays(tmp_path):
    assert variable_of(KEEP, tmp_path, TORCHINDUCTOR_CACHE_DIR="/a/b") == "/a/b"


@pytest.mark.parametrize("actor", ["layer_worker", "generator", "unit_worker"])
def test_an_actor_is_imported_before_any_folder_for_compiled_code_is_made(tmp_path, actor):
    """An actor chooses the folder when it starts, which is after its class has been imported."""
    assert variable_of(f"import cluster.{actor}", tmp_path) == "None"
    assert list(tmp_path.iterdir()) == []


def test_background_work_gets_less_of_the_cores_and_only_that():
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = priority()
    with ThreadPoolExecutor(1, initializer=yield_to_others) as pool:
        assert pool.submit(priority).result() == min(19, before + BACKGROUND)
    assert priority() == before
