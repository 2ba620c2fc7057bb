"""The GPU kernel, run by Triton's interpreter on the CPU, against the tensor operations it stands for."""

import os
import subprocess
import sys

import pytest
import torch

from calibprune.pruning import sparsegpt

pytest.importorskip("triton")

COMPARE = """
import torch
from calibprune.pruning.factor import inverse_factor
from calibprune.pruning.sparsegpt import _solve_block_tensors
from calibprune.pruning.sparsegpt_triton import solve_block
from tests.calibprune.pruning.data import correlated_inputs, plain_statistics, random_weights

upper = inverse_factor(plain_statistics(correlated_inputs(300, 96)).gram, 0.01)
for rows, start, columns, n_of_m in (
    (37, 32, 32, None), (16, 64, 24, None), (5, 0, 16, (2, 4)), (20, 80, 16, (2, 8)), (0, 0, 16, None)
):
    (weights,) = random_weights(rows, width=96)
    keep = torch.ones(rows, columns, dtype=torch.bool)
    if n_of_m is None:
        keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) > 0.5
    one, two = weights.clone(), weights.clone()
    expected = _solve_block_tensors(one, keep.clone(), upper, start, n_of_m)
    errors = solve_block(two, keep.clone(), upper, start, n_of_m)
    assert torch.equal(one == 0, two == 0)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(errors, expected, rtol=1e-5, atol=1e-7)
    if rows:
        part = weights[: rows // 2].clone()  # rows do not depend on those beside them
        solve_block(part, keep[: rows // 2].clone(), upper, start, n_of_m)
        assert torch.equal(part, two[: rows // 2])
try:
    solve_block(weights, keep, upper.T.contiguous().T, 0, None)
except ValueError:
    pass
else:
    raise AssertionError("read by columns")

width = 46_400  # beyond 46,341 a place in the matrix needs more than 31 bits; memory is used where it is written to
huge, start = torch.empty(width, width), width - 16
huge[start:, start:] = upper[80:, 80:]
for n_of_m in (None, (2, 4)):
    (weights,) = random_weights(20, width=96)
    one, two = weights.clone(), torch.empty(20, width)
    two[:, start:] = weights[:, 80:]
    keep = torch.rand(20, 16, generator=torch.Generator().manual_seed(7)) > 0.5
    expected = _solve_block_tensors(one, keep.clone(), upper, 80, n_of_m)
    errors = solve_block(two, keep.clone(), huge, start, n_of_m)
    torch.testing.assert_close(two[:, start:], one[:, 80:], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(errors, expected, rtol=1e-5, atol=1e-7)
"""

AS_ON_A_GPU = """
from calibprune.config.prune import SparseGPT
from calibprune.pruning import sparsegpt
from calibprune.pruning.masks import Target

statistics = plain_statistics(correlated_inputs(300, 96))
weights = random_weights(37, width=96)
settings = SparseGPT(type="sparsegpt", blocksize=32)
targets = [Target(0.5)], [Target(0.5, (2, 4))]
expected = [sparsegpt.prune(weights, statistics, target, settings)[0] for target in targets]
sparsegpt.runs_compiled = lambda device: False
sparsegpt._block_solver = lambda device, n_of_m: solve_block
for target, wanted in zip(targets, expected):
    (found,) = sparsegpt.prune(weights, statistics, target, settings)
    assert torch.equal(found == 0, wanted == 0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
print("same")
"""


def test_the_kernel_computes_what_the_tensor_operations_do():
    """By itself, and in the whole method as on a GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when triton is imported
    ran = subprocess.run(
        [sys.executable, "-c", COMPARE + AS_ON_A_GPU], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert ran.stdout.endswith("same\n"), ran.stderr


def test_large_groups_take_the_tensor_operations():
    from calibprune.pruning.sparsegpt_triton import solve_block

    gpu = torch.device("cuda")
    for n_of_m in (None, (2, 4), (4, 8)):
        assert sparsegpt._block_solver(gpu, n_of_m) is solve_block
    for n_of_m in ((8, 16), (16, 32)):
        assert sparsegpt._block_solver(gpu, n_of_m) is sparsegpt._solve_block_tensors
    assert sparsegpt._block_solver(torch.device("cpu"), (2, 4)) is sparsegpt._solve_block_tensors
