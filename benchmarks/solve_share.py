"""How evenly a gang divides the solving of a group: operations per worker, counted and not timed.

    python benchmarks/solve_share.py [--workers 8] [--method sparsegpt] [--width 4096] [--rows 5120 1024]

Every worker of a simulated gang runs the product's own code on the CPU, as tensor operations where a GPU has kernels
of its own. An operation counts as its floating-point operations where it is a matrix product or a factorisation, else
as the numbers that it makes. Printed is what the busiest worker does of each part, times the number of workers, over
what a worker alone does: 1 is an even division, the number of workers is none at all.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))

from calibprune.config.prune import PruneSettings
from calibprune.gang import Gang
from calibprune.pruning import factor, masks, methods, rows, sparsegpt, statistics
from calibprune.pruning.masks import Target
from calibprune.pruning.rows import RowShares
from calibprune.pruning.statistics import IntegerSums
from tests.calibprune.simulated_gang import simulate

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--workers", type=int, default=8)
parser.add_argument("--method", default="sparsegpt")
parser.add_argument("--pattern", default="unstructured")
parser.add_argument("--width", type=int, default=4096)
parser.add_argument("--rows", type=int, nargs="+", default=[4096, 1024, 1024])
options = parser.parse_args()

PARTS = {
    "reduce and convert": [(statistics, "_finished_gram")],
    "factorise": [(factor, "_factorise")],
    "invert the factor": [(factor, "_inverse")],
    "select": [(masks, "keep_all_but_lowest_of_matrices"),
               (sparsegpt, "keep_all_but_lowest_of_matrices"), (masks, "keep_in_rows")],
    "columns of a block": [(sparsegpt, "_solve_block_tensors")],
    "columns after it": [(sparsegpt, "_pass_on_errors")],
}  # fmt: skip
REST = "the rest"


class Counting(TorchDispatchMode):
    """Counts the operations of one worker by part."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [REST]
        self.counts: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = operation(*args, **(kwargs or {}))
        self.counts[self.parts[-1]] += cost(operation.__name__.split(".")[0], args, result)
        return result


def cost(name: str, args: Any, result: Any) -> float:
    matrices = [value for value in tree_leaves(args) if isinstance(value, torch.Tensor)]
    made = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
    if name in ("mm", "addmm", "addmm_"):
        left, right = matrices[-2:] if name == "mm" else matrices[1:3]
        return 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
    if name == "linalg_cholesky_ex":
        return len(matrices[0]) ** 3 / 3
    if name == "linalg_solve_triangular":
        return float(len(matrices[0]) ** 2 * matrices[1].shape[1])
    held = {tensor.data_ptr() for tensor in matrices}
    if any(tensor.data_ptr() in held for tensor in made) and not name.endswith("_"):
        return 0.0  # a view
    return float(sum(tensor.numel() for tensor in made))


counting: dict[int, Counting] = {}
"""By worker."""


def counted(part: str, function: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        worker = counting[rank()]
        worker.parts.append(part)
        try:
            return function(*args, **kwargs)
        finally:
            worker.parts.pop()

    return run


def rank() -> int:
    import threading

    return threading.current_thread().rank  # type: ignore[attr-defined]


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Counts parts, and divides rows as on a GPU."""
    patches = [
        mock.patch.object(module, name, counted(part, getattr(module, name)))
        for part, places in PARTS.items()
        for module, name in places
    ]
    patches += [
        mock.patch.object(module, "runs_compiled", lambda device: False)
        for module in (masks, sparsegpt)
    ]
    patches.append(mock.patch.dict(rows.ROW_CHUNK, clear=True))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
weights = [torch.randn(count, options.width, generator=generator) * 0.05 for count in options.rows]
x = torch.randn(options.width + 64, options.width, generator=generator)
gram = x.T @ x
settings = PruneSettings.model_validate({"method": options.method, "pattern": options.pattern})
targets = [Target(0.5, settings.n_of_m) for _ in weights]


def work(gang: Gang) -> None:
    import threading

    threading.current_thread().rank = gang.rank  # type: ignore[attr-defined]
    integers = (gram * 2**20 / gang.size).long()
    with Counting() as worker:
        counting[gang.rank] = worker
        found = statistics.finish(IntegerSums(10, 1, exponent=20, gram=integers), gang)
        shares = RowShares.of(weights, gang)
        methods.prune_group(shares.mine(weights), found, targets, settings.method, shares)


with as_on_a_gpu():
    simulate(1, work)
    alone = counting.pop(0).counts
    simulate(options.workers, work)
print(
    f"{options.method} {options.pattern}, {sum(options.rows)} rows of {options.width}, {options.workers} workers: "
    "operations of the busiest worker over an even division"
)
for part in (*PARTS, REST):
    if alone[part]:
        busiest = max(worker.counts[part] for worker in counting.values()) * options.workers
        print(
            f"{part:<20} {busiest / alone[part]:5.2f}   {alone[part] / sum(alone.values()):6.1%} of all"
        )
whole = max(sum(worker.counts.values()) for worker in counting.values()) * options.workers
print(f"{'all':<20} {whole / sum(alone.values()):5.2f}")
