"""Bfloat16 factors, float32 sums: on a CPU PyTorch's own product of bfloat16 factors is rounded to them.

`torch.mm` knows `out_dtype` on CUDA only (2.13). That float32 products may take bfloat16 factors, as the server has it,
is a setting of the process, and would reach what other threads compute. So where a processor multiplies tiles of
bfloat16 (AMX) oneMKL is called, which PyTorch brings along; elsewhere the matrix is widened.

Shapes: the legend in docs/architecture.md; here V counts the rows of any matrix.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Of a matrix that is widened at once: small enough to stay in a cache until it is multiplied.
_TILE_BYTES = 8 * 2**20
# Of cblas.h.
_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112


def product_on_cpu(hidden_ND: Tensor, matrix_VD: Tensor) -> Tensor:
    """Hidden · matrixᵀ, float32 [N, V].

    Args:
        hidden_ND: bfloat16.
        matrix_VD: bfloat16.

    """
    (N, D), V = hidden_ND.shape, len(matrix_VD)
    product_NV = hidden_ND.new_empty(N, V, dtype=torch.float32)
    gemm = _gemm_of_mkl()
    if gemm is not None:
        hidden_ND, matrix_VD = hidden_ND.contiguous(), matrix_VD.contiguous()
        factors = 1.0, hidden_ND.data_ptr(), D, matrix_VD.data_ptr(), D, 0.0
        gemm(_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED, N, V, D, *factors, product_NV.data_ptr(), V)
        return product_NV
    rows = max(1, _TILE_BYTES // (4 * D))
    for start in range(0, V, rows):
        tile = slice(start, start + rows)
        torch.mm(hidden_ND.float(), matrix_VD[tile].float().T, out=product_NV[:, tile])
    return product_NV


@cache
def _gemm_of_mkl() -> Any:
    """`cblas_gemm_bf16bf16f32` of oneMKL's reference; None where it is not, or not faster."""
    if not torch.cpu._is_amx_tile_supported():
        return None
    gemm = getattr(ctypes.CDLL(torch._C.__file__), "cblas_gemm_bf16bf16f32", None)
    if gemm is not None:
        size, number, address = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
        gemm.argtypes = [size] * 6 + [number, address, size, address, size, number, address, size]
        gemm.restype = None
    return gemm
