"""Views, joins and splits. Torch has worked out every result's shape, so most of them are one reshape, broadcast or slice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ...ir.core import Value
from ...ir.ops.control import Iota
from ...ir.ops.shape import Concat, Pad, Reshape, Scatter, Slice, Take, Transpose
from ...ir.types import Dim, DType
from .rules import Emitter, Number, aten, extent, ints, promoted, unsupported

RESHAPES = (
    "view",
    "reshape",
    "_unsafe_view",
    "view_as",
    "reshape_as",
    "unsqueeze",
    "squeeze",
    "squeeze.dim",
    "squeeze.dims",
    "flatten.using_ints",
    "unflatten.int",
    "atleast_1d",
    "ravel",
)
"""Ops that keep the elements in row-major order, so that the result's shape says all of them."""


def reshaped(b: Emitter, x: Value, shape: Sequence[Dim]) -> Value:
    """x under another shape; itself under its own."""
    return x if x.shape == tuple(shape) else b.make(Reshape(x, ints(shape)))


@aten(*RESHAPES)
def reshape(b: Emitter, x: Value, *args: Any) -> Value:
    return reshaped(b, x, b.shape)


@aten("expand", "expand_as", "broadcast_to")
def expand(b: Emitter, x: Value, *args: Any, **kwargs: Any) -> Value:
    return b.stretch(x, b.shape)


@aten("repeat")
def repeat(b: Emitter, x: Value, repeats: Sequence[int]) -> Value:
    """Tile: an axis of extent n repeated r times is [r, n] with the first stretched."""
    old = (1,) * (len(repeats) - x.tensor.rank) + ints(x.shape)
    ones = reshaped(b, x, [size for old_size in old for size in (1, old_size)])
    wide = b.stretch(ones, [size for pair in zip(repeats, old, strict=True) for size in pair])
    return reshaped(b, wide, b.shape)


def permuted(b: Emitter, x: Value, perm: Sequence[int]) -> Value:
    """x with its axes in another order; itself where the order is the same."""
    order = tuple(p % x.tensor.rank for p in perm)
    return x if order == tuple(range(len(order))) else b.make(Transpose(x, order))


def swapped(b: Emitter, x: Value, first: int, second: int) -> Value:
    """x with two axes exchanged."""
    order = list(range(x.tensor.rank))
    order[first], order[second] = order[second], order[first]
    return permuted(b, x, order)


@aten("transpose.int", "swapaxes", "swapdims")
def transpose(b: Emitter, x: Value, first: int, second: int) -> Value:
    return swapped(b, x, first, second) if x.shape else x


@aten("t", "mT", "matrix_H", "numpy_T", "adjoint")
def matrix_transpose(b: Emitter, x: Value) -> Value:
    return swapped(b, x, -2, -1) if x.tensor.rank >= 2 else x


@aten("permute")
def permute(b: Emitter, x: Value, dims: Sequence[int]) -> Value:
    return permuted(b, x, dims)


@aten("movedim.int", "movedim.intlist")
def movedim(b: Emitter, x: Value, source: int | Sequence[int], target: int | Sequence[int]) -> Value:
    rank = x.tensor.rank
    sources, targets = ((axes,) if isinstance(axes, int) else axes for axes in (source, target))
    placed = {t % rank: s % rank for s, t in zip(sources, targets, strict=True)}
    rest = iter(i for i in range(rank) if i not in placed.values())
    return permuted(b, x, [placed[i] if i in placed else next(rest) for i in range(rank)])


