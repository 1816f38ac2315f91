"""Elementwise ops: arithmetic, comparison, activation, casts."""

from __future__ import annotations

import math
from typing import Any

from ...ir.core import Value
from ...ir.ops import elementwise as e
from ...ir.types import DType
from .rules import Emitter, Number, OpClass, aten, promoted, unify, unsupported

Operand = Value | Number


def _arithmetic(b: Emitter, make: OpClass, x: Operand, y: Operand) -> Value:
    """make(x, y) in torch's common dtype; a result of rank 0 and less than 32 bits is computed in float32, as its scalars are."""
    common = promoted(x, y)
    narrow_scalar = not b.shape and common.is_float and common.bits < 32
    left, right = unify(b, x, y, dtype=DType.f32 if narrow_scalar else common)
    return b.cast(b.make(make(left, right)), common)


def _scaled(b: Emitter, y: Operand, alpha: Number) -> Operand:
    """alpha * y, in float32 where y is narrower."""
    if alpha == 1:
        return y
    if not isinstance(y, Value):
        return y * alpha
    return _arithmetic_of_shape(b, e.Mul, b.wide(y), alpha)


def _arithmetic_of_shape(b: Emitter, make: OpClass, x: Operand, y: Operand) -> Value:
    left, right = unify(b, x, y)
    return b.make(make(left, right))


@aten("add.Tensor", "add.Scalar")
def add(b: Emitter, x: Operand, y: Operand, alpha: Number = 1) -> Value:
    if b.dtype is DType.bool:
        return b.make(e.Or(*_bools(b, x, y)))
    if alpha != 1:
        return b.cast(_arithmetic_of_shape(b, e.Add, _wide(b, x), _scaled(b, y, alpha)), b.dtype)
    return _arithmetic(b, e.Add, x, y)


@aten("sub.Tensor", "sub.Scalar")
def sub(b: Emitter, x: Operand, y: Operand, alpha: Number = 1) -> Value:
    if alpha != 1:
        return b.cast(_arithmetic_of_shape(b, e.Sub, _wide(b, x), _scaled(b, y, alpha)), b.dtype)
    return _arithmetic(b, e.Sub, x, y)


def _wide(b: Emitter, x: Operand) -> Operand:
    return b.wide(x) if isinstance(x, Value) else x


@aten("mul.Tensor", "mul.Scalar")
def mul(b: Emitter, x: Operand, y: Operand) -> Value:
    if b.dtype is DType.bool:
        return b.make(e.And(*_bools(b, x, y)))
    return _arithmetic(b, e.Mul, x, y)


@aten("div.Tensor", "div.Scalar")
def div(b: Emitter, x: Operand, y: Operand) -> Value:
    if not promoted(x, y).is_float:  # torch's / of whole numbers is a fraction
        return b.make(e.Div(*unify(b, x, y, dtype=b.dtype)))
    return _arithmetic(b, e.Div, x, y)


