"""The GPU kernel, run by Triton's interpreter on the CPU, against the tensor operations it stands for."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPARE = """
import torch
from calibprune.pruning.sparsegpt import _solve_block_tensors, inverse_factor
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
print("same")
"""


def test_the_kernel_computes_what_the_tensor_operations_do():
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when triton is imported
    ran = subprocess.run(
        [sys.executable, "-c", COMPARE], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert ran.stdout.endswith("same\n"), ran.stderr
