"""Products of bfloat16 matrices that are summed in float32, on CPUs: MKL has them, and torch has no function for them.

Several times as fast as float32 products on processors with bfloat16 instructions, and as exact: a product of two
bfloat16 numbers is a float32 number.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor

ROW_MAJOR, AS_STORED, TRANSPOSED = 101, 111, 112
"""Numbers of the options in CBLAS."""

INSTRUCTIONS = {"amx_bf16", "avx512_bf16"}


@cache
def have_bfloat16_products() -> bool:
    """Returns whether `multiply_bfloat16` works here and is faster than a product in float32.

    MKL converts to float32 and back on processors without these instructions, and on those not made by Intel.
    """
    try:
        processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        return bool(
            "GenuineIntel" in processor
            and INSTRUCTIONS & set(processor.split())
            and _library().cblas_gemm_bf16bf16f32
        )
    except (OSError, AttributeError):  # another system, or torch without MKL
        return False


def multiply_bfloat16(
    left: BFloat16[Tensor, "m k"], right: BFloat16[Tensor, "k n"], out: Float32[Tensor, "m n"]
) -> Float32[Tensor, "m n"]:
    """Writes left @ right into `out` and returns it. Each matrix or its transpose lies row by row in CPU memory."""
    (rows, inner), columns = left.shape, right.shape[1]
    if not left.numel() or not right.numel():
        return out.zero_()
    a, b = _stored(left), _stored(right)
    integer, number, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    _library().cblas_gemm_bf16bf16f32(
        ROW_MAJOR, a[0], b[0], integer(rows), integer(columns), integer(inner),
        number(1), pointer(left.data_ptr()), integer(a[1]), pointer(right.data_ptr()), integer(b[1]),
        number(0), pointer(out.data_ptr()), integer(max(out.stride(0), columns)),
    )  # fmt: skip
    return out


def _stored(matrix: Tensor) -> tuple[int, int]:
    """Returns how CBLAS finds a matrix: the option, and the numbers from one stored row to the next."""
    if matrix.stride(1) == 1:
        return AS_STORED, max(matrix.stride(0), matrix.shape[1])
    if matrix.stride(0) == 1:
        return TRANSPOSED, max(matrix.stride(1), matrix.shape[0])
    raise ValueError(f"a matrix with strides {matrix.stride()} lies neither by rows nor by columns")


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
