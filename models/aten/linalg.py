"""Matrix products. A transpose of a matrix's last two axes becomes `transpose_b`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir.core import Value
from ...ir.ops.control import Literal
from ...ir.ops.elementwise import Add, Sub
from ...ir.ops.linalg import GroupedMatmul, Matmul
from ...ir.ops.reduce import CumSum
from ...ir.types import DType
from .rules import Emitter, Number, aten, extent, unsupported, untransposed
from .shape import joined, reshaped, sliced, swapped


def product(b: Emitter, x: Value, w: Value, shape: Sequence[int], bias: Value | None = None) -> Value:
    """x w + bias of matrices or stacks of them, rounded once, as an array of `shape`."""
    plain, transposed = untransposed(w)
    if bias is None:
        return reshaped(b, b.make(Matmul(x, plain, transposed)), shape)
    wide = reshaped(b, b.make(Matmul(x, plain, transposed, DType.f32 if x.dtype.bits < 32 else None)), shape)
    return b.cast(b.make(Add(wide, b.wide(bias))), x.dtype)


@aten("linear")
def linear(b: Emitter, x: Value, weight: Value, bias: Value | None = None) -> Value:
    rows = reshaped(b, x, (1, *x.shape)) if x.tensor.rank == 1 else x
    return product(b, rows, swapped(b, weight, 0, 1), b.shape, bias)


@aten("matmul", "mm", "bmm", "mv", "dot", "inner")
def matmul(b: Emitter, x: Value, y: Value, bias: Value | None = None) -> Value:
    """A vector on the left is one row, on the right one column."""
    left = reshaped(b, x, (1, *x.shape)) if x.tensor.rank == 1 else x
    right = reshaped(b, y, (*y.shape, 1)) if y.tensor.rank == 1 else y
    return product(b, left, right, b.shape, bias)


@aten("addmm", "baddbmm", "addmv")
def addmm(b: Emitter, bias: Value, x: Value, y: Value, *, beta: Number = 1, alpha: Number = 1) -> Value:
    if (alpha, beta) != (1, 1):
        raise unsupported(f"addmm with alpha={alpha}, beta={beta}", "1 and 1")
    return matmul(b, x, y, bias)


@aten("_grouped_mm")
def grouped_mm(b: Emitter, x: Value, w: Value, offsets: Value | None = None, bias: Value | None = None, out_dtype: Any = None) -> Value:
    """Rows up to offsets[0] times w[0], then up to offsets[1] times w[1], ..."""
    if offsets is None or bias is not None or b.dtype is not x.dtype or (x.tensor.rank, w.tensor.rank) != (2, 3):
        raise unsupported(f"_grouped_mm of {x.type} and {w.type}", "x [R, K], w [E, K, N] and offsets, without a bias")
    return grouped_matmul(b, x, w, offsets)


@aten("grouped_mm_fallback", namespace="transformers")
def grouped_matmul(b: Emitter, x: Value, w: Value, offsets: Value) -> Value:
    plain, transposed = untransposed(w)
    return b.make(GroupedMatmul(x, plain, _counts(b, offsets), transposed))


def _counts(b: Emitter, offsets: Value) -> Value:
    """How many rows each group has, from where each ends."""
    if isinstance(offsets.owner, CumSum):
        return offsets.owner.x
    groups = extent(offsets, 0)
    zero = b.make(Literal((0,), (1,), offsets.dtype))
    starts = joined(b, [zero, sliced(b, offsets, 0, 0, groups - 1)], 0) if groups > 1 else zero
    return b.make(Sub(offsets, starts))