@aten("div.Tensor_mode", "div.Scalar_mode")
def div_mode(b: Emitter, x: Operand, y: Operand, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return div(b, x, y)
    if rounding_mode == "floor":
        return floor_divide(b, x, y)
    raise unsupported(f'rounding_mode="{rounding_mode}"', '"floor"')


@aten("floor_divide", "floor_divide.Scalar")
def floor_divide(b: Emitter, x: Operand, y: Operand) -> Value:
    if not b.dtype.is_float:
        return _arithmetic(b, e.Div, x, y)
    left, right = (_wide(b, operand) for operand in (x, y))
    return b.cast(b.make(e.Floor(_arithmetic_of_shape(b, e.Div, left, right))), b.dtype)


@aten("remainder.Tensor", "remainder.Scalar")
def remainder(b: Emitter, x: Operand, y: Operand) -> Value:
    return _arithmetic(b, e.Remainder, x, y)


@aten("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "square")
def power(b: Emitter, x: Operand, y: Operand = 2) -> Value:
    if isinstance(x, Value) and x.dtype is b.dtype and y in (1, 2, 0.5, -0.5, -1):
        match y:
            case 1:
                return x
            case 2:
                return b.make(e.Mul(x, x))
            case 0.5:
                return b.make(e.Sqrt(x))
            case -0.5:
                return b.make(e.Rsqrt(x))
            case _:
                return reciprocal(b, x)
    return _arithmetic(b, e.Pow, x, y)


@aten("maximum", "max.other")
def maximum(b: Emitter, x: Operand, y: Operand) -> Value:
    return _arithmetic(b, e.Maximum, x, y)


@aten("minimum", "min.other")
def minimum(b: Emitter, x: Operand, y: Operand) -> Value:
    return _arithmetic(b, e.Minimum, x, y)


@aten("clamp", "clamp.Tensor")
def clamp(b: Emitter, x: Value, low: Operand | None = None, high: Operand | None = None) -> Value:
    made: Value = x if x.dtype is b.dtype else b.cast(x, b.dtype)
    made = made if low is None else _arithmetic(b, e.Maximum, made, low)
    return made if high is None else _arithmetic(b, e.Minimum, made, high)


@aten("hardtanh")
def hardtanh(b: Emitter, x: Value, low: Number = -1, high: Number = 1) -> Value:
    return clamp(b, x, low, high)


@aten("reciprocal")
def reciprocal(b: Emitter, x: Value) -> Value:
    return _arithmetic(b, e.Div, 1, x) if x.dtype.is_float else div(b, 1, x)


def _unary(op: OpClass, name: str) -> None:
    @aten(name)
    def rule(b: Emitter, x: Value) -> Value:
        return b.make(op(b.cast(x, b.dtype)))


_op: OpClass

for _op, _name in (
    (e.Neg, "neg"),
    (e.Abs, "abs"),
    (e.Exp, "exp"),
    (e.Log, "log"),
    (e.Sqrt, "sqrt"),
    (e.Rsqrt, "rsqrt"),
    (e.Sin, "sin"),
    (e.Cos, "cos"),
    (e.Tanh, "tanh"),
    (e.Erf, "erf"),
    (e.Floor, "floor"),
    (e.Sigmoid, "sigmoid"),
    (e.Silu, "silu"),
    (e.Relu, "relu"),
):
    _unary(_op, _name)


def _comparison(op: OpClass, name: str) -> None:
    @aten(f"{name}.Tensor", f"{name}.Scalar")
    def rule(b: Emitter, x: Value, y: Operand) -> Value:
        return b.make(op(*unify(b, x, y)))


for _op, _name in ((e.Eq, "eq"), (e.Ne, "ne"), (e.Lt, "lt"), (e.Le, "le"), (e.Gt, "gt"), (e.Ge, "ge")):
    _comparison(_op, _name)


def _bools(b: Emitter, *operands: Operand) -> tuple[Value, ...]:
    return tuple(b.cast(x, DType.bool) if isinstance(x, Value) else b.number(bool(x), DType.bool) for x in operands)


def _logical(op: OpClass, name: str) -> None:
    @aten(f"logical_{name}", f"bitwise_{name}.Tensor", f"bitwise_{name}.Scalar")
    def rule(b: Emitter, x: Value, y: Operand) -> Value:
        if b.dtype is not DType.bool:
            raise unsupported(f"a bitwise {name} of {x.type}", "bool")
        return b.make(op(*_bools(b, x, y)))


for _op, _name in ((e.And, "and"), (e.Or, "or"), (e.Ne, "xor")):
    _logical(_op, _name)


@aten("logical_not", "bitwise_not")
def logical_not(b: Emitter, x: Value) -> Value:
    if b.dtype is not DType.bool:
        raise unsupported(f"a bitwise not of {x.type}", "bool")
    return b.make(e.Not(b.cast(x, DType.bool)))


@aten("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def where(b: Emitter, condition: Value, x: Operand, y: Operand) -> Value:
    left, right = unify(b, x, y, dtype=b.dtype)
    return b.make(e.Where(condition, left, right))


@aten("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(b: Emitter, x: Value, mask: Value, value: Operand) -> Value:
    filled, kept = unify(b, value, x, dtype=x.dtype)
    return b.make(e.Where(mask, filled, kept))


@aten("gelu")
def gelu(b: Emitter, x: Value, *, approximate: str = "none") -> Value:
    """x Phi(x), or its tanh approximation (arXiv 1606.08415), in float32."""
    wide = b.wide(x)
    half = _arithmetic_of_shape(b, e.Mul, wide, 0.5)
    if approximate == "none":
        inner = b.make(e.Erf(_arithmetic_of_shape(b, e.Mul, wide, math.sqrt(0.5))))
    else:
        cube = b.make(e.Mul(b.make(e.Mul(wide, wide)), wide))
        sum_ = b.make(e.Add(wide, _arithmetic_of_shape(b, e.Mul, cube, 0.044715)))
        inner = b.make(e.Tanh(_arithmetic_of_shape(b, e.Mul, sum_, math.sqrt(2 / math.pi))))
    return b.cast(b.make(e.Mul(half, _arithmetic_of_shape(b, e.Add, inner, 1.0))), x.dtype)


@aten("leaky_relu")
def leaky_relu(b: Emitter, x: Value, slope: Number = 0.01) -> Value:
    positive = b.make(e.Gt(*unify(b, x, 0.0)))
    return b.make(e.Where(positive, x, _arithmetic(b, e.Mul, x, slope)))


@aten("to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy", "type_as")
def convert(b: Emitter, x: Value, *args: Any, **kwargs: Any) -> Value:
    """The result's dtype says it all: devices and layouts do not exist in the IR."""
    return b.cast(x, b.dtype)


@aten("clone", "contiguous", "alias", "detach", "detach_copy", "lift_fresh_copy", "alias_copy", "positive")
def identity(b: Emitter, x: Value, **kwargs: Any) -> Value:
    return x


@aten("dropout", "feature_dropout", "alpha_dropout")
def dropout(b: Emitter, x: Value, p: float, train: bool) -> Value:
    if train and p > 0:
        raise unsupported("dropout while training", "a module in evaluation mode: call model.eval() first")
    return x


@aten("native_dropout")
def native_dropout(b: Emitter, x: Value, p: float, train: bool | None) -> tuple[Value, Value]:
    return dropout(b, x, p, bool(train)), b.filled(True, b.out[1].shape, DType.bool)


@aten("copy")
def copy(b: Emitter, x: Value, source: Value, non_blocking: bool = False) -> Value:
    return b.stretch(b.cast(source, x.dtype), b.shape)
