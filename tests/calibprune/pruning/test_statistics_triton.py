"""The GPU kernel that adds to Gram matrices, on a CPU through Triton's interpreter, and compiled without a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SAME_BITS = """
import torch
from calibprune.pruning.statistics import _add_scaled_tensors
from calibprune.pruning.statistics_triton import add_scaled
generator = torch.Generator().manual_seed(0)
for size in (1e-3, 3.0, 1e7, 1e15):
    product = torch.randn(5, 2100, generator=generator) * size
    product[0, :8] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 4194304.5, -8388607.5])
    sums = torch.randint(-(2**60), 2**60, (2101, 2101), generator=generator)
    expected, found = sums.clone(), sums.clone()
    _add_scaled_tensors(expected, product, 2.0, 2095)
    add_scaled(found, product, 2.0, 2095)
    assert torch.equal(found.tril(), expected.tril())
    assert torch.equal(found.triu(1), sums.triu(1))
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from calibprune.pruning.statistics_triton import _kernel
signature = {"sums": "*i64", "product": "*fp32", "scale": "fp32", "first_row": "i32", "columns": "i32",
             "sums_stride": "i32", "product_stride": "i32", "WIDTH": "constexpr"}
source = ASTSource(fn=_kernel, signature=signature, constexprs={"WIDTH": 2048})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
assert "cvt.rzi.s64.f32" in compiled.asm["ptx"]
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )  # fmt: skip


def test_the_kernel_adds_the_same_bits():
    ran = run(SAME_BITS, TRITON_INTERPRET="1")
    assert ran.returncode == 0, ran.stderr


def test_the_kernel_compiles_for_hopper(tmp_path):
    ran = run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
