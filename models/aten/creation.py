"""Ops that make tensors from nothing. `empty` may hold anything, so it holds zeros."""

from __future__ import annotations

from typing import Any

from ...ir.core import Value
from ...ir.ops.control import Iota
from ...ir.ops.elementwise import Add, Mul
from .rules import Emitter, Number, aten


@aten("arange", "arange.start", "arange.start_step")
def arange(b: Emitter, start: Number, end: Number | None = None, step: Number = 1, **kwargs: Any) -> Value:
    first = 0 if end is None else start
    (length,) = b.shape
    if first == int(first) and step == int(step):
        return b.make(Iota(length, b.dtype, int(first), int(step)))
    steps = b.make(Mul(b.make(Iota(length, b.dtype)), b.number(step, b.dtype)))
    return b.make(Add(steps, b.number(first, b.dtype)))


@aten("full", "full_like", "new_full", "fill.Scalar")
def full(b: Emitter, size: Any, value: Any, *rest: Any, **kwargs: Any) -> Value:
    """The fill value of `new_full` stands third, after the tensor and the size."""
    return b.filled(rest[0] if rest else value, b.shape, b.dtype)


@aten("zeros", "zeros_like", "new_zeros", "empty.memory_format", "empty_like", "new_empty", "zero")
def zeros(b: Emitter, *args: Any, **kwargs: Any) -> Value:
    return b.filled(0, b.shape, b.dtype)


@aten("ones", "ones_like", "new_ones")
def ones(b: Emitter, *args: Any, **kwargs: Any) -> Value:
    return b.filled(1, b.shape, b.dtype)


@aten("scalar_tensor")
def scalar(b: Emitter, value: Number, **kwargs: Any) -> Value:
    return b.number(value, b.dtype)
