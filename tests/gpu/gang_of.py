"""A gang of several processes that all use the same GPU, and the prunings that they do one after another.

NCCL takes no two ranks on one GPU, so they exchange through gloo, which copies over the CPU.

    python -m tests.gpu.gang_of RANK SIZE PORT DEVICE JOBS    where JOBS is a JSON list of arguments of `prune_model`
"""

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.events import UnitDone
from calibprune.gang import ALONE, Gang
from calibprune.model import build_skeleton
from calibprune.pruning.loop import prune_layers
from calibprune.stage import Record, Stage
from tests.servers import free_ports


def prune_model(
    device: torch.device,
    gang: Gang = ALONE,
    *,
    model: str,
    stage: str,
    settings: dict[str, Any],
    sequences: int,
    tokens: int,
) -> dict[str, Record]:
    """Prunes with a random pool; returns the records of the units that this worker committed."""
    generator = torch.Generator().manual_seed(1)
    skeleton = build_skeleton(ModelSettings(path=model), device)
    pool = torch.randint(
        0, skeleton.model.config.vocab_size, (sequences, tokens), generator=generator
    )
    events = prune_layers(
        skeleton, pool, PruneSettings.model_validate(settings), Stage(stage), gang
    )
    return {event.record.unit: event.record for event in events if isinstance(event, UnitDone)}


def pruned_by(size: int, device: torch.device, jobs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Does the jobs with a gang of `size` on one device; returns the sha256 of every unit of each."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tests.gpu.gang_of"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(port), str(device), json.dumps(jobs)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(size)
    ]
    made: list[dict[str, str]] = [{} for _ in jobs]
    for worker in workers:
        said, _ = worker.communicate(timeout=1200)
        assert worker.returncode == 0, f"a worker of {size} failed"
        for number, units in enumerate(json.loads(said.splitlines()[-1])):
            made[number].update(units)
    return made


def main(rank: int, size: int, port: int, device: torch.device, jobs: list[dict[str, Any]]) -> None:
    if size > 1:
        limit = datetime.timedelta(minutes=10)
        store = dist.TCPStore("127.0.0.1", port, size, rank == 0, limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    gang = Gang(rank, size, device)
    records = [prune_model(device, gang, **job) for job in jobs]
    print(json.dumps([{unit: one.sha256 for unit, one in made.items()} for made in records]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), torch.device(sys.argv[4]), json.loads(sys.argv[5]))
