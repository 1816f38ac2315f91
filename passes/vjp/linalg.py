"""Derivatives of matrix products: Dgrad, the gradient of the input, and Wgrad, that of the weight.

A Linear y = x W^T reads its weight as [N, K] (`transpose_b`). Its Dgrad dx = dy W reads it untransposed, and its Wgrad
dW = dy^T x sums over all tokens at once, so tokens become the rows of one matrix.
"""

from __future__ import annotations

from math import prod

from ...ir.core import Value
from ...ir.ops.linalg import GroupedMatmul, GroupedMatmulWgrad, Matmul
from ...ir.ops.shape import Reshape, Transpose
from ...ir.types import DType
from .rules import Backward, Gradients, extents, missing, pair, vjp

missing("second derivatives are not taken", GroupedMatmulWgrad)


@vjp(Matmul)
def matmul(op: Matmul, b: Backward, dy: Value) -> Gradients:
    """With b [k, n]: da = dy b^T, db = a^T dy. With transpose_b, b [n, k]: da = dy b, db = dy^T a."""
    da = db = None
    if b.wants(op.a):
        left, right = pair(b, dy, op.b)
        da = b.fit(b.emit(Matmul(left, right, transpose_b=not op.transpose_b, out=_out(b, op.a, left))).result, op.a)
    if b.wants(op.b):
        a = op.a
        if op.b.tensor.rank == 2 and a.tensor.rank > 2:
            a, dy = (b.emit(Reshape(x, (prod(extents(x)[:-1]), extents(x)[-1]))).result for x in (a, dy))
        left, right = pair(b, dy, a)
        left, right = (left, right) if op.transpose_b else (right, left)
        db = b.fit(b.emit(Matmul(_swapped(left, b), right, out=_out(b, op.b, left))).result, op.b)
    return da, db


def _out(b: Backward, x: Value, operand: Value) -> DType | None:
    """The dtype of the product that becomes the gradient of `x`, where its operands do not have it."""
    return None if b.dtype(x) is operand.dtype else b.dtype(x)


def _swapped(x: Value, b: Backward) -> Value:
    """The last two axes exchanged."""
    rank = x.tensor.rank
    return b.emit(Transpose(x, (*range(rank - 2), rank - 1, rank - 2))).result


@vjp(GroupedMatmul)
def grouped_matmul(op: GroupedMatmul, b: Backward, dy: Value) -> Gradients:
    """Per group as in matmul: dx = dy w^T (dy w with transpose_b), dw = x^T dy (dy^T x). Rows past the counts have no gradient."""
    dx = dw = None
    if b.wants(op.x):
        left, right = pair(b, dy, op.w)
        dx = b.fit(b.emit(GroupedMatmul(left, right, op.counts, transpose_b=not op.transpose_b)).result, op.x)
    if b.wants(op.w):
        left, right = pair(b, dy, op.x)
        left, right = (left, right) if op.transpose_b else (right, left)
        dw = b.fit(b.emit(GroupedMatmulWgrad(left, right, op.counts, out=b.dtype(op.w))).result, op.w)
    return dx, dw, None
