"""Reductions, scans, softmax, sorting and counting in standard ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...ir.core import Op
from ...ir.ops import reduce as ops
from ...ir.types import DType
from .emit import Emitter, Value
from .registry import Operands, onnx

REDUCTIONS: dict[type[Op], tuple[str, Operands]] = {
    ops.Sum: ("ReduceSum", "wide"),
    ops.Mean: ("ReduceMean", "wide"),
    ops.Max: ("ReduceMax", "carried"),
    ops.Min: ("ReduceMin", "carried"),
    ops.Any: ("ReduceMax", "carried"),
    ops.All: ("ReduceMin", "carried"),
}


def _reduction(name: str) -> Callable[[Emitter, Any, Value], Value]:
    return lambda g, op, x: g.node(name, x, list(op.axes), keepdims=int(op.keepdims), noop_with_empty_axes=1)


for _cls, (_name, _operands) in REDUCTIONS.items():
    onnx(_cls, _operands)(_reduction(_name))


@onnx(ops.ArgMax, "stored")
def argmax(g: Emitter, op: ops.ArgMax, x: Value) -> Value:
    return g.ArgMax(g.carried(x, op.x.dtype), axis=op.axis, keepdims=int(op.keepdims))


@onnx(ops.CumSum)
def cumsum(g: Emitter, op: ops.CumSum, x: Value) -> Value:
    return g.CumSum(x, np.int64(op.axis))


@onnx(ops.Softmax)
def softmax(g: Emitter, op: ops.Softmax, x: Value) -> Value:
    return g.Softmax(x, axis=op.axis)


@onnx(ops.LogSoftmax)
def log_softmax(g: Emitter, op: ops.LogSoftmax, x: Value) -> Value:
    """Written out: the reference evaluator takes the logarithm of probabilities that may be 0."""
    x = g.Sub(x, g.ReduceMax(x, [op.axis], keepdims=1))
    return g.Sub(x, g.Log(g.sum(g.Exp(x), op.axis)))


@onnx(ops.TopK, "stored")
def topk(g: Emitter, op: ops.TopK, x: Value) -> tuple[Value, Value]:
    """ONNX puts the lower index first among equals, too."""
    return _best(g, op, x, op.k, True)


@onnx(ops.Sort, "stored")
def sort(g: Emitter, op: ops.Sort, x: Value) -> tuple[Value, Value]:
    extent = op.x.shape[op.axis]
    assert isinstance(extent, int)
    return _best(g, op, x, extent, op.descending)


def _best(g: Emitter, op: ops.TopK | ops.Sort, x: Value, k: int, largest: bool) -> tuple[Value, Value]:
    dtype = op.x.dtype
    values, indices = g.TopK(g.carried(x, dtype), [k], axis=op.axis, largest=int(largest), sorted=1, outputs=2)
    return g.uncarried(values, dtype), indices


@onnx(ops.Histogram, "stored")
def histogram(g: Emitter, op: ops.Histogram, x: Value) -> Value:
    return g.cast(counted(g, g.Reshape(x, [-1]), op.bins), DType.i32)


def counted(g: Emitter, x: Value, bins: int) -> Value:
    """How often each of 0 .. bins - 1 stands in x [n], as i64[bins]; what lies outside falls into two bins that are cut off."""
    inside = g.Min(g.Max(g.Cast(x, to=7), np.int64(-1)), np.int64(bins))
    ones = g.Expand(np.int64(1), g.Shape(x))
    every = g.ScatterElements(np.zeros(bins + 2, np.int64), g.Add(inside, np.int64(1)), ones, axis=0, reduction="add")
    return g.Slice(every, [1], [bins + 1], [0])
