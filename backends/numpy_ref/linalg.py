"""Matrix products, straight to BLAS."""

from __future__ import annotations

from math import prod

import numpy as np

from ...ir.errors import require
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
    ends = check_counts(counts, len(x))
    result = np.empty((len(x), w.shape[1 if transpose_b else 2]), wide)
    for group in np.flatnonzero(counts):
        rows = slice(ends[group] - counts[group], ends[group])
        matrix = widen(w[group], wide)
        np.matmul(widen(x[rows], wide), matrix.T if transpose_b else matrix, out=result[rows])
    result[ends[-1] if len(ends) else 0 :] = 0
    return result


@reference(ops.GroupedMatmulWgrad, operands="blocks")
def grouped_matmul_wgrad(op: ops.GroupedMatmulWgrad, wide: np.dtype[np.floating], a: Array, b: Array, counts: Array) -> Array:
    return multiply_groups_of_rows(a, b, counts, wide)


def multiply_groups_of_rows(a: Array, b: Array, counts: Array, wide: np.dtype[np.floating]) -> Array:
    """`grouped_matmul_wgrad` in dtype `wide`."""
    ends = check_counts(counts, len(a))
    result = np.zeros((len(counts), a.shape[1], b.shape[1]), wide)
    for group in np.flatnonzero(counts):
        rows = slice(ends[group] - counts[group], ends[group])
        np.matmul(widen(a[rows], wide).T, widen(b[rows], wide), out=result[group])
    return result


def check_counts(counts: Array, rows: int) -> Array:
    """Where each group ends, as int64. `DscError` where a count is negative or all groups together have more than `rows` rows."""
    ends = np.cumsum(counts, dtype=np.int64)
    require(not len(counts) or counts.min() >= 0, f"counts are {counts.tolist()}, expected 0 or more")
    require(not len(ends) or ends[-1] <= rows, f"counts add up to {ends[-1:].sum()} rows, but there are {rows}")
    return ends
