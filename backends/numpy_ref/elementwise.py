"""Elementwise ops. Float operands arrive widened; results are rounded by the interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ...ir.core import Op
from ...ir.errors import DscError
from ...ir.ops import elementwise as ops
from ...ir.types import DType
from ..arrays import STORAGE, Array, rounded, widen
from .registry import reference


def larger(x: Array, y: Array) -> Array:
    """`np.maximum` gives either of 0 and -0; their sum is 0."""
    return np.add(x, y, out=np.asarray(np.maximum(x, y)), where=(x == 0) & (y == 0))


def smaller(x: Array, y: Array) -> Array:
    """Likewise -0."""
    return -larger(-x, -y) if x.dtype.kind == "f" else np.minimum(x, y)


UNARY: dict[type[Op], np.ufunc] = {
    ops.Neg: np.negative,
    ops.Abs: np.abs,
    ops.Exp: np.exp,
    ops.Log: np.log,
    ops.Sqrt: np.sqrt,
    ops.Sin: np.sin,
    ops.Cos: np.cos,
    ops.Tanh: np.tanh,
    ops.Floor: np.floor,
    ops.Not: np.logical_not,
}

BINARY: dict[type[Op], Callable[[Array, Array], Array]] = {
    ops.Add: np.add,
    ops.Sub: np.subtract,
    ops.Mul: np.multiply,
    ops.Remainder: np.remainder,
    ops.Maximum: larger,
    ops.Minimum: smaller,
    ops.Eq: np.equal,
    ops.Ne: np.not_equal,
    ops.Lt: np.less,
    ops.Le: np.less_equal,
    ops.Gt: np.greater,
    ops.Ge: np.greater_equal,
    ops.And: np.logical_and,
    ops.Or: np.logical_or,
}


def _unary(ufunc: np.ufunc) -> Callable[[Op, Array], Array]:
    return lambda op, x: ufunc(x)


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[Op, Array, Array], Array]:
    return lambda op, a, b: function(*_same_kind(a, b))


for _cls, _ufunc in UNARY.items():
    reference(_cls)(_unary(_ufunc))
for _cls, _function in BINARY.items():
    reference(_cls)(_binary(_function))


def _same_kind(a: Array, b: Array) -> tuple[Array, Array]:
    """An integer scalar next to a float tensor becomes a float: NumPy would widen both to float64."""
    if a.dtype.kind == "f" != b.dtype.kind:
        return a, b.astype(a.dtype)
    if b.dtype.kind == "f" != a.dtype.kind:
        return a.astype(b.dtype), b
    return a, b


@reference(ops.Cast, operands="stored")
def cast(op: ops.Cast, x: Array) -> Array:
    return convert(x, op.x.dtype, op.dtype)


def convert(x: Array, source: DType, target: DType) -> Array:
    """`x`, whose elements are of `source`, as the cast op gives it in `target`."""
    if source is target:
        return x
    if source.is_float and target.is_float:
        return rounded(x, target)
    wide = widen(x, np.float64 if source is DType.f64 else np.float32) if source.is_float else x
    if target is DType.bool:
        return wide != 0
    if target.is_int:
        return _toward_zero(wide, target) if source.is_float else wide.astype(STORAGE[target])
    if target in (DType.f32, DType.f64):
        return wide.astype(STORAGE[target])
    return rounded(wide.astype(np.float64), target)  # exact up to 2^53, so narrower formats round once


def _toward_zero(x: Array, target: DType) -> Array:
    """Truncated; what lies beyond the range becomes its end, NaN becomes 0."""
    limits = np.iinfo(STORAGE[target])
    result = np.asarray(x.astype(limits.dtype))  # of a scalar astype makes a scalar, which takes no assignment
    above = x >= float(limits.max) + (1.0 if limits.bits < 64 else 0.0)  # float(2^63 - 1) is 2^63 already
    result[above] = limits.max
    result[x <= float(limits.min) - (1.0 if limits.bits < 32 else 0.0)] = limits.min
    result[np.isnan(x)] = 0
    return result


@reference(ops.Where, operands="stored")
def where(op: ops.Where, condition: Array, a: Array, b: Array) -> Array:
    dtype = op.result.dtype
    return np.where(condition, convert(a, op.a.dtype, dtype), convert(b, op.b.dtype, dtype))


@reference(ops.Rsqrt)
def rsqrt(op: ops.Rsqrt, x: Array) -> Array:
    return np.divide(1, np.sqrt(x), dtype=x.dtype)


@reference(ops.Erf)
def erf(op: ops.Erf, x: Array) -> Array:
    """By the C library, which NumPy does not wrap."""
    return np.fromiter(map(math.erf, x.ravel().tolist()), x.dtype, x.size).reshape(x.shape)


@reference(ops.Sigmoid)
def sigmoid(op: Op, x: Array) -> Array:
    result = np.asarray(np.negative(x))
    np.exp(result, out=result)
    result += 1
    return np.divide(1, result, out=result)


@reference(ops.Silu)
def silu(op: Op, x: Array) -> Array:
    result = np.asarray(np.negative(x))
    np.exp(result, out=result)
    result += 1
    return np.divide(x, result, out=result)


@reference(ops.SwiGLU)
def swiglu(op: ops.SwiGLU, gate: Array, up: Array, weight: Array | None = None) -> Array:
    activated = silu(op, gate)
    result = np.multiply(activated, up, out=activated if activated.shape == np.broadcast_shapes(gate.shape, up.shape) else None)
    return result if weight is None else np.multiply(result, weight, out=result)


@reference(ops.Relu)
def relu(op: ops.Relu, x: Array) -> Array:
    return np.maximum(x, 0)


@reference(ops.Div)
def div(op: ops.Div, a: Array, b: Array) -> Array:
    a, b = _same_kind(a, b)
    return np.divide(a, b) if a.dtype.kind == "f" else np.floor_divide(a, b)


@reference(ops.Pow)
def pow(op: ops.Pow, a: Array, b: Array) -> Array:
    a, b = _same_kind(a, b)
    if a.dtype.kind != "f" and b.size and (least := b.min()) < 0:
        raise DscError(f"exponent {least} of an integer, expected 0 or more")
    return np.power(a, b)


@reference(ops.SwiGLUBackward)
def swiglu_backward(op: ops.SwiGLUBackward, gate: Array, up: Array, dy: Array) -> tuple[Array, Array]:
    s = sigmoid(op, gate)
    dup = gate * s
    dup *= dy
    dgate = np.subtract(1, s, dtype=s.dtype)
    dgate *= gate
    dgate += 1
    dgate *= s
    dgate *= up
    dgate *= dy
    return dgate, dup
