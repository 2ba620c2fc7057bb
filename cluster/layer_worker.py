"""The actor that is one worker of a gang: sweeps its micro-batches through a model to prune or to evaluate it.

One thread does all the work, since a paused sweep belongs to the thread that made it; a second one only reports how
far the work is. The work itself is in the library.
"""

import datetime
import logging
from collections.abc import Generator, Iterator
from dataclasses import asdict
from typing import Any

import ray
import torch
import transformers
from torch import Tensor

from calibprune.calibration.engine_folder import remove_leftovers
from calibprune.calibration.pool import read_pool
from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.errors import UserError
from calibprune.evaluation.perplexity import sweep_perplexity
from calibprune.events import Event, EventHandler, Note, Tick, UnitDone, emit, listening
from calibprune.gang import ALONE, Gang, Meeting, join, meet
from calibprune.model import build_skeleton
from calibprune.process import keep_compiled_code_private, node
from calibprune.pruning.loop import prune_layers
from calibprune.pruning.memory import evaluation_memory, offload_needed, worker_memory
from calibprune.redact import one_line
from calibprune.stage import Stage
from cluster.label import label_of
from cluster.metrics import WorkMetrics

LOOPBACK = "127.0.0.1"


class Progress(EventHandler):
    """Counts what the work emits, also from inside a long call that cannot yield."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def handle_event(self, event: Event) -> None:
        self.steps += 1


class LayerWorker:
    def __init__(self, cpus: int, meet_seconds: float) -> None:
        keep_compiled_code_private()
        torch.backends.cuda.matmul.allow_tf32 = False
        transformers.utils.logging.set_verbosity(logging.ERROR)
        self._cpus, self._timeout = cpus, datetime.timedelta(seconds=meet_seconds)
        self._device = torch.device("cuda:0" if ray.get_gpu_ids() else "cpu")
        if self._device.type == "cuda":
            remove_leftovers()  # a killed engine's processes may hold the GPU
        self._gang: Gang = ALONE
        self._meeting: Meeting | None = None
        self._progress = Progress()

    def open_meeting(self, one_node: bool) -> tuple[str, int]:
        """Opens the port at which the other workers join, and returns (address, port); called on the first worker.

        Workers of one node meet at an address that no other machine can reach.
        """
        address = LOOPBACK if one_node else ray.util.get_node_ip_address()
        self._meeting = Meeting(address, self._timeout)
        return address, self._meeting.port

    def join(self, rank: int, size: int, meeting: tuple[str, int] | None) -> str:
        """Joins the gang as worker `rank` of `size`; returns the kind of its device. Raises UserError where its GPU
        cannot be used."""
        kind = self._check_device()
        alone = meeting is None or meeting[0] == LOOPBACK
        address = LOOPBACK if alone else ray.util.get_node_ip_address()
        torch.set_num_threads(self._cpus)
        store = None
        if meeting is not None:
            store = self._meeting.store if self._meeting else meet(*meeting, self._timeout)
        self._gang = join(rank, size, self._device, store, address)
        return kind

    def _check_device(self) -> str:
        """Returns the kind of this worker's device. Raises UserError where it is a GPU that cannot be used."""
        if self._device.type == "cpu":
            return "CPU"
        if not torch.cuda.is_available():
            raise UserError(
                f"a worker was given a GPU that PyTorch {torch.__version__} cannot use: repair the driver or the "
                f"PyTorch of that node, or set cluster.gpus_per_worker=0"
            )
        try:
            torch.zeros(1, device=self._device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"GPU {ray.get_gpu_ids()[0]} of {node()} cannot be used: {one_line(error, 200)}: repair it, or leave "
                f"that node out"
            ) from None
        found = torch.cuda.get_device_properties(self._device)
        return f"{found.name} with {found.multi_processor_count} multiprocessors"

    def prune(
        self, model: ModelSettings, settings: PruneSettings, pool_url: str, stage_url: str
    ) -> Iterator[Event]:
        """Commits every missing layer and yields the events of `prune_layers`; tokens and weights stay here."""
        torch.set_num_threads(self._cpus)
        with listening(self._progress, WorkMetrics(label_of(stage_url))):
            skeleton = build_skeleton(model, self._device)
            stage, read = Stage(stage_url), read_pool(pool_url)
            pool, (sequences, tokens) = read.token_ids, read.token_ids.shape
            vocabulary = skeleton.model.get_input_embeddings().num_embeddings
            if pool.min() < 0 or pool.max() >= vocabulary:
                raise UserError(
                    f"{pool_url} holds token ids from {pool.min()} to {pool.max()}, the model has {vocabulary}: it was "
                    f"made with another model's tokenizer"
                )
            needed = worker_memory(skeleton, settings, sequences, tokens, self._gang.size)
            reason = offload_needed(self._device, needed, settings.offload)
            if reason and self._gang.rank == 0:
                yield Note(reason)
            settings = settings.model_copy(update={"offload": reason is not None})
            yield from self._watched(
                prune_layers(skeleton, pool, settings, stage, self._gang, read.generated)
            )

    def evaluate(
        self,
        model: ModelSettings,
        windows: dict[str, Tensor],
        batch_sequences: int,
        hashes: dict[str, str] | None,
        stage_url: str,
        unit: str,
        offload: bool | None = None,
    ) -> Iterator[Event]:
        """Measures the perplexity of every text; the first worker commits it as `unit`."""
        torch.set_num_threads(self._cpus)
        skeleton = build_skeleton(model, self._device, hashes)
        batches = [b.shape for ids in windows.values() for b in ids.split(batch_sequences)]
        needed = evaluation_memory(skeleton, batches, self._gang.size)
        reason = offload_needed(self._device, needed, offload)
        if reason and self._gang.rank == 0:
            yield Note(reason)
        sweep = sweep_perplexity(
            skeleton, windows, batch_sequences, self._gang, unit, offload=reason is not None
        )
        with listening(self._progress):
            found = yield from self._watched(sweep)
        if self._gang.rank == 0:
            facts = {"perplexity": {name: asdict(value) for name, value in found.items()}}
            yield emit(UnitDone(Stage(stage_url).commit(unit, None, facts)))

    def _watched(self, events: Iterator[Event]) -> Generator[Event, None, Any]:
        """Passes events on but Tick, which is only counted, and returns their value."""
        while True:
            try:
                event = next(events)
            except StopIteration as ended:
                return ended.value
            self._progress.steps += 1
            if not isinstance(event, Tick):
                yield event

    def progress(self) -> int:
        """Returns the number of steps so far. A thread of its own answers, so that silence means a stopped process."""
        return self._progress.steps
