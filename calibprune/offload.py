"""Moves what paused forwards hold on a GPU to pinned host memory, and back before they continue.

The tensors are found in the frames of the paused forward and swapped in place, so that everything else that refers to
them sees the same, and the model's own code stays as it is.
"""

from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

MIN_BYTES = 1 << 20
"""Size below which a tensor stays on the GPU."""


class Parking:
    """Parks the activations of paused forwards that run on `device`.

    `to_host` copies a tensor to the host. Tensors of fewer than `least_bytes` stay on the device.
    """

    def __init__(
        self,
        device: torch.device,
        to_host: Callable[[Tensor], Tensor] | None = None,
        least_bytes: int = MIN_BYTES,
    ) -> None:
        self.device, self._least_bytes = device, least_bytes
        self._to_host = to_host or _pinned

    def park(self, frame: FrameType | None) -> list[Tensor]:
        """Moves the activations that this frame and its callers refer to; returns them."""
        parked: dict[int, Tensor] = {}
        while frame is not None:
            for value in tree_leaves(list(frame.f_locals.values())):  # args and kwargs too
                if isinstance(value, Tensor) and self._is_activation(value):
                    parked.setdefault(id(value), value)
            frame = frame.f_back
        for tensor in parked.values():
            tensor.data = self._to_host(tensor)
        return list(parked.values())

    def fetch(self, parked: Sequence[Tensor]) -> None:
        """Moves parked activations back to the device."""
        for tensor in parked:
            tensor.data = tensor.data.to(self.device)

    def _is_activation(self, tensor: Tensor) -> bool:
        return (
            tensor.device.type == self.device.type  # a process sees only one of its type
            and tensor.is_floating_point()
            and not isinstance(tensor, nn.Parameter)
            and tensor.nbytes >= self._least_bytes
        )


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


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)
