"""Reductions, scans, softmax, sorting and counting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...ir.core import Op
from ...ir.ops import reduce as ops
from ..arrays import Array
from .registry import reference

REDUCTIONS: dict[type[Op], Callable[..., Any]] = {
    ops.Sum: lambda x, **how: np.sum(x, dtype=x.dtype, **how),
    ops.Mean: lambda x, **how: np.mean(x, dtype=x.dtype, **how),
    ops.Max: np.max,
    ops.Min: np.min,
    ops.Any: np.any,
    ops.All: np.all,
}


def _reduction(function: Callable[..., Any]) -> Callable[[Any, Array], Array]:
    return lambda op, x: function(x, axis=op.axes, keepdims=op.keepdims)


for _cls, _function in REDUCTIONS.items():
    reference(_cls)(_reduction(_function))


@reference(ops.ArgMax)
def argmax(op: ops.ArgMax, x: Array) -> Array:
    return np.argmax(x, axis=op.axis, keepdims=op.keepdims)


@reference(ops.CumSum)
def cumsum(op: ops.CumSum, x: Array) -> Array:
    return np.cumsum(x, axis=op.axis, dtype=x.dtype)


@reference(ops.Softmax)
def softmax(op: ops.Softmax, x: Array) -> Array:
    return normalized(x, op.axis)


def normalized(x: Array, axis: int = -1) -> Array:
    """e^(x - max x) / sum e^(x - max x) along `axis`."""
    result = x - x.max(axis, keepdims=True)
    np.exp(result, out=result)
    result /= result.sum(axis, keepdims=True)
    return result


@reference(ops.LogSoftmax)
def log_softmax(op: ops.LogSoftmax, x: Array) -> Array:
    result = x - x.max(op.axis, keepdims=True)
    result -= np.log(np.exp(result).sum(op.axis, keepdims=True))
    return result


def descending(x: Array) -> Array:
    """Indices along the last axis that sort `x` from the largest down, equals by lower index first; a NaN is the largest."""
    last = x.shape[-1] - 1
    return last - x[..., ::-1].argsort(axis=-1, kind="stable")[..., ::-1]


@reference(ops.TopK)
def topk(op: ops.TopK, x: Array) -> tuple[Array, Array]:
    rows = np.moveaxis(x, op.axis, -1)
    order = descending(rows)[..., : op.k]
    best = np.take_along_axis(rows, order, -1)
    return np.moveaxis(best, -1, op.axis), np.moveaxis(order, -1, op.axis)


@reference(ops.Sort)
def sort(op: ops.Sort, x: Array) -> tuple[Array, Array]:
    rows = np.moveaxis(x, op.axis, -1)
    order = descending(rows) if op.descending else np.argsort(rows, axis=-1, kind="stable")
    return np.moveaxis(np.take_along_axis(rows, order, -1), -1, op.axis), np.moveaxis(order, -1, op.axis)


@reference(ops.Histogram)
def histogram(op: ops.Histogram, x: Array) -> Array:
    return np.bincount(x[(x >= 0) & (x < op.bins)], minlength=op.bins).astype(np.int32)
