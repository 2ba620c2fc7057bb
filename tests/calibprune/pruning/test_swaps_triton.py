"""The GPU kernel that weighs exchanges: run by Triton's interpreter on the CPU, and compiled for a GPU without one."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPARE = """
import torch
from calibprune.config import prune as config
from calibprune.pruning import swaps, swaps_triton
from calibprune.pruning.methods import prune_group, refine_group
from calibprune.pruning.swaps_triton import lowest_scores
from tests.calibprune.pruning.data import correlated_inputs, plain_statistics, random_weights, targets

statistics, weights = plain_statistics(correlated_inputs(100, 40)), random_weights(21, width=40)
gram, refinement = statistics.gram, config.Swaps(type="swaps", max_swaps=4)
swaps_triton.ROWS, swaps_triton.COLUMNS = 16, 32  # more than one program, each cut off at an edge
swaps.runs_compiled = lambda device: False
weighed = 0

def both_ways(rows):
    global weighed
    weighed += 1
    found, expected = swaps._best_returns_triton(rows), swaps._best_returns(rows)
    kept = rows.current != 0
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-4 * gram.diagonal().max())
    return found

for method in (config.Wanda(type="wanda"), config.SparseGPT(type="sparsegpt")):
    start = prune_group(weights, statistics, targets(0.5), method)
    arguments = weights, start, statistics, targets(0.5), method, refinement
    swaps._weigher = lambda rows: swaps._best_returns
    (expected,) = refine_group(*arguments)
    swaps._weigher = lambda rows: both_ways
    (found,) = refine_group(*arguments)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
assert weighed > 2
assert lowest_scores(*(torch.empty(0, 40) for _ in range(3)), gram, False).shape == (0, 40)
try:
    lowest_scores(start[0].T.contiguous().T, start[0], start[0], gram, False)
except ValueError:
    print("same")
"""

COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from calibprune.pruning.swaps_triton import COLUMNS, ROWS, _kernel

names = _kernel.arg_names
for both_signs in (False, True):
    constants = dict(BOTH_SIGNS=both_signs, HEIGHT=ROWS, WIDTH=COLUMNS)
    types = {name: "*fp32" for name in names[:5]} | {name: "i32" for name in names[5:9]} | {
        name: "constexpr" for name in constants
    }
    source = ASTSource(fn=_kernel, signature=types, constexprs=constants)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32))
    assert ".local" not in compiled.asm["ptx"]
    assert compiled.metadata.shared == 0
print("compiled")
"""


@pytest.mark.parametrize(("code", "interpret"), [(COMPARE, "1"), (COMPILE, "0")])
def test_the_kernel(code, interpret):
    environment = os.environ | {"TRITON_INTERPRET": interpret}  # read when triton is imported
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout in ("same\n", "compiled\n")
