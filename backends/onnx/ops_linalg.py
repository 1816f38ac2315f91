"""Matrix products in standard ops. Those of experts are cut into one product for each expert, whose rows lie together.

Groups follow the proposal of a GroupedMatMul for ONNX in the order of arguments: rows, weights, then who goes where.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ir.core import Op
from ...ir.core import Value as DscValue
from ...ir.ops import linalg as ops
from ...ir.types import DType
from .emit import Emitter, Stack, Value, wide_of
from .registry import onnx


@onnx(ops.Matmul)
def matmul(g: Emitter, op: ops.Matmul, a: Value, b: Value) -> Value:
    return g.MatMul(a, g.swapped(b, op.b.tensor.rank) if op.transpose_b else b)


@onnx(ops.GroupedMatmul, "stored", stacks=True)
def grouped_matmul(g: Emitter, op: ops.GroupedMatmul, x: Value, w: Value | Stack, counts: Value) -> Value:
    wide = wide_of(op)
    matrices = [g.widened(m, op.w.dtype, wide) for m in matrices_of(g, w, op.w)]
    found = multiply_groups(g, g.widened(x, op.x.dtype, wide), matrices, counts, op.transpose_b, columns=op.result.shape[1])
    return g.rounded(found, wide, op.result.dtype)


def matrices_of(g: Emitter, w: Value | Stack, value: DscValue) -> list[Value]:
    """The matrices of a stack [E, ...], each of its own; of FP8 they must have come so."""
    if isinstance(w, Stack):
        return list(w.parts)
    extents = [d for d in value.shape if isinstance(d, int)]
    parts = [w] if extents[0] == 1 else g.Split(w, axis=0, num_outputs=extents[0], outputs=extents[0])
    return [g.reshaped(part, *extents[1:]) for part in parts]


def groups_of(g: Emitter, x: Value, counts: Value, groups: int) -> tuple[Value, ...]:
    """The rows of each group, and behind them those of none."""
    counts = g.Cast(counts, to=7)
    spare = g.Sub(g.Shape(x, start=0, end=1), g.sum(counts, 0))
    parts: tuple[Value, ...] = g.Split(x, g.Concat(counts, spare, axis=0), axis=0, outputs=groups + 1)
    return parts


def multiply_groups(g: Emitter, x: Value, matrices: Sequence[Value], counts: Value, transpose_b: bool, columns: object) -> Value:
    """The rows of each group times its matrix, those of none 0; all of one wide type."""
    *rows, spare = groups_of(g, x, counts, len(matrices))
    found = [g.MatMul(r, g.Transpose(m, perm=[1, 0]) if transpose_b else m) for r, m in zip(rows, matrices, strict=True)]
    shape = g.Concat(g.Shape(spare, start=0, end=1), [columns], axis=0)
    zeros = g.CastLike(g.Expand(np.float32(0), shape), x)
    return g.Concat(*found, zeros, axis=0)


@onnx(ops.GroupedMatmulWgrad)
def grouped_matmul_wgrad(g: Emitter, op: ops.GroupedMatmulWgrad, a: Value, b: Value, counts: Value) -> Value:
    return multiply_groups_of_rows(g, op, a, b, counts)


def multiply_groups_of_rows(g: Emitter, op: Op, a: Value, b: Value, counts: Value) -> Value:
    """For each group the product of its rows, a^T b."""
    groups = op.results[0].shape[0]
    assert isinstance(groups, int)
    left, right = (groups_of(g, x, counts, groups)[:-1] for x in (a, b))
    found = [g.MatMul(g.Transpose(m, perm=[1, 0]), n) for m, n in zip(left, right, strict=True)]
    return g.Concat(*(g.Unsqueeze(product, [0]) for product in found), axis=0)


def where_rows(g: Emitter, counts: Value, rows: int) -> tuple[Value, Value]:
    """For each of `rows` rows the group that it is in (their number where in none) and its place there, both int64[rows]."""
    counts = g.Cast(counts, to=7)
    ends = g.CumSum(counts, np.int64(0))
    row = np.arange(rows, dtype=np.int64)
    group = g.sum(g.cast(g.GreaterOrEqual(row[:, None], g.Unsqueeze(ends, [0])), DType.i64), 1, keepdims=False)
    begins = g.Concat(g.Sub(ends, counts), g.sum(counts, 0), axis=0)
    return group, g.Sub(row, g.Gather(begins, group, axis=0))
