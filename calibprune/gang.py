"""Workers that do one job together: who they are to one another, and what they exchange.

Everything exchanged is exact whatever the number of workers: bytes are copied, integers are added. Knows nothing of
Ray: `join` needs no more than an address that all workers can reach.
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
"""Hangs are for the driver to see and end: it alone knows how long a layer may take."""


class PeerLost(RuntimeError):
    """Another worker of the gang is gone, or cannot be reached any more."""


class Gang:
    """`size` workers, of which this is number `rank`. A gang of one exchanges nothing."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size = rank, size
        self.device = torch.device(device)

    def owns(self, index: int) -> bool:
        """Whether unit number `index` is this worker's: they are dealt round the gang."""
        return index % self.size == self.rank

    def dealt(self, units: Iterable[Any]) -> list[Any]:
        """This worker's share of the units."""
        return [unit for index, unit in enumerate(units) if self.owns(index)]

    def broadcast(self, pieces: Iterable[tuple[Tensor, int]]) -> None:
        """Fills every tensor with what worker `source` holds in it. Contiguous tensors on the gang's device."""
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
        """Adds up all workers' integers in place; returns the tensor."""
        if tensor.dtype != torch.int64:
            raise ValueError(f"only int64 sums do not depend on their order, not {tensor.dtype}")
        if self.size > 1:
            with _peers():
                dist.all_reduce(tensor)
        return tensor

    def collect(self, values: Tensor, mine: Iterable[int]) -> Tensor:
        """Fills in, over all workers, the rows of a float64 matrix of which each has its own; bits are kept.

        On the CPU, for facts rather than for weights.
        """
        bits = torch.zeros_like(values, dtype=torch.int64)
        rows = list(mine)
        bits[rows] = values.view(torch.int64)[rows]
        return self.add(bits.to(self.device)).cpu().view(torch.float64)

    def largest(self, value: float) -> float:
        """The largest of all workers' values."""
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

    `address` is this machine's own, as the others reach it: traffic goes over the network interface that has it.
    Raises PeerLost when the others do not come.
    """
    leave()
    if size == 1:
        return Gang(device=device)
    interface = _interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault(
            "NCCL_SOCKET_IFNAME", f"={interface}"
        )  # without "=": all that begin so
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
    """The place where a gang's workers find one another, held open by one of them on its own address only."""

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
    """Reaches a meeting that another worker holds open."""
    with _peers():
        return dist.TCPStore(address, port, is_master=False, timeout=timeout)


def _interface_of(address: str) -> str | None:
    """The name of the network interface with this IPv4 address; None where it cannot be told."""
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
    """Turns what torch.distributed raises into PeerLost."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, PeerLost):
            raise PeerLost(one_line(error)) from error
