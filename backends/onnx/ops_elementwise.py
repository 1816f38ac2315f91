"""Elementwise ops in standard ops. Sigmoids are written out, since runtimes approximate theirs beyond a float32's last places."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...ir.core import Op
from ...ir.ops import elementwise as ops
from ...ir.types import DType
from ..arrays import STORAGE
from .emit import Emitter, Value, wide_of
from .registry import onnx

UNARY: dict[type[Op], str] = {
    ops.Neg: "Neg",
    ops.Abs: "Abs",
    ops.Exp: "Exp",
    ops.Log: "Log",
    ops.Sqrt: "Sqrt",
    ops.Sin: "Sin",
    ops.Cos: "Cos",
    ops.Tanh: "Tanh",
    ops.Erf: "Erf",
    ops.Floor: "Floor",
    ops.Relu: "Relu",
    ops.Not: "Not",
}

BINARY: dict[type[Op], str] = {
    ops.Add: "Add",
    ops.Sub: "Sub",
    ops.Mul: "Mul",
    ops.Pow: "Pow",
    ops.Maximum: "Max",  # of 0 and -0 ONNX takes either; Where, which could choose, loses the sign of 0 in ONNX Runtime
    ops.Minimum: "Min",
    ops.Eq: "Equal",
    ops.Lt: "Less",
    ops.Le: "LessOrEqual",
    ops.Gt: "Greater",
    ops.Ge: "GreaterOrEqual",
    ops.And: "And",
    ops.Or: "Or",
}


def _unary(op_type: str) -> Callable[[Emitter, Op, Value], Value]:
    return lambda g, op, x: g.node(op_type, x)


def _binary(op_type: str) -> Callable[[Emitter, Op, Value, Value], Value]:
    return lambda g, op, a, b: g.node(op_type, *g.same(op, a, b))


for _cls, _op_type in UNARY.items():
    onnx(_cls)(_unary(_op_type))
for _cls, _op_type in BINARY.items():
    onnx(_cls)(_binary(_op_type))


@onnx(ops.Ne)
def ne(g: Emitter, op: ops.Ne, a: Value, b: Value) -> Value:
    return g.Not(g.Equal(*g.same(op, a, b)))


@onnx(ops.Rsqrt)
def rsqrt(g: Emitter, op: ops.Rsqrt, x: Value) -> Value:
    return g.Reciprocal(g.Sqrt(x))


@onnx(ops.Sigmoid)
def sigmoid(g: Emitter, op: Op, x: Value) -> Value:
    return g.Reciprocal(_one_plus_exp(g, op, x))


@onnx(ops.Silu)
def silu(g: Emitter, op: Op, x: Value) -> Value:
    return g.Div(x, _one_plus_exp(g, op, x))


def _one_plus_exp(g: Emitter, op: Op, x: Value) -> Value:
    return g.Add(g.Exp(g.Neg(x)), g.number(1.0, wide_of(op)))


@onnx(ops.SwiGLU)
def swiglu(g: Emitter, op: ops.SwiGLU, gate: Value, up: Value, weight: Value | None = None) -> Value:
    y = g.Mul(silu(g, op, gate), up)
    return y if weight is None else g.Mul(y, weight)


@onnx(ops.Div)
def div(g: Emitter, op: ops.Div, a: Value, b: Value) -> Value:
    """Of integers ONNX rounds toward zero: the remainder is taken away first."""
    a, b = g.same(op, a, b)
    return g.Div(a, b) if op.result.dtype.is_float else g.Div(g.Sub(a, g.Mod(a, b)), b)


@onnx(ops.Remainder)
def remainder(g: Emitter, op: ops.Remainder, a: Value, b: Value) -> Value:
    """Of floats ONNX gives the remainder the sign of a; it is to have that of b."""
    a, b = g.same(op, a, b)
    if not op.result.dtype.is_float:
        return g.Mod(a, b)
    rest, zero = g.Mod(a, b, fmod=1), g.number(0.0, wide_of(op))
    other = g.Xor(g.Less(rest, zero), g.Less(b, zero))
    return g.Where(g.And(other, g.Not(g.Equal(rest, zero))), g.Add(rest, b), rest)


@onnx(ops.Where, "stored")
def where(g: Emitter, op: ops.Where, condition: Value, a: Value, b: Value) -> Value:
    dtype = op.result.dtype
    a, b = (g.carried(convert(g, x, v.dtype, dtype), dtype) for x, v in ((a, op.a), (b, op.b)))
    return g.uncarried(g.Where(condition, a, b), dtype)


@onnx(ops.Cast, "stored")
def cast(g: Emitter, op: ops.Cast, x: Value) -> Value:
    return convert(g, x, op.x.dtype, op.dtype)


def convert(g: Emitter, x: Value, source: DType, target: DType) -> Value:
    """`x`, whose elements are of `source`, as the cast op gives it in `target`."""
    if source is target:
        return x
    if source.is_float and target.is_float:
        wide = DType.f64 if source is DType.f64 else DType.f32
        return g.rounded(g.widened(x, source, wide), wide, target)
    if source.is_float and target is DType.bool:
        wide = DType.f64 if source is DType.f64 else DType.f32
        return g.Not(g.Equal(g.widened(x, source, wide), g.number(0.0, wide)))
    if source.is_float:
        return _toward_zero(g, g.widened(x, source, DType.f64), target)
    if target.is_float and target not in (DType.f32, DType.f64):
        return g.rounded(g.cast(x, DType.f64), DType.f64, target)
    return g.cast(x, target)


def _toward_zero(g: Emitter, x: Value, target: DType) -> Value:
    """float64 truncated; what lies beyond the range becomes its end, NaN becomes 0."""
    limits = np.iinfo(STORAGE[target])
    low, high = float(limits.min), float(limits.max) if limits.bits < 64 else float(2**63 - 1024)
    inside = g.Where(g.IsNaN(x), g.number(0.0, DType.f64), g.Min(g.Max(x, g.number(low, DType.f64)), g.number(high, DType.f64)))
    whole = g.cast(inside, target)
    if limits.bits < 64:
        return whole
    return g.Where(g.Greater(x, g.number(high, DType.f64)), np.int64(limits.max), whole)