def sliced(b: Emitter, x: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
    """x[start:stop:step] along an axis; itself where that is all of it."""
    axis %= x.tensor.rank
    whole = (start, stop, step) == (0, x.shape[axis], 1)
    return x if whole else b.make(Slice(x, axis, start, stop, step))


def _range(x: Value, dim: int, start: int | None, end: int | None, step: int) -> range:
    return range(extent(x, dim))[slice(start, end, step)]


@aten("slice.Tensor")
def slice_(b: Emitter, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Value:
    span = _range(x, dim, start, end, step)
    return sliced(b, x, dim, span.start, max(span.start, span.stop), step)


@aten("narrow")
def narrow(b: Emitter, x: Value, dim: int, start: int, length: int) -> Value:
    return slice_(b, x, dim, start, start + length)


@aten("select.int")
def select(b: Emitter, x: Value, dim: int, index: int) -> Value:
    index %= extent(x, dim)
    return reshaped(b, sliced(b, x, dim, index, index + 1), b.shape)


def _pieces(b: Emitter, x: Value, axis: int, lengths: Sequence[int]) -> tuple[Value, ...]:
    ends = list(accumulate(lengths))
    return tuple(sliced(b, x, axis, end - length, end) for length, end in zip(lengths, ends, strict=True))


@aten("split.Tensor", "split.sizes", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split.Tensor", "tensor_split.sections")
def split(b: Emitter, x: Value, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    return _pieces(b, x, dim, [piece.shape[dim] for piece in b.out])


@aten("unbind.int")
def unbind(b: Emitter, x: Value, dim: int = 0) -> tuple[Value, ...]:
    rows = _pieces(b, x, dim, [1] * len(b.out))
    return tuple(reshaped(b, row, piece.shape) for row, piece in zip(rows, b.out, strict=True))


def joined(b: Emitter, xs: Sequence[Value], axis: int) -> Value:
    """Values one after the other; a single one is itself."""
    return xs[0] if len(xs) == 1 else b.make(Concat(tuple(xs), axis % xs[0].tensor.rank))


@aten("cat", "concat", "concatenate")
def cat(b: Emitter, xs: Sequence[Value], dim: int = 0) -> Value:
    kept = [x for x in xs if x.shape != (0,)] or list(xs)[:1]  # torch lets an empty vector stand among tensors of any rank
    return joined(b, [b.cast(x, promoted(*xs)) for x in kept], dim)


@aten("stack")
def stack(b: Emitter, xs: Sequence[Value], dim: int = 0) -> Value:
    axis = dim % len(b.shape)
    unit = (*b.shape[:axis], 1, *b.shape[axis + 1 :])
    return joined(b, [reshaped(b, b.cast(x, b.dtype), unit) for x in xs], axis)


@aten("constant_pad_nd", "pad")
def pad(b: Emitter, x: Value, pads: Sequence[int], mode: Any = "constant", value: Number | None = None) -> Value:
    """Pairs of (before, after) from the last axis on; a negative one cuts."""
    if not isinstance(mode, str):
        mode, value = "constant", mode  # constant_pad_nd has no mode, and its value there
    if mode != "constant":
        raise unsupported(f'padding mode "{mode}"', '"constant"')
    first = x.tensor.rank - len(pads) // 2
    low = [0] * first + list(pads[-2::-2])
    high = [0] * first + list(pads[-1::-2])
    for axis, (before, after) in enumerate(zip(low, high, strict=True)):
        x = sliced(b, x, axis, max(0, -before), extent(x, axis) - max(0, -after))
    grown = [tuple(max(0, p) for p in side) for side in (low, high)]
    return b.make(Pad(x, grown[0], grown[1], float(value or 0))) if any(grown[0] + grown[1]) else x


@aten("flip")
def flip(b: Emitter, x: Value, dims: Sequence[int]) -> Value:
    for dim in dims:
        size = extent(x, dim)
        x = b.make(Take(x, b.make(Iota(size, DType.i64, size - 1, -1)), dim % x.tensor.rank))
    return x


@aten("roll")
def roll(b: Emitter, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    if not dims:
        flat = reshaped(b, x, (x.tensor.size,))
        return reshaped(b, roll(b, flat, shifts, (0,)), x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        size = extent(x, dim)
        cut = -shift % size
        x = joined(b, [sliced(b, x, dim, cut, size), sliced(b, x, dim, 0, cut)], dim) if cut else x
    return x


@aten("slice_scatter")
def slice_scatter(
    b: Emitter, x: Value, source: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    """x with source in place of x[start:end:step]. Where x is a concat along that axis, its parts are kept apart."""
    dim %= x.tensor.rank
    span = _range(x, dim, start, end, step)
    if step == 1:
        parts = [*_cut(b, x, dim, 0, span.start), source, *_cut(b, x, dim, span.stop, extent(x, dim))]
        return joined(b, [part for part in parts if part.shape[dim]], dim)
    places = b.make(Iota(len(span), DType.i64, span.start, step))
    column = reshaped(b, places, (len(span), *(1,) * (x.tensor.rank - dim - 1)))
    return b.make(Scatter(x, b.stretch(column, source.shape), source, dim))


@aten("select_scatter")
def select_scatter(b: Emitter, x: Value, source: Value, dim: int, index: int) -> Value:
    dim %= x.tensor.rank
    index %= extent(x, dim)
    row = reshaped(b, source, (*x.shape[:dim], 1, *x.shape[dim + 1 :]))
    return slice_scatter(b, x, row, dim, index, index + 1)


def _cut(b: Emitter, x: Value, axis: int, start: int, stop: int) -> list[Value]:
    """What stands from start to stop, as the parts that x was joined from."""
    parts = x.owner.xs if isinstance(x.owner, Concat) and x.owner.axis % x.tensor.rank == axis else (x,)
    found, begin = [], 0
    for part in parts:
        end = begin + extent(part, axis)
        low, high = max(start, begin), min(stop, end)
        if low < high:
            found.append(sliced(b, part, axis, low - begin, high - begin))
        begin = end
    return found
