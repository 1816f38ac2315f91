"""Ops that move elements, and sources of numbers, in standard ops."""

from __future__ import annotations

import numpy as np

from ...ir.ops import control
from ...ir.ops import shape as ops
from ..arrays import STORAGE, Array, rounded
from .emit import Emitter, Value, carrier
from .registry import onnx


@onnx(ops.Reshape, "stored")
def reshape(g: Emitter, op: ops.Reshape, x: Value) -> Value:
    return g.reshaped(x, *op.shape)


@onnx(ops.Transpose, "stored")
def transpose(g: Emitter, op: ops.Transpose, x: Value) -> Value:
    return g.Transpose(x, perm=list(op.perm))


@onnx(ops.Broadcast, "carried")
def broadcast(g: Emitter, op: ops.Broadcast, x: Value) -> Value:
    return g.Expand(x, list(op.shape))


@onnx(ops.Slice, "moved")
def slice_(g: Emitter, op: ops.Slice, x: Value) -> Value:
    return g.Slice(x, [op.start], [op.stop], [op.axis], [op.step])


@onnx(ops.Concat, "moved")
def concat(g: Emitter, op: ops.Concat, *xs: Value) -> Value:
    return g.Concat(*xs, axis=op.axis)


@onnx(ops.Pad, "carried")
def pad(g: Emitter, op: ops.Pad, x: Value) -> Value:
    dtype = op.result.dtype
    value = rounded(np.array(op.value), dtype) if dtype.is_float else np.array(op.value).astype(STORAGE[dtype])
    return g.Pad(x, [*op.low, *op.high], value.astype(STORAGE[carrier(dtype)]))


@onnx(ops.Take, "moved")
def take(g: Emitter, op: ops.Take, x: Value, indices: Value) -> Value:
    return g.Gather(x, indices, axis=op.axis)


@onnx(ops.Gather, "moved")
def gather(g: Emitter, op: ops.Gather, x: Value, indices: Value) -> Value:
    return g.GatherElements(x, indices, axis=op.axis)


@onnx(ops.Scatter, "moved")
def scatter(g: Emitter, op: ops.Scatter, x: Value, indices: Value, updates: Value) -> Value:
    return g.ScatterElements(x, indices, updates, axis=op.axis)


@onnx(ops.IndexAdd)
def index_add(g: Emitter, op: ops.IndexAdd, x: Value, indices: Value, updates: Value) -> Value:
    rows = g.Unsqueeze(g.Cast(indices, to=7), [-1])
    return g.ScatterND(x, rows, updates, reduction="add")


@onnx(ops.CacheAppend, "moved")
def cache_append(g: Emitter, op: ops.CacheAppend, cache: Value, new: Value, positions: Value) -> Value:
    sequences = op.cache.shape[0]
    assert isinstance(sequences, int)
    each = np.arange(sequences, dtype=np.int64)[:, None]
    return g.ScatterND(cache, g.Concat(each, g.Unsqueeze(g.Cast(positions, to=7), [-1]), axis=1), new)


@onnx(control.Literal, "stored")
def literal(g: Emitter, op: control.Literal) -> Value:
    values = _stored(np.array(op.values, np.float64 if op.dtype.is_float else np.int64), op)
    return g.value(values.reshape(op.shape) if values.size == op.result.tensor.size else np.full(op.shape, values[0], values.dtype))


@onnx(control.Iota, "stored")
def iota(g: Emitter, op: control.Iota) -> Value:
    numbers = op.start + op.step * np.arange(op.length, dtype=np.int64)
    return g.value(_stored(numbers.astype(np.float64) if op.dtype.is_float else numbers, op))


def _stored(numbers: Array, op: control.Literal | control.Iota) -> Array:
    return rounded(numbers, op.dtype) if op.dtype.is_float else numbers.astype(STORAGE[op.dtype])
