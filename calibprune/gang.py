"""A gang of workers that do one job together: their ranks, and what they exchange.

Everything exchanged is exact for any number of workers: bytes are copied, integers are added. Knows nothing of Ray:
`join` needs no more than an address that all workers can reach.
"""

import datetime
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from calibprune.redact import one_line

COLLECTIVE_TIMEOUT = datetime.timedelta(days=7)
"""Practically no limit: the driver detects and ends hangs, since only it knows how long a layer may take."""


class PeerLost(RuntimeError):
    """Another worker of the gang is gone or can no longer be reached."""


class Gang:
    """`size` workers, of which this process is number `rank`. A gang of one exchanges nothing."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size = rank, size
        self.device = torch.device(device)

    def owns(self, index: int) -> bool:
        """Returns whether unit number `index` is this worker's: units are dealt round-robin."""
        return index % self.size == self.rank

    def dealt(self, units: Iterable[Any]) -> list[Any]:
        """Returns this worker's share of the units."""
        return [unit for index, unit in enumerate(units) if self.owns(index)]

    def broadcast(self, pieces: Iterable[tuple[Tensor, int]]) -> None:
        """Fills each tensor, contiguous and on the gang's device, with what worker `source` holds in it."""
        if self.size == 1:
            return
        with _peers():
            works = [
                dist.broadcast(tensor.view(-1).view(torch.uint8), source, async_op=True)
                for tensor, source in pieces
                if tensor.numel()
            ]
            for work in works:
                work.wait()  # type: ignore[union-attr]

    def add(self, tensor: Tensor) -> Tensor:
        """Adds up all workers' int64 tensors in place; returns the tensor. Raises ValueError for another dtype."""
        if tensor.dtype != torch.int64:
            raise ValueError(
                f"only sums of int64 are independent of their order, not those of {tensor.dtype}"
            )
        if self.size > 1:
            with _peers():
                dist.all_reduce(tensor)
        return tensor

    def add_at(self, pieces: Iterable[tuple[Tensor, int]]) -> None:
        """Adds up all workers' int64 tensors, each at one worker; at the others it is left with whatever."""
        if self.size == 1:
            return
        with _peers():
            works = [
                dist.reduce(tensor, worker, async_op=True)
                for tensor, worker in pieces
                if tensor.numel()
            ]
            for work in works:
                work.wait()  # type: ignore[union-attr]

    def collect(self, values: Tensor, mine: Iterable[int]) -> Tensor:
        """Returns a float64 matrix with the rows `mine` of every worker, bit for bit.

        On the CPU, for facts rather than for weights.
        """
        bits = torch.zeros_like(values, dtype=torch.int64)
        rows = list(mine)
        bits[rows] = values.view(torch.int64)[rows]
        return self.add(bits.to(self.device)).cpu().view(torch.float64)

    def largest(self, value: float) -> float:
        """Returns the largest of all workers' values."""
        if self.size == 1:
            return value
        with _peers():
            tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            return tensor.item()


ALONE = Gang()


def join(
    rank: int, size: int, device: torch.device, store: dist.Store | None, address: str
) -> Gang:
    """Makes this process worker `rank` of `size`: over NCCL on GPUs, over gloo on CPUs.

    `address` is the one at which the others reach this machine: traffic uses the network interface that has it.
    Raises PeerLost when the others do not join.
    """
    leave()
    if size == 1:
        return Gang(device=device)
    interface = _interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without "=" it is a prefix
    with _peers():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
        dist.barrier()
    return Gang(rank, size, device)


def leave() -> None:
    """Leaves the gang that this process is in, if any."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


class Meeting:
    """The port at which a gang's workers find each other, opened by one of them on its own address only."""

    def __init__(self, address: str, timeout: datetime.timedelta) -> None:
        self._socket = socket.create_server(
            (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        )
        self.port: int = self._socket.getsockname()[1]
        self.store = dist.TCPStore(
            address,
            self.port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=self._socket.detach(),
        )


def meet(address: str, port: int, timeout: datetime.timedelta) -> dist.Store:
    """Connects to a meeting that another worker has opened."""
    with _peers():
        return dist.TCPStore(address, port, is_master=False, timeout=timeout)


def _interface_of(address: str) -> str | None:
    """Returns the name of the network interface with this IPv4 address; None where it cannot be found."""
    import fcntl
    import struct

    if ":" in address or not Path("/sys/class/net").is_dir():
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


class _peers:
    """Turns the errors of torch.distributed into PeerLost, but for a GPU's memory that runs out here."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        kept = PeerLost | torch.OutOfMemoryError
        if isinstance(error, RuntimeError) and not isinstance(error, kept):
            raise PeerLost(one_line(error)) from error
