"""Literals and bundles. What needs the module (weights, constants, calls) is run by the interpreter itself."""

from __future__ import annotations

import numpy as np

from ...ir.ops import control as ops
from ...ir.types import DType
from ..arrays import STORAGE, Array, Data, rounded
from .registry import reference


@reference(ops.Literal, operands="stored")
def literal(op: ops.Literal) -> Array:
    values = _stored(np.array(op.values, np.float64 if op.dtype.is_float else None), op.dtype)
    return values.reshape(op.shape) if values.size == op.result.tensor.size else np.full(op.shape, values[0])


@reference(ops.Iota, operands="stored")
def iota(op: ops.Iota) -> Array:
    numbers = op.start + op.step * np.arange(op.length, dtype=np.int64)
    return _stored(numbers.astype(np.float64) if op.dtype.is_float else numbers, op.dtype)


def _stored(numbers: Array, dtype: DType) -> Array:
    return rounded(numbers, dtype) if dtype.is_float else numbers.astype(STORAGE[dtype])


@reference(ops.Pack, operands="stored")
def pack(op: ops.Pack, *values: Data) -> tuple[Data, ...]:
    return values


@reference(ops.Unpack, operands="stored")
def unpack(op: ops.Unpack, x: tuple[Data, ...]) -> Data:
    return x if len(x) != 1 else x[0]
