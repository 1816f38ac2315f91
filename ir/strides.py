"""How values lie in memory, as strides in elements: what a view can be of, what has to be copied first, and what is made in its place.

The costs and the Triton backend go by the same rules. A result lies row by row, but what attention makes lies token by token, the heads of
a token one after another, as the rows lie that it is made of and that are made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from .core import Op, Trait, Value
from .ops.attention import Attention, AttentionBackward
from .ops.linalg import Matmul
from .ops.shape import Broadcast, Concat, Reshape, Slice, Transpose
from .types import DType, bound, landed

Strides: TypeAlias = "tuple[int, ...]"

VIEWS = (Reshape, Transpose, Broadcast, Slice)
"""Ops whose result can share the memory of x, by strides of its own."""

LIBRARY = (Matmul, Concat)
"""Ops that are left to a library, which reads operands as they lie."""

FP8 = (DType.f8e4m3, DType.f8e5m2)


def row_major(shape: Sequence[int], order: Sequence[int] | None = None) -> Strides:
    """The strides of `shape` with its axes in memory in this order, the slowest first."""
    found, step = [0] * len(shape), 1
    for axis in reversed(range(len(shape)) if order is None else order):
        found[axis] = step
        step *= max(1, shape[axis])
    return tuple(found)


def contiguous(shape: Sequence[int], strides: Strides) -> bool:
    """Whether elements of these strides lie row by row, without gaps."""
    return 0 in shape or all(extent == 1 or a == b for extent, a, b in zip(shape, strides, row_major(shape), strict=True))


def made(op: Op, shape: Sequence[int]) -> Strides:
    """How a result of `op` of this shape lies: token by token where attention makes it, else row by row."""
    if isinstance(op, Attention | AttentionBackward):
        *batch, heads, tokens, width = range(len(shape))
        return row_major(shape, (*batch, tokens, heads, width))
    return row_major(shape)


def viewed(op: Op, strides: Strides, *, turned: bool = False) -> Strides | None:
    """The strides of the result of one of `VIEWS` of an x of these; None where its elements have to be copied.

    FP8 codes whose rows become columns are, since tensor cores take FP8 operands along K alone (DeepSeek-V3 report, section 3.5.2), unless
    products read them `turned`.
    """
    match op:
        case Reshape(x=x, shape=shape):
            return reshaped(extents(x), strides, shape)
        case Transpose(x=x, perm=perm):
            copied = x.dtype in FP8 and len(perm) > 1 and perm[-1] != len(perm) - 1 and not turned
            return None if copied else tuple(strides[axis] for axis in perm)
        case Broadcast(x=x, shape=shape):
            new = len(shape) - len(strides)
            return (0,) * new + tuple(0 if a != b else s for a, b, s in zip(extents(x), shape[new:], strides, strict=True))
        case Slice(x=x, axis=axis, step=step):
            return tuple(s * step if i == axis % len(strides) else s for i, s in enumerate(strides))
    return None


def reshaped(old: Sequence[int], strides: Strides, new: Sequence[int]) -> Strides | None:
    """The strides of elements of shape `old` under the shape `new`, in the same order; None where strides cannot say it.

    Axes that follow each other without a gap are one run; every run is cut anew, and no new axis may span two of them.
    """
    if 0 in old:
        return row_major(new)
    runs: list[tuple[int, int]] = []
    for extent, stride in zip(old, strides, strict=True):
        if extent == 1:
            continue
        if runs and runs[-1][1] == extent * stride:
            runs[-1] = runs[-1][0] * extent, stride
        else:
            runs.append((extent, stride))
    found: list[int] = []
    left, step = runs.pop() if runs else (1, 1)
    for extent in reversed(new):
        if left == 1 and extent != 1 and runs:
            left, step = runs.pop()
        if left % extent:
            return None
        found.append(step)
        left, step = left // extent, step * extent
    return tuple(reversed(found))


def strides(value: Value, *, turned: bool = False) -> Strides:
    """How a value lies, ragged dimensions at their bound: by the op that made it, and the views of that which lead to it."""
    owner = value.owner
    if isinstance(owner, VIEWS):
        found = viewed(owner, strides(owner.x, turned=turned), turned=turned)
        return row_major(extents(value)) if found is None else found
    shape = extents(value)
    return made(owner, shape) if owner else row_major(shape)


def uneven(op: Op, *, turned: bool = False) -> list[Value]:
    """The operands that have to be copied before `op`, which reads rows one after another, and which do not lie so."""
    if isinstance(op, LIBRARY) or not op.traits.isdisjoint((Trait.STRIDED, Trait.VIEW)):
        return []
    given = (v for v in dict.fromkeys(op.operands) if isinstance(v.owner, (*VIEWS, Attention, AttentionBackward)))
    return [v for v in given if not contiguous(extents(v), strides(v, turned=turned))]


def extents(value: Value) -> tuple[int, ...]:
    """The shape of a tensor, ragged dimensions at their bound."""
    there = landed(value.type)
    return tuple(map(bound, there.shape))  # type: ignore[union-attr]
