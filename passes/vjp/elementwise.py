"""Derivatives of elementwise ops. A gradient is summed over what broadcasting stretched.

Where a function has a corner the rules are those of torch: 0 for |x| and relu at 0, half each where a maximum or minimum has two.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt

from ...ir.core import Op, Value
from ...ir.ops import elementwise as ops
from ...ir.ops.reduce import Sum
from ...ir.ops.shape import Broadcast
from .rules import Backward, Gradients, extents, missing, no_gradient, vjp

no_gradient("a relation is constant almost everywhere", ops.Eq, ops.Ne, ops.Lt, ops.Le, ops.Gt, ops.Ge)
no_gradient("bools have no gradient", ops.And, ops.Or, ops.Not)
no_gradient("it is constant almost everywhere", ops.Floor)
missing("second derivatives are not taken", ops.SwiGLUBackward)


@vjp(ops.Cast)
def cast(op: ops.Cast, b: Backward, dy: Value) -> Gradients:
    """dx = dy: straight through the rounding."""
    return (b.fit(dy, op.x),)


def _bell(b: Backward, x: Value) -> Value:
    """e^(-x^2)."""
    return b.emit(ops.Exp(b.neg(b.mul(x, x)))).result


OF_X: dict[type[Op], Callable[[Backward, Value, Value], Value]] = {
    ops.Log: lambda b, dy, x: b.div(dy, x),
    ops.Sin: lambda b, dy, x: b.mul(dy, b.emit(ops.Cos(x)).result),
    ops.Cos: lambda b, dy, x: b.neg(b.mul(dy, b.emit(ops.Sin(x)).result)),
    ops.Erf: lambda b, dy, x: b.mul(dy, _bell(b, x), b.number(2 / sqrt(pi), x)),
}
"""dx of dy and x."""

OF_Y: dict[type[Op], Callable[[Backward, Value, Value], Value]] = {
    ops.Exp: lambda b, dy, y: b.mul(dy, y),
    ops.Sqrt: lambda b, dy, y: b.div(dy, b.add(y, y)),
    ops.Rsqrt: lambda b, dy, y: b.mul(b.mul(dy, b.number(-0.5, y)), b.mul(y, y, y)),
    ops.Tanh: lambda b, dy, y: b.mul(dy, b.complement(b.mul(y, y))),
    ops.Sigmoid: lambda b, dy, y: b.mul(dy, y, b.complement(y)),
}
"""dx of dy and the result y."""


@vjp(*OF_X)
def of_x(op: Op, b: Backward, dy: Value) -> Gradients:
    """dx by `OF_X`."""
    (x,) = op.operands
    return (b.fit(OF_X[type(op)](b, b.wide(dy), b.wide(x)), x),)


@vjp(*OF_Y)
def of_y(op: Op, b: Backward, dy: Value) -> Gradients:
    """dx by `OF_Y`."""
    return (b.fit(OF_Y[type(op)](b, b.wide(dy), b.wide(op.result)), op.operands[0]),)


@vjp(ops.Neg)
def neg(op: ops.Neg, b: Backward, dy: Value) -> Gradients:
    """dx = -dy."""
    return (b.fit(b.neg(dy), op.x),)


@vjp(ops.Abs)
def abs(op: ops.Abs, b: Backward, dy: Value) -> Gradients:
    """dx = dy where x > 0, -dy where x < 0."""
    zero = b.number(0.0, op.x)
    negative = _where(b, b.emit(ops.Lt(op.x, zero)).result, b.neg(dy), b.number(0.0, dy))
    return (b.fit(_where(b, b.emit(ops.Gt(op.x, zero)).result, dy, negative), op.x),)


@vjp(ops.Silu)
def silu(op: ops.Silu, b: Backward, dy: Value) -> Gradients:
    """dx = dy s (1 + x (1 - s)) with s = sigmoid(x)."""
    x = b.wide(op.x)
    s = b.emit(ops.Sigmoid(x)).result
    slope = b.mul(s, b.add(b.mul(x, b.complement(s)), b.number(1.0, x)))
    return (b.fit(b.mul(b.wide(dy), slope), op.x),)


@vjp(ops.Relu)
def relu(op: ops.Relu, b: Backward, dy: Value) -> Gradients:
    """dx = dy where x > 0."""
    positive = b.emit(ops.Gt(op.x, b.number(0.0, op.x))).result
    return (b.fit(_where(b, positive, dy, b.number(0.0, dy)), op.x),)


@vjp(ops.Add)
def add(op: ops.Add, b: Backward, dy: Value) -> Gradients:
    """da = db = dy."""
    return b.fit(dy, op.a), b.fit(dy, op.b)


@vjp(ops.Sub)
def sub(op: ops.Sub, b: Backward, dy: Value) -> Gradients:
    """da = dy, db = -dy."""
    return b.fit(dy, op.a), b.fit(b.neg(dy), op.b)


@vjp(ops.Mul)
def mul(op: ops.Mul, b: Backward, dy: Value) -> Gradients:
    """da = dy b, db = dy a."""
    dy, x, y = b.wide(dy), b.wide(op.a), b.wide(op.b)
    return b.fit(b.mul(dy, y), op.a), b.fit(b.mul(dy, x), op.b)


@vjp(ops.Div)
def div(op: ops.Div, b: Backward, dy: Value) -> Gradients:
    """da = dy / b, db = -dy a / b / b."""
    dy, x, y = b.wide(dy), b.wide(op.a), b.wide(op.b)
    return b.fit(b.div(dy, y), op.a), b.fit(b.neg(b.mul(dy, b.div(b.div(x, y), y))), op.b)


@vjp(ops.Remainder)
def remainder(op: ops.Remainder, b: Backward, dy: Value) -> Gradients:
    """da = dy, db = -dy floor(a / b)."""
    times = b.emit(ops.Floor(b.div(b.wide(op.a), b.wide(op.b)))).result
    return b.fit(dy, op.a), b.fit(b.neg(b.mul(b.wide(dy), times)), op.b)


@vjp(ops.Pow)
def pow(op: ops.Pow, b: Backward, dy: Value) -> Gradients:
    """da = dy b a^(b - 1), 0 where b = 0; db = dy y log a, 0 where a = 0 and b >= 0."""
    dy, base, exponent = b.wide(dy), b.wide(op.a), b.wide(op.b)
    zero = b.number(0.0, exponent)
    slope = b.mul(exponent, b.emit(ops.Pow(base, b.sub(exponent, b.number(1.0, exponent)))).result)
    da = _where(b, b.emit(ops.Eq(exponent, zero)).result, zero, b.mul(dy, slope))
    if not b.wants(op.b):
        return b.fit(da, op.a), None
    nothing = b.emit(ops.And(b.emit(ops.Eq(base, b.number(0.0, base))).result, b.emit(ops.Ge(exponent, zero)).result)).result
    growth = b.mul(dy, b.mul(b.wide(op.result), b.emit(ops.Log(base)).result))
    return b.fit(da, op.a), b.fit(_where(b, nothing, b.number(0.0, growth), growth), op.b)


@vjp(ops.Maximum)
def maximum(op: ops.Maximum, b: Backward, dy: Value) -> Gradients:
    """da = dy where a > b, db = dy where b > a, each dy / 2 where they are equal."""
    return _extreme(op, b, dy, b.emit(ops.Gt(op.a, op.b)).result, b.emit(ops.Lt(op.a, op.b)).result)


@vjp(ops.Minimum)
def minimum(op: ops.Minimum, b: Backward, dy: Value) -> Gradients:
    """da = dy where a < b, db = dy where b < a, each dy / 2 where they are equal."""
    return _extreme(op, b, dy, b.emit(ops.Lt(op.a, op.b)).result, b.emit(ops.Gt(op.a, op.b)).result)


def _extreme(op: ops.Maximum | ops.Minimum, b: Backward, dy: Value, first: Value, second: Value) -> Gradients:
    shared = _where(b, b.emit(ops.Eq(op.a, op.b)).result, b.mul(dy, b.number(0.5, dy)), b.number(0.0, dy))
    return b.fit(_where(b, first, dy, shared), op.a), b.fit(_where(b, second, dy, shared), op.b)


@vjp(ops.Where)
def where(op: ops.Where, b: Backward, dy: Value) -> Gradients:
    """da = dy where the condition holds, db = dy elsewhere."""
    zero = b.number(0.0, dy)
    return None, b.fit(_where(b, op.condition, dy, zero), op.a), b.fit(_where(b, op.condition, zero, dy), op.b)


def _where(b: Backward, condition: Value, x: Value, y: Value) -> Value:
    return b.emit(ops.Where(condition, x, y)).result


@vjp(ops.SwiGLU)
def swiglu(op: ops.SwiGLU, b: Backward, dy: Value) -> Gradients:
    """With s = sigmoid(gate): dgate = dy up s (1 + gate (1 - s)), dup = dy gate s. One op: both read the same three tensors.

    With a weight dy is first multiplied by it, and dweight = the dot product of dy and silu(gate) up: nothing of these is rounded between.
    """
    shape = op.result.shape
    gate, up = (x if x.shape == shape else b.emit(Broadcast(x, extents(op.result))).result for x in (op.gate, op.up))
    if op.weight is None:
        dgate, dup = b.emit(ops.SwiGLUBackward(gate, up, b.cast(dy, gate.dtype))).results
        return b.fit(dgate, op.gate), b.fit(dup, op.up)
    gate, up, dy = b.wide(gate), b.wide(up), b.wide(dy)
    dgate, dup = b.emit(ops.SwiGLUBackward(gate, up, b.mul(dy, b.cast(op.weight, dy.dtype)))).results
    dots = b.emit(Sum(b.mul(b.emit(ops.SwiGLU(gate, up)).result, dy), axes=(-1,), keepdims=True)).result
    return b.fit(dgate, op.gate), b.fit(dup, op.up), b.fit(dots, op.weight)
