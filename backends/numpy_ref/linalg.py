"""Matrix products, straight to BLAS."""

from __future__ import annotations

from itertools import accumulate
from math import prod

import numpy as np

from ...ir.errors import DscError
from ...ir.ops import linalg as ops
from ..arrays import Array, widen
from .registry import reference


@reference(ops.Matmul)
def matmul(op: ops.Matmul, a: Array, b: Array) -> Array:
    if op.transpose_b:
        b = b.swapaxes(-1, -2)
    if b.ndim > 2 or a.ndim == 2:
        return np.matmul(a, b)
    # One product of many rows instead of many products of few.
    return np.matmul(a.reshape(prod(a.shape[:-1]), a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[-1])


@reference(ops.GroupedMatmul, operands="blocks")
def grouped_matmul(op: ops.GroupedMatmul, wide: np.dtype[np.floating], x: Array, w: Array, counts: Array) -> Array:
    return multiply_groups(x, w, counts, op.transpose_b, wide)


def multiply_groups(x: Array, w: Array, counts: Array, transpose_b: bool, wide: np.dtype[np.floating]) -> Array:
    """`grouped_matmul` in dtype `wide`. Matrices of groups without rows are never read."""
    groups = rows_of_groups(counts, len(x))
    result = np.empty((len(x), w.shape[1 if transpose_b else 2]), wide)
    for matrix, rows in zip(w, groups, strict=True):
        if rows.start < rows.stop:
            matrix = widen(matrix, wide)
            np.matmul(widen(x[rows], wide), matrix.T if transpose_b else matrix, out=result[rows])
    result[groups[-1].stop if groups else 0 :] = 0
    return result


@reference(ops.GroupedMatmulWgrad, operands="blocks")
def grouped_matmul_wgrad(op: ops.GroupedMatmulWgrad, wide: np.dtype[np.floating], a: Array, b: Array, counts: Array) -> Array:
    return multiply_groups_of_rows(a, b, counts, wide)


def multiply_groups_of_rows(a: Array, b: Array, counts: Array, wide: np.dtype[np.floating]) -> Array:
    """`grouped_matmul_wgrad` in dtype `wide`."""
    result = np.zeros((len(counts), a.shape[1], b.shape[1]), wide)
    for out, rows in zip(result, rows_of_groups(counts, len(a)), strict=True):
        if rows.start < rows.stop:
            np.matmul(widen(a[rows], wide).T, widen(b[rows], wide), out=out)
    return result


def rows_of_groups(counts: Array, rows: int) -> list[slice]:
    """Where each group lies. `DscError` where a count is negative or all groups together have more than `rows` rows."""
    given: list[int] = counts.tolist()
    if min(given, default=0) < 0:
        raise DscError(f"counts are {given}, expected 0 or more")
    if sum(given) > rows:
        raise DscError(f"counts add up to {sum(given)} rows, but there are {rows}")
    return [slice(end - count, end) for end, count in zip(accumulate(given), given, strict=True)]
