"""Matrix products: the vendor's GEMM for plain BF16 and FP16, summed in float32 and rounded once."""

from __future__ import annotations

import torch

from ....ir.ops import linalg as ops
from ....ir.types import DType
from ..tensors import rounded, widen
from .registry import compute_dtype, torch_op

Tensor = torch.Tensor


@torch_op(ops.Matmul)
def matmul(op: ops.Matmul, a: Tensor, b: Tensor) -> Tensor:
    b = b.transpose(-1, -2) if op.transpose_b else b
    if a.is_cuda and op.a.dtype in (DType.bf16, DType.f16) and op.result.dtype is op.a.dtype:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        return torch.matmul(a, b)
    wide = compute_dtype(op)
    return rounded(torch.matmul(widen(a, wide), widen(b, wide)), op.result.dtype)


@torch_op(ops.GroupedMatmul)
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


@torch_op(ops.GroupedMatmulWgrad)
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
