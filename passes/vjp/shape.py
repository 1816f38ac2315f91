"""Derivatives of ops that move elements: the gradient moves back, and is added up where an element was read more than once."""

from __future__ import annotations

from math import prod

from ...ir.core import Value
from ...ir.ops import shape as ops
from ...ir.ops.control import Iota
from ...ir.ops.elementwise import Cast
from ...ir.ops.rules import axis_of
from ...ir.types import DType
from .rules import Backward, Gradients, extents, vjp


@vjp(ops.Reshape)
def reshape(op: ops.Reshape, b: Backward, dy: Value) -> Gradients:
    """dx = dy in the shape of x."""
    return (b.fit(b.emit(ops.Reshape(dy, extents(op.x))).result, op.x),)


@vjp(ops.Transpose)
def transpose(op: ops.Transpose, b: Backward, dy: Value) -> Gradients:
    """dx = dy transposed by the inverse permutation."""
    inverse = tuple(op.perm.index(axis) for axis in range(len(op.perm)))
    return (b.fit(b.emit(ops.Transpose(dy, inverse)).result, op.x),)


@vjp(ops.Broadcast)
def broadcast(op: ops.Broadcast, b: Backward, dy: Value) -> Gradients:
    """dx = dy summed over what was stretched."""
    return (b.fit(dy, op.x),)


@vjp(ops.Slice)
def slice_(op: ops.Slice, b: Backward, dy: Value) -> Gradients:
    """dx = dy where the elements stood, 0 elsewhere."""
    axis, shape = axis_of(op.x, op.axis), extents(op.x)
    if op.step > 1:  # each element with step - 1 zeros behind it
        length = dy.shape[axis]
        assert isinstance(length, int)
        apart = b.emit(ops.Reshape(dy, (*shape[:axis], length, 1, *shape[axis + 1 :]))).result
        behind = tuple((op.step - 1) * (i == axis + 1) for i in range(len(shape) + 1))
        padded = b.emit(ops.Pad(apart, (0,) * len(behind), behind)).result
        joined = b.emit(ops.Reshape(padded, (*shape[:axis], length * op.step, *shape[axis + 1 :]))).result
        dy = b.emit(ops.Slice(joined, axis, 0, min(length * op.step, shape[axis] - op.start))).result
    low = tuple(op.start * (i == axis) for i in range(len(shape)))
    high = tuple(d - lo - e for d, lo, e in zip(shape, low, extents(dy), strict=True))
    return (b.fit(b.emit(ops.Pad(dy, low, high)).result, op.x),)


@vjp(ops.Concat)
def concat(op: ops.Concat, b: Backward, dy: Value) -> Gradients:
    """Each operand's gradient is its part of dy."""
    start, found = 0, []
    for x in op.xs:
        stop = start + extents(x)[op.axis]
        found.append(b.fit(b.emit(ops.Slice(dy, op.axis, start, stop)).result, x))
        start = stop
    return found


@vjp(ops.Pad)
def pad(op: ops.Pad, b: Backward, dy: Value) -> Gradients:
    """dx = dy without the padding."""
    for axis, (low, extent) in enumerate(zip(op.low, extents(op.x), strict=True)):
        dy = b.emit(ops.Slice(dy, axis, low, low + extent)).result
    return (b.fit(dy, op.x),)


@vjp(ops.Take)
def take(op: ops.Take, b: Backward, dy: Value) -> Gradients:
    """dx[i] = sum of dy over every place where the index i stands. Of an embedding: index_add into zeros, in float32."""
    axis, shape, count = axis_of(op.x, op.axis), extents(op.x), op.indices.tensor.size
    rows = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    stood = tuple(range(axis, axis + op.indices.tensor.rank))
    front = (*stood, *(i for i in range(dy.tensor.rank) if i not in stood))
    moved = dy if axis == 0 else b.emit(ops.Transpose(dy, front)).result
    updates = b.wide(b.emit(ops.Reshape(moved, (count, *rows[1:]))).result)
    indices = b.emit(ops.Reshape(op.indices, (count,))).result
    dx = b.emit(ops.IndexAdd(b.zeros(rows, updates.dtype), indices, updates)).result
    back = (*range(1, axis + 1), 0, *range(axis + 1, len(rows)))
    return b.fit(dx if axis == 0 else b.emit(ops.Transpose(dx, back)).result, op.x), None


@vjp(ops.Gather)
def gather(op: ops.Gather, b: Backward, dy: Value) -> Gradients:
    """dx[i, j, ...] = sum of dy over every place that read it: index_add over the flattened tensor."""
    axis, shape, picked = axis_of(op.x, op.axis), extents(op.x), extents(op.indices)
    flat = None
    for i, extent in enumerate(shape):
        place = b.emit(Cast(op.indices, DType.i64)).result if i == axis else b.emit(Iota(extent, DType.i64)).result
        if i != axis:
            place = b.emit(ops.Reshape(place, tuple(extent if j == i else 1 for j in range(len(shape))))).result
        stride = b.emit(Iota(1, DType.i64, start=prod(shape[i + 1 :]))).result
        place = b.mul(place, stride)
        flat = place if flat is None else b.add(flat, place)
    assert flat is not None
    indices = b.emit(ops.Reshape(flat, (prod(picked),))).result
    updates = b.wide(b.emit(ops.Reshape(dy, (prod(picked),))).result)
    dx = b.emit(ops.IndexAdd(b.zeros((prod(shape),), updates.dtype), indices, updates)).result
    return b.fit(b.emit(ops.Reshape(dx, shape)).result, op.x), None


@vjp(ops.Scatter)
def scatter(op: ops.Scatter, b: Backward, dy: Value) -> Gradients:
    """dx = dy, 0 where an update stands; dupdates = dy there."""
    nothing = b.zeros(op.indices.shape, dy.dtype)
    dx = b.emit(ops.Scatter(dy, op.indices, nothing, op.axis)).result
    return b.fit(dx, op.x), None, b.fit(b.emit(ops.Gather(dy, op.indices, op.axis)).result, op.updates)


@vjp(ops.IndexAdd)
def index_add(op: ops.IndexAdd, b: Backward, dy: Value) -> Gradients:
    """dx = dy, dupdates[r] = dy[indices[r]]."""
    return b.fit(dy, op.x), None, b.fit(b.emit(ops.Take(dy, op.indices)).result, op.updates)


@vjp(ops.CacheAppend)
def cache_append(op: ops.CacheAppend, b: Backward, dy: Value) -> Gradients:
    """dcache = dy, 0 at the new entries; dnew = dy there."""
    batch, _, *entry = extents(op.cache)
    dcache = b.emit(ops.CacheAppend(dy, b.zeros(op.new.shape, dy.dtype), op.positions)).result
    at = b.emit(ops.Reshape(op.positions, (batch, 1, *[1] * len(entry)))).result
    at = b.emit(ops.Broadcast(at, (batch, 1, *entry))).result
    dnew = b.emit(ops.Reshape(b.emit(ops.Gather(dy, at, 1)).result, (batch, *entry))).result
    return b.fit(dcache, op.cache), b.fit(dnew, op.new), None
