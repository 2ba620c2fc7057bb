"""The entry point of pyproject.toml, for processes that may find no installed calibprune, or an older one."""

import importlib.metadata
import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
GROUP = "vllm.general_plugins"


def plugin_paths(folder: Path) -> list[str]:
    """Returns the folders for sys.path with which Python finds this checkout and, once, what it declares for vLLM."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"][GROUP]
    installed = {point.value for point in importlib.metadata.entry_points(group=GROUP)}
    if installed & set(declared.values()):
        return [str(ROOT)]
    info = folder / "calibprune_plugin-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: calibprune-plugin\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in declared.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    return [str(ROOT), str(folder)]


def with_plugin(folder: Path) -> dict[str, str]:
    """Returns the environment variable that gives child processes these folders."""
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": ":".join([*plugin_paths(folder), *([before] if before else [])])}
