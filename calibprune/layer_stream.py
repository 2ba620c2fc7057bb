"""Brings a model's weights to every worker of a gang, module by module: each byte is read once, by one worker.

Worker i mod size owns layer number i: it alone reads the layer, ahead of time, and broadcasts it.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from calibprune.failpoint import failpoint
from calibprune.gang import Gang
from calibprune.model import Skeleton
from calibprune.offload import ALIGNMENT, Parking, Staging
from calibprune.process import keep_freed_memory, return_freed_memory
from calibprune.sweep import Sweep

LAYERS_PER_TRIM = 4
"""Layers after which freed memory is returned to the system: after each one, all pages would be cleared again."""


@dataclass(frozen=True)
class Loaded:
    """A layer's tensors by checkpoint name, in their stored dtype, on the gang's device."""

    tensors: dict[str, Tensor]
    bytes_read: int
    """Bytes that this worker read; 0 if another worker owns the layer."""


class LayerReader:
    """Reads layers [first, stop) of a model, which are taken in order; a context manager. Collective.

    `committed(index)`, which only the owner calls, returns tensors by name that replace the checkpoint's own, or None.
    On a GPU a layer passes through the one buffer of `staging`. Raises UserError naming a weight of the checkpoint that
    is not finite.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        gang: Gang,
        *,
        first: int = 0,
        stop: int | None = None,
        committed: Callable[[int], Mapping[str, Tensor] | None] = lambda index: None,
        staging: Staging | None = None,
    ) -> None:
        self._skeleton, self._gang, self._committed = skeleton, gang, committed
        self._stop = len(skeleton.layers) if stop is None else stop
        keep_freed_memory()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: Future[tuple[Tensor, int]] | None = None
        self._staging = staging or (Staging() if skeleton.device.type == "cuda" else None)
        self.outer_held: dict[str, Tensor] = {}
        """Tensors from outside the layers that the first worker has already read."""
        for index in range(first, self._stop):
            if gang.owns(index):
                self._ahead = self._pool.submit(self._read, index)
                break

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=exception[0] is None, cancel_futures=True)

    def take(self, index: int) -> Loaded:
        """Returns the tensors of the next layer, views of one buffer of their own."""
        size = 0
        places, total = self._layout(index)
        device = self._skeleton.device
        if index % LAYERS_PER_TRIM == 0:
            return_freed_memory()
        if self._gang.owns(index):
            assert self._ahead is not None
            buffer, size = self._ahead.result()
            following, self._ahead = index + self._gang.size, None
            if self._staging:  # only then may the next layer be read into the buffer
                buffer = buffer.to(device, copy=True)
            if following < self._stop:
                self._ahead = self._pool.submit(self._read, following)
        else:
            buffer = torch.empty(total, dtype=torch.uint8, device=device)
        failpoint(f"broadcast-{index}-{self._gang.rank}")
        self._gang.broadcast([(buffer, index % self._gang.size)])
        return Loaded(self._views(index, buffer, places), size)

    def place_outer(self, name: str) -> None:
        """Fills a module outside the layers with weights, which the first worker reads and broadcasts."""
        skeleton, module = self._skeleton, self._skeleton.outer_modules[name]
        prefix = f"{name}." if name else ""
        wanted = {
            skeleton.stored_name(prefix + leaf)
            for leaf, _ in module.named_parameters(recurse=False)
        }
        locations = skeleton.checkpoint.locations
        tensors = {
            stored: torch.empty(locations[stored].shape, dtype=locations[stored].dtype)
            for stored in sorted(wanted)
        }
        if self._gang.rank == 0:
            held = {stored: t for stored, t in self.outer_held.items() if stored in wanted}
            tensors |= held or skeleton.checkpoint.read(sorted(wanted))
            skeleton.check_finite(tensors)
        tensors = {stored: tensor.to(skeleton.device) for stored, tensor in tensors.items()}
        self._gang.broadcast([(tensor, 0) for tensor in tensors.values()])
        skeleton.place(module, prefix, tensors)

    def _layout(self, index: int) -> tuple[dict[str, int], int]:
        """Returns (first byte of every tensor, bytes in all) of a layer's buffer."""
        places, end = {}, 0
        for name in self._skeleton.layer_tensors(index):
            places[name] = end
            end += -(-self._skeleton.checkpoint.locations[name].bytes // ALIGNMENT) * ALIGNMENT
        return places, end

    def _views(self, index: int, buffer: Tensor, places: Mapping[str, int]) -> dict[str, Tensor]:
        views = {}
        for name, start in places.items():
            location = self._skeleton.checkpoint.locations[name]
            flat = buffer[start : start + location.bytes]
            views[name] = flat.view(location.dtype).view(location.shape)
        return views

    def _read(self, index: int) -> tuple[Tensor, int]:
        """Returns a layer's buffer and the bytes read for it."""
        places, total = self._layout(index)
        buffer = (
            self._staging.take(total) if self._staging else torch.zeros(total, dtype=torch.uint8)
        )
        views = self._views(index, buffer, places)
        committed = self._committed(index)
        if committed is None:
            self._skeleton.checkpoint.read_into(views)
            self._skeleton.check_finite(views)
        else:
            for name, view in views.items():
                view.copy_(committed[name])
        return buffer, sum(view.nbytes for view in views.values())


def paused_sweep(
    skeleton: Skeleton,
    batches: Sequence[Tensor],
    gang: Gang,
    reader: LayerReader,
    *,
    first: int = 0,
    hidden: Callable[[int], Tensor] | None = None,
    offload: bool = False,
) -> Sweep:
    """Returns a sweep of this worker's share of the gang's micro-batches of token ids, up to the last hidden states.

    Modules outside the layers are filled automatically. `first` and `hidden` are those of `Sweep`; with `offload`,
    what paused forwards hold on a GPU is kept in host memory.
    """
    parks = offload and skeleton.device.type != "cpu"

    def leave_outer(name: str) -> None:
        skeleton.evict(skeleton.outer_modules[name])
        reader.outer_held = {}

    return Sweep(
        lambda tokens: skeleton.model(input_ids=tokens, use_cache=False, logits_to_keep=1),
        skeleton.layers,
        [batch.to(skeleton.device) for batch in gang.dealt(batches)],
        outer_modules=skeleton.outer_modules,
        enter_outer=reader.place_outer,
        leave_outer=leave_outer,
        first=first,
        hidden=hidden,
        parking=Parking(skeleton.device) if parks else None,
    )
