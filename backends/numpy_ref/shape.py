"""Ops that move elements. Views are views: no data is copied."""

from __future__ import annotations

import numpy as np

from ...ir.errors import DscError
from ...ir.ops import shape as ops
from ..arrays import STORAGE, Array, rounded, widen
from .registry import reference


def require_inside(indices: Array, extent: int, what: str) -> None:
    """`DscError` that names the first offender unless every index lies in 0 .. extent - 1."""
    if indices.size and (indices.min() < 0 or indices.max() >= extent):
        worst = indices[(indices < 0) | (indices >= extent)].flat[0]
        raise DscError(f"{what} {worst} is outside 0 .. {extent - 1}")


@reference(ops.Reshape, operands="stored")
def reshape(op: ops.Reshape, x: Array) -> Array:
    return x.reshape(op.shape)


@reference(ops.Transpose, operands="stored")
def transpose(op: ops.Transpose, x: Array) -> Array:
    return x.transpose(op.perm)


@reference(ops.Broadcast, operands="stored")
def broadcast(op: ops.Broadcast, x: Array) -> Array:
    return np.broadcast_to(x, [x.shape[i - len(op.shape)] if not isinstance(d, int) else d for i, d in enumerate(op.shape)])


@reference(ops.Slice, operands="stored")
def slice_(op: ops.Slice, x: Array) -> Array:
    return x[(slice(None),) * (op.axis % x.ndim) + (slice(op.start, op.stop, op.step),)]


@reference(ops.Concat, operands="stored")
def concat(op: ops.Concat, *xs: Array) -> Array:
    return np.concatenate(xs, axis=op.axis)


@reference(ops.Pad, operands="stored")
def pad(op: ops.Pad, x: Array) -> Array:
    dtype = op.result.dtype
    value = np.full(1, op.value)
    filler = rounded(value, dtype) if dtype.is_float else value.astype(STORAGE[dtype])
    result = np.full([lo + d + hi for lo, d, hi in zip(op.low, x.shape, op.high, strict=True)], filler[0], filler.dtype)
    result[tuple(slice(lo, lo + d) for lo, d in zip(op.low, x.shape, strict=True))] = x
    return result


@reference(ops.Take, operands="stored")
def take(op: ops.Take, x: Array, indices: Array) -> Array:
    require_inside(indices, x.shape[op.axis], "index")
    return x.take(indices, axis=op.axis)


@reference(ops.Gather, operands="stored")
def gather(op: ops.Gather, x: Array, indices: Array) -> Array:
    require_inside(indices, x.shape[op.axis], "index")
    return np.take_along_axis(x, indices.astype(np.int64, copy=False), op.axis)


@reference(ops.Scatter, operands="stored")
def scatter(op: ops.Scatter, x: Array, indices: Array, updates: Array) -> Array:
    require_inside(indices, x.shape[op.axis], "index")
    result = x.copy()
    np.put_along_axis(result, indices.astype(np.int64, copy=False), updates, op.axis)
    return result


@reference(ops.IndexAdd, operands="blocks")
def index_add(op: ops.IndexAdd, wide: np.dtype[np.floating], x: Array, indices: Array, updates: Array) -> Array:
    """Row n of those for one index is added in wave n: within a wave indices are distinct, and each index keeps its order."""
    require_inside(indices, x.shape[0], "index")
    result = widen(x, wide) if op.x.dtype.is_float else x
    if result is x:
        result = x.copy()
    order = np.argsort(indices, kind="stable")
    ranked = indices[order]
    first = np.searchsorted(ranked, ranked)
    wave = np.arange(len(ranked)) - first
    by_wave = order[np.argsort(wave, kind="stable")]
    start = 0
    for count in np.bincount(wave):
        rows = by_wave[start : start + count]
        result[indices[rows]] += widen(updates[rows], wide) if op.x.dtype.is_float else updates[rows]
        start += count
    return result


@reference(ops.CacheAppend, operands="stored")
def cache_append(op: ops.CacheAppend, cache: Array, new: Array, positions: Array) -> Array:
    require_inside(positions, cache.shape[1], "position")
    result = cache.copy()
    result[np.arange(len(new)), positions] = new
    return result
