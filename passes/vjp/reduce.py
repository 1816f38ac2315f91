"""Derivatives of reductions, scans, softmax and sorting. Which elements are chosen has no gradient, only what they are."""

from __future__ import annotations

from ...ir.core import Value
from ...ir.ops import reduce as ops
from ...ir.ops.control import Iota
from ...ir.ops.elementwise import Cast, Eq, Exp
from ...ir.ops.rules import axes_of, axis_of
from ...ir.ops.shape import Broadcast, Reshape, Scatter, Take
from ...ir.types import DType
from .rules import Backward, Gradients, extents, no_gradient, vjp

no_gradient("bools have no gradient", ops.Any, ops.All)
no_gradient("a place is a whole number", ops.ArgMax)
no_gradient("it counts whole numbers", ops.Histogram)


def _kept(y: Value, op: ops.Reduction, b: Backward) -> Value:
    """`y`, of the shape of the result, with the axes that went away as 1."""
    gone = axes_of(op.x, op.axes)
    return b.emit(Reshape(y, tuple(1 if i in gone else d for i, d in enumerate(extents(op.x))))).result


@vjp(ops.Sum)
def sum(op: ops.Sum, b: Backward, dy: Value) -> Gradients:
    """dx = dy at every element summed."""
    return (b.fit(b.emit(Broadcast(_kept(dy, op, b), extents(op.x))).result, op.x),)


@vjp(ops.Mean)
def mean(op: ops.Mean, b: Backward, dy: Value) -> Gradients:
    """dx = dy / n at every one of the n elements."""
    count = op.x.tensor.size / max(1, op.result.tensor.size)
    each = b.div(b.wide(dy), b.number(count, b.wide(dy)))
    return (b.fit(b.emit(Broadcast(_kept(each, op, b), extents(op.x))).result, op.x),)


@vjp(ops.Max, ops.Min)
def extreme(op: ops.Extreme, b: Backward, dy: Value) -> Gradients:
    """dx = dy / n at each of the n elements that equal y."""
    chosen = b.emit(Cast(b.emit(Eq(op.x, _kept(op.result, op, b))).result, b.wide(dy).dtype)).result
    count = b.emit(ops.Sum(chosen, op.axes, keepdims=True)).result
    return (b.fit(b.mul(chosen, b.div(_kept(b.wide(dy), op, b), count)), op.x),)


@vjp(ops.CumSum)
def cumsum(op: ops.CumSum, b: Backward, dy: Value) -> Gradients:
    """dx[i] = sum over j >= i of dy[j]: the running sum from the other end."""
    axis, length = axis_of(op.x, op.axis), extents(op.x)[op.axis]
    backwards = b.emit(Iota(length, DType.i64, start=length - 1, step=-1)).result
    added = b.emit(ops.CumSum(b.emit(Take(dy, backwards, axis)).result, axis)).result
    return (b.fit(b.emit(Take(added, backwards, axis)).result, op.x),)


@vjp(ops.Softmax)
def softmax(op: ops.Softmax, b: Backward, dy: Value) -> Gradients:
    """dx = y (dy - sum dy y)."""
    dy, y = b.wide(dy), b.wide(op.result)
    along = b.emit(ops.Sum(b.mul(dy, y), (op.axis,), keepdims=True)).result
    return (b.fit(b.mul(y, b.sub(dy, along)), op.x),)


@vjp(ops.LogSoftmax)
def log_softmax(op: ops.LogSoftmax, b: Backward, dy: Value) -> Gradients:
    """dx = dy - e^y sum dy."""
    dy, y = b.wide(dy), b.wide(op.result)
    total = b.emit(ops.Sum(dy, (op.axis,), keepdims=True)).result
    return (b.fit(b.sub(dy, b.mul(b.emit(Exp(y)).result, total)), op.x),)


@vjp(ops.TopK, ops.Sort)
def placed(op: ops.TopK | ops.Sort, b: Backward, dy: Value, _: None) -> Gradients:
    """dx = dy where the elements came from, 0 elsewhere: the choice and the order are taken for constant."""
    return (b.fit(b.emit(Scatter(b.zeros(op.x.shape, dy.dtype), op.results[1], dy, op.axis)).result, op.x),)
