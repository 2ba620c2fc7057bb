"""Moves tensors between a GPU and pinned host memory: what paused forwards hold, and layers that come and go.

What a paused forward holds is found in its frames and swapped in place, so that everything else that refers to it sees
the same, and the model's own code stays as it is.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from types import FrameType
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

ALIGNMENT = 64
"""Bytes to which tensors in one buffer are aligned, since alignment may decide the last bits of a product."""
MIN_BYTES = 1 << 20
"""Size below which a tensor stays on the GPU."""


class Staging:
    """One host buffer that is used again and again: the pinned memory of a transfer at a time.

    Pinned memory is taken in powers of two and hardly ever given back, so that two buffers would take twice as much.
    """

    def __init__(self, pin: bool = True) -> None:
        self._pin = pin
        self._buffer: Tensor | None = None

    def take(self, size: int) -> Tensor:
        """Returns the first `size` bytes of the buffer, which the caller before has to be done with."""
        if self._buffer is None or len(self._buffer) < size:
            self._buffer = None  # first, so that there are never two
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)
        return self._buffer[:size]


class Parking:
    """Parks the activations of paused forwards that run on `device`, which continue in the order in which they paused.

    `to_host` copies a tensor to the host. Tensors of fewer than `least_bytes` stay on the device. The host's copy of a
    tensor that the forward leaves unchanged serves again at its next pause. On a GPU, the activations of the forward
    that continues next are fetched while the one before it runs.
    """

    def __init__(
        self,
        device: torch.device,
        to_host: Callable[[Tensor], Tensor] | None = None,
        least_bytes: int = MIN_BYTES,
    ) -> None:
        self.device, self._least_bytes = device, least_bytes
        self._to_host = to_host or _pinned
        self._kept: dict[int, tuple[ref[Tensor], int, Tensor]] = {}
        """Host copies of what the forward that runs has fetched, with the version of each tensor."""
        self._waiting: deque[list[Tensor]] = deque()
        """Activations of the paused forwards, in the order in which these continue."""
        self._ahead: _Ahead | None = None

    def park(self, frame: FrameType | None) -> list[Tensor]:
        """Moves the activations that this frame and its callers refer to; returns them."""
        parked: dict[int, Tensor] = {}
        while frame is not None:
            for value in tree_leaves(list(frame.f_locals.values())):  # args and kwargs too
                if isinstance(value, Tensor) and self._is_activation(value):
                    parked.setdefault(id(value), value)
            frame = frame.f_back
        for tensor in parked.values():
            tensor.data = self._host_copy(tensor)
        self._kept.clear()
        self._waiting.append(list(parked.values()))
        return self._waiting[-1]

    def _host_copy(self, tensor: Tensor) -> Tensor:
        known, version, host = self._kept.get(id(tensor), (None, 0, None))
        if known is not None and known() is tensor and version == tensor._version:
            assert host is not None
            return host
        return self._to_host(tensor)

    def fetch(self, parked: Sequence[Tensor]) -> None:
        """Moves parked activations back to the device."""
        if self._waiting and self._waiting[0] is parked:
            self._waiting.popleft()
        ahead = self._ahead.take(parked) if self._ahead else None
        self._ahead = None
        for index, tensor in enumerate(parked):
            host = tensor.data
            tensor.data = ahead[index] if ahead else host.to(self.device)
            self._kept[id(tensor)] = ref(tensor), tensor._version, host
        if self._waiting and self.device.type == "cuda":
            self._ahead = _Ahead(self._waiting[0], self.device)

    def _is_activation(self, tensor: Tensor) -> bool:
        return (
            tensor.device.type == self.device.type  # a process sees only one of its type
            and tensor.is_floating_point()
            and not isinstance(tensor, nn.Parameter)
            and tensor.nbytes >= self._least_bytes
        )


class _Ahead:
    """Copies of parked activations that are under way to a GPU on a stream of their own."""

    def __init__(self, parked: Sequence[Tensor], device: torch.device) -> None:
        self._parked = parked
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            self._copies = [tensor.data.to(device, non_blocking=True) for tensor in parked]
            self._arrived = stream.record_event()

    def take(self, parked: Sequence[Tensor]) -> list[Tensor] | None:
        """Returns the copies, which the current stream waits for; None where others were meant."""
        if parked is not self._parked:
            return None
        current = torch.cuda.current_stream()
        current.wait_event(self._arrived)
        for copy in self._copies:
            copy.record_stream(current)  # its memory was taken for the other stream
        return self._copies


class Fetched(Sequence[Tensor]):
    """A sequence of tensors that moves each to the device only when it is accessed, one at a time."""

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device

    @property
    def shapes(self) -> list[torch.Size]:
        return [tensor.shape for tensor in self._tensors]

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self._tensors[index].to(self._device)

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return (tensor.to(self._device) for tensor in self._tensors)


def to_host(tensors: Mapping[str, Tensor], staging: Staging) -> dict[str, Tensor]:
    """Returns the tensors in host memory: themselves, or views of the staging buffer where they are on a GPU.

    The transfer waits for what the GPU was computing when it is called, and has a stream of its own: nothing that is
    computed later waits for it. Only the calling thread does.
    """
    device = next(iter(tensors.values())).device
    if device.type != "cuda":
        return dict(tensors)
    ends = list(
        accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values())
    )
    buffer, stream = staging.take(ends[-1]), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    views = {}
    with torch.cuda.stream(stream):
        for (name, tensor), start in zip(tensors.items(), [0, *ends], strict=False):
            view = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            views[name] = view.copy_(tensor, non_blocking=True)
    stream.synchronize()
    return views


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)
