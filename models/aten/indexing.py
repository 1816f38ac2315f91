"""Ops that read or write at places that other tensors hold."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ...ir.core import Trait, Value
from ...ir.ops.control import Iota, Literal
from ...ir.ops.elementwise import Add, Cast, Div, Lt, Mul, Remainder, Where
from ...ir.ops.moe import Route
from ...ir.ops.reduce import ArgMax, Sort, TopK
from ...ir.ops.shape import Broadcast, Concat, Gather, IndexAdd, Reshape, Scatter, Slice, Take, Transpose
from ...ir.types import DType
from .rules import Emitter, Number, aten, ints, unify, unsupported
from .shape import permuted, reshaped, sliced, swapped

_KEEPS_SIGN = (Reshape, Transpose, Broadcast, Slice, Cast, Concat, Take, Gather, Div, Remainder, Add, Mul, Scatter)


@aten("embedding")
def embedding(b: Emitter, weight: Value, indices: Value, padding_idx: int = -1, *flags: bool) -> Value:
    return b.make(Take(weight, indices, 0))


@aten("index_select")
def index_select(b: Emitter, x: Value, dim: int, indices: Value) -> Value:
    return b.make(Take(x, indices, dim % x.tensor.rank))


@aten("gather")
def gather(b: Emitter, x: Value, dim: int, indices: Value, *, sparse_grad: bool = False) -> Value:
    return b.make(Gather(_narrowed(b, x, indices, dim), indices, dim % x.tensor.rank))


def _narrowed(b: Emitter, x: Value, like: Value, dim: int) -> Value:
    """x as far as `like` reaches along the other axes: torch reads no further."""
    for axis, size in enumerate(ints(like.shape)):
        if axis != dim % x.tensor.rank:
            x = sliced(b, x, axis, 0, size)
    return x


def _scatter(b: Emitter, x: Value, indices: Value, updates: Value, dim: int) -> Value:
    outside = [i for i in range(x.tensor.rank) if i != dim % x.tensor.rank and x.shape[i] != indices.shape[i]]
    if outside:
        raise unsupported(f"scatter into a part of {x.type}", f"indices of its extent along axis {outside[0]}, found {indices.type}")
    return b.make(Scatter(x, indices, updates, dim % x.tensor.rank))


@aten("scatter.value")
def scatter_value(b: Emitter, x: Value, dim: int, indices: Value, value: Number) -> Value:
    return _scatter(b, x, indices, b.filled(value, indices.shape, x.dtype), dim)


@aten("scatter.src")
def scatter(b: Emitter, x: Value, dim: int, indices: Value, source: Value) -> Value:
    for axis, size in enumerate(ints(indices.shape)):
        source = sliced(b, source, axis, 0, size)
    return _scatter(b, x, indices, source, dim)


@aten("index_add")
def index_add(b: Emitter, x: Value, dim: int, indices: Value, source: Value, *, alpha: Number = 1) -> Value:
    if alpha != 1:
        raise unsupported(f"index_add with alpha={alpha}", "1")
    rows, added = (swapped(b, v, 0, dim) for v in (x, source))
    return swapped(b, b.make(IndexAdd(rows, indices, added)), 0, dim)


@aten("scatter_add")
def scatter_add(b: Emitter, x: Value, dim: int, indices: Value, source: Value) -> Value:
    """Over the flattened tensor: each element of `indices` names one number of x."""
    for axis, size in enumerate(ints(indices.shape)):
        source = sliced(b, source, axis, 0, size)
    dim %= x.tensor.rank
    places: list[Value] = []
    for axis, size in enumerate(ints(indices.shape)):
        if axis == dim:
            places.append(indices)
        else:
            column = b.make(Iota(size, indices.dtype))
            places.append(reshaped(b, column, (size, *(1,) * (len(indices.shape) - axis - 1))))
    flat = _flat_index(b, places, ints(x.shape))
    count = indices.tensor.size
    numbers = reshaped(b, x, (x.tensor.size,))
    summed = b.make(IndexAdd(numbers, reshaped(b, flat, (count,)), reshaped(b, source, (count,))))
    return reshaped(b, summed, x.shape)


@aten("index.Tensor", "_unsafe_index.Tensor")
def index(b: Emitter, x: Value, indices: Sequence[Value | None]) -> Value:
    """x[i, j, ...]: the indices broadcast to one shape, which stands where they do, or in front if a slice parts them."""
    x, flat, axis, count = _one_axis(b, x, indices, "an index")
    if count == 0:
        return x
    taken = b.make(Take(x, flat, axis))
    return reshaped(b, taken, b.shape)


def _one_axis(b: Emitter, x: Value, indices: Sequence[Value | None], what: str) -> tuple[Value, Value, int, int]:
    """x with the `count` indexed axes merged into one, an index into that, which axis it is, and the count."""
    places = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if not places:
        return x, x, 0, 0
    if any(i.dtype is DType.bool for _, i in places):
        raise unsupported(f"{what} that is a mask", "one of whole numbers: how many a mask selects is known only at run time")
    first, last = places[0][0], places[-1][0]
    if last - first + 1 != len(places):  # parted by a slice: torch puts them in front
        axes = [axis for axis, _ in places]
        x = permuted(b, x, [*axes, *(i for i in range(x.tensor.rank) if i not in axes)])
        first = 0
    count = len(places)
    extents = ints(x.shape)[first : first + count]
    wrapped = [_from_front(b, i, extent) for (_, i), extent in zip(places, extents, strict=True)]
    merged = (*x.shape[:first], prod(extents), *x.shape[first + count :])
    return reshaped(b, x, merged), _flat_index(b, wrapped, extents), first, count


def _flat_index(b: Emitter, indices: Sequence[Value], extents: Sequence[int]) -> Value:
    """Row-major: ((i * extent_j) + j) * extent_k + k."""
    flat = indices[0]
    for i, extent in zip(indices[1:], extents[1:], strict=True):
        left, right = unify(b, flat, i)
        flat = b.make(Add(b.make(Mul(left, b.number(extent, left.dtype))), right))
    return flat


def _from_front(b: Emitter, i: Value, extent: int) -> Value:
    """i counted from the front, where it might be negative."""
    if _is_natural(i):
        return i
    negative = b.make(Lt(i, b.number(0, i.dtype)))
    return b.make(Where(negative, b.make(Add(i, b.number(extent, i.dtype))), i))


def _is_natural(x: Value) -> bool:
    """Whether x is seen to hold no negative number."""
    owner = x.owner
    if isinstance(owner, (TopK, Sort)):
        return x is owner.results[1] or (isinstance(owner, Sort) and _is_natural(owner.x))
    if isinstance(owner, (ArgMax, Route)):
        return True
    if isinstance(owner, Iota):
        return owner.start >= 0 and owner.start + owner.step * (owner.length - 1) >= 0
    if isinstance(owner, Literal):
        return min(owner.values) >= 0
    if isinstance(owner, _KEEPS_SIGN) and Trait.SOURCE not in owner.traits:
        read = (owner.x,) if isinstance(owner, (Take, Gather)) else owner.operands
        return all(_is_natural(v) for v in read if not (isinstance(owner, Scatter) and v is owner.indices))
    return False


@aten("index_put")
def index_put(b: Emitter, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False) -> Value:
    given = [i for i in indices if i is not None]
    if len(given) == len(indices) == 1 and given[0].dtype is DType.bool and not values.shape and not accumulate:
        mask = reshaped(b, given[0], (*given[0].shape, *(1,) * (x.tensor.rank - given[0].tensor.rank)))
        new, old = unify(b, values, x, dtype=x.dtype)
        return b.make(Where(mask, new, old))
    if len(given) != len(indices):
        raise unsupported("writing at indices behind a slice", "indices of the leading axes")
    rows, flat, _, _ = _one_axis(b, x, indices, "writing at an index")
    rest, count = ints(rows.shape)[1:], flat.tensor.size
    wide = b.stretch(b.cast(values, x.dtype), (*flat.shape, *rest))
    updates, where = reshaped(b, wide, (count, *rest)), reshaped(b, flat, (count,))
    if accumulate:
        made = b.make(IndexAdd(rows, where, updates))
    else:
        column = reshaped(b, where, (count, *(1,) * len(rest)))
        made = b.make(Scatter(rows, b.stretch(column, (count, *rest)), updates, 0))
    return reshaped(b, made, x.shape)
