"""Reductions, scans, softmax, sorting and counting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir.core import Value
from ...ir.ops import reduce as r
from ...ir.ops.elementwise import Cast, Div, Mul, Neg, Sqrt, Sub
from ...ir.types import DType
from .rules import Emitter, Number, OpClass, aten, unsupported
from .shape import reshaped

Dims = int | Sequence[int] | None


def _axes(x: Value, dim: Dims) -> tuple[int, ...]:
    """The axes that torch means: all of them for None and for an empty list."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or range(x.tensor.rank))
    return tuple(d % x.tensor.rank for d in dims) if x.shape else ()


def _reduce(b: Emitter, op: OpClass, x: Value, dim: Dims, keepdim: bool) -> Value:
    axes = _axes(x, dim)
    return b.make(op(x, axes=axes, keepdims=keepdim and bool(axes)))


@aten("sum", "sum.dim_IntList")
def sum_(b: Emitter, x: Value, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return _reduce(b, r.Sum, b.cast(x, b.dtype), dim, keepdim)


@aten("mean", "mean.dim")
def mean(b: Emitter, x: Value, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return _reduce(b, r.Mean, b.cast(x, b.dtype), dim, keepdim)


@aten("amax", "max")
def amax(b: Emitter, x: Value, dim: Dims = None, keepdim: bool = False) -> Value:
    return _reduce(b, r.Max, x, dim, keepdim)


@aten("amin", "min")
def amin(b: Emitter, x: Value, dim: Dims = None, keepdim: bool = False) -> Value:
    return _reduce(b, r.Min, x, dim, keepdim)


@aten("max.dim")
def max_dim(b: Emitter, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    return _reduce(b, r.Max, x, dim, keepdim), b.make(r.ArgMax(x, dim, keepdim))


@aten("min.dim")
def min_dim(b: Emitter, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    return _reduce(b, r.Min, x, dim, keepdim), b.make(r.ArgMax(b.make(Neg(x)), dim, keepdim))


@aten("argmax")
def argmax(b: Emitter, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    if dim is not None:
        return b.make(r.ArgMax(x, dim, keepdim))
    return reshaped(b, b.make(r.ArgMax(reshaped(b, x, (x.tensor.size,)), 0)), b.shape)


@aten("argmin")
def argmin(b: Emitter, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    return argmax(b, b.make(Neg(x)), dim, keepdim)


@aten("any", "any.dim", "any.dims")
def any_(b: Emitter, x: Value, dim: Dims = None, keepdim: bool = False) -> Value:
    return _reduce(b, r.Any, b.cast(x, DType.bool), dim, keepdim)


@aten("all", "all.dim", "all.dims")
def all_(b: Emitter, x: Value, dim: Dims = None, keepdim: bool = False) -> Value:
    return _reduce(b, r.All, b.cast(x, DType.bool), dim, keepdim)


@aten("var.correction")
def var(b: Emitter, x: Value, dim: Dims = None, *, correction: Number | None = None, keepdim: bool = False) -> Value:
    """Mean square distance from the mean, of n - correction (1 unless given), in float32."""
    wide, axes = b.wide(x), _axes(x, dim)
    centred = b.make(Sub(wide, b.make(r.Mean(wide, axes=axes, keepdims=True))))
    total = b.make(r.Sum(b.make(Mul(centred, centred)), axes=axes, keepdims=keepdim))
    count = x.tensor.size // max(1, total.tensor.size)
    return b.cast(b.make(Div(total, b.number(count - (1 if correction is None else correction), total.dtype))), x.dtype)


@aten("linalg_vector_norm")
def vector_norm(b: Emitter, x: Value, ord: Number = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    if ord != 2:
        raise unsupported(f"a norm of order {ord}", "2")
    wide = b.wide(x)
    return b.cast(b.make(Sqrt(_reduce(b, r.Sum, b.make(Mul(wide, wide)), dim, keepdim))), b.dtype)


@aten("cumsum")
def cumsum(b: Emitter, x: Value, dim: int, *, dtype: Any = None) -> Value:
    return b.make(r.CumSum(b.cast(x, b.dtype), dim % x.tensor.rank)) if x.shape else x


@aten("softmax.int", "_softmax")
def softmax(b: Emitter, x: Value, dim: int, dtype: Any = None) -> Value:
    return b.make(r.Softmax(_float(b, x), dim, None if x.dtype is b.dtype else b.dtype))


@aten("log_softmax.int", "_log_softmax")
def log_softmax(b: Emitter, x: Value, dim: int, dtype: Any = None) -> Value:
    return b.make(r.LogSoftmax(_float(b, x), dim, None if x.dtype is b.dtype else b.dtype))


def _float(b: Emitter, x: Value) -> Value:
    return x if x.dtype.is_float else b.cast(x, b.dtype)


@aten("topk")
def topk(b: Emitter, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Value, Value]:
    """In descending order, which torch leaves open where not `sorted`."""
    values, indices = b.emit(r.TopK(x if largest else b.make(Neg(x)), k, dim)).results
    return values if largest else b.make(Neg(values)), indices


@aten("sort", "sort.stable")
def sort(b: Emitter, x: Value, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> tuple[Value, Value]:
    values, indices = b.emit(r.Sort(x, dim, descending)).results
    return values, indices


@aten("histc")
def histc(b: Emitter, x: Value, bins: int = 100, min: Number = 0, max: Number = 0) -> Value:
    """Of whole numbers in unit bins: a histogram. Torch wants them as floats on the CPU, so they come through a cast."""
    whole = x.owner.x if isinstance(x.owner, Cast) else x
    if whole.dtype.is_float or (min, max) != (0, bins - 1):
        raise unsupported(f"histc of {x.type} in {bins} bins from {min} to {max}", "whole numbers in bins 0 .. bins - 1")
    return b.cast(b.make(r.Histogram(whole, bins)), b.dtype)
