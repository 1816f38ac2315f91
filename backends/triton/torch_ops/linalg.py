"""Matrix products: the vendor's GEMM for plain BF16 and FP16, summed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ....ir.ops import linalg as ops
from ....ir.types import DType
from ..tensors import rounded, widen
from .registry import INTO, compute_dtype, torch_op

Tensor = torch.Tensor


@torch_op(ops.Matmul)
def matmul(op: ops.Matmul, a: Tensor, b: Tensor) -> Tensor:
    b = b.transpose(-1, -2) if op.transpose_b else b
    if a.is_cuda and op.a.dtype in (DType.bf16, DType.f16) and op.result.dtype is op.a.dtype:
        _sum_in_float32()
        return torch.matmul(a, b)
    wide = compute_dtype(op)
    return rounded(torch.matmul(widen(a, wide), widen(b, wide)), op.result.dtype)


def matmul_into(op: ops.Matmul, a: Tensor, b: Tensor, c: Tensor) -> Callable[[], object] | None:
    """The vendor's GEMM straight into `c`: of operands in the dtype of the result, and for 16 bits on a GPU, which sums in float32."""
    b = b.transpose(-1, -2) if op.transpose_b else b
    same = op.a.dtype is op.b.dtype is op.result.dtype
    if not same or op.result.dtype not in (DType.f32, DType.f64, *((DType.bf16, DType.f16) if a.is_cuda else ())):
        return None
    if b.ndim == 2 and a.ndim >= 2 and a.is_contiguous():
        _sum_in_float32()
        return partial(torch.mm, a.flatten(0, -2), b, out=c.flatten(0, -2))
    if a.ndim == b.ndim == 3 and len(a) == len(b):
        _sum_in_float32()
        return partial(torch.bmm, a, b, out=c)
    return None


INTO[ops.Matmul] = matmul_into


def _sum_in_float32() -> None:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@torch_op(ops.GroupedMatmul, waits=True)
def grouped_matmul(op: ops.GroupedMatmul, x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """One product per group that has rows. Waits for the counts."""
    wide = compute_dtype(op)
    result = torch.zeros((len(x), w.shape[1 if op.transpose_b else 2]), dtype=wide, device=x.device)
    start = 0
    for group, count in enumerate(counts.tolist()):
        if count:
            matrix = widen(w[group], wide)
            result[start : start + count] = widen(x[start : start + count], wide) @ (matrix.T if op.transpose_b else matrix)
        start += count
    return rounded(result, op.result.dtype)


@torch_op(ops.GroupedMatmulWgrad, waits=True)
def grouped_matmul_wgrad(op: ops.GroupedMatmulWgrad, a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """One product per group that has rows. Waits for the counts."""
    wide = compute_dtype(op)
    return rounded(by_groups_of_rows(widen(a, wide), widen(b, wide), counts), op.result.dtype)


def by_groups_of_rows(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """For each group of consecutive rows its rows of `a` [R, M], transposed, times those of `b` [R, N]: [E, M, N]."""
    result = torch.zeros((len(counts), a.shape[1], b.shape[1]), dtype=a.dtype, device=a.device)
    start = 0
    for group, count in enumerate(counts.tolist()):
        if count:
            result[group] = a[start : start + count].T @ b[start : start + count]
        start += count
    return result
