"""Ops that move, pick or place elements without computing on them."""

from __future__ import annotations

from math import prod

from ..core import Op, Trait, Value, op
from ..errors import require
from ..types import Dim, Tensor, Type
from .rules import axis_of, broadcast, require_int, show, static


@op("reshape", Trait.VIEW)
class Reshape(Op):
    """The same elements in row-major order under another shape."""

    x: Value
    shape: tuple[int, ...]

    def infer(self) -> tuple[Type, ...]:
        old = static(self.x, "reshape")
        require(
            prod(old) == prod(self.shape), f"{self.x.type} has {prod(old)} elements, but shape {show(self.shape)} has {prod(self.shape)}"
        )
        return (Tensor(self.x.dtype, self.shape),)


@op("transpose", Trait.VIEW)
class Transpose(Op):
    """Axes reordered: axis i of the result is axis perm[i] of x."""

    x: Value
    perm: tuple[int, ...]

    def infer(self) -> tuple[Type, ...]:
        require(sorted(self.perm) == list(range(self.x.tensor.rank)), f"perm {list(self.perm)} does not order the axes of {self.x.type}")
        return (Tensor(self.x.dtype, tuple(self.x.shape[p] for p in self.perm)),)


@op("broadcast", Trait.VIEW)
class Broadcast(Op):
    """x stretched to `shape`, by NumPy's rule."""

    x: Value
    shape: tuple[int, ...]

    def infer(self) -> tuple[Type, ...]:
        require(broadcast(self.x.shape, self.shape) == self.shape, f"{self.x.type} does not stretch to {show(self.shape)}")
        return (Tensor(self.x.dtype, self.shape),)


@op("slice", Trait.VIEW)
class Slice(Op):
    """Elements start, start + step, ... below stop along one axis."""

    x: Value
    axis: int
    start: int
    stop: int
    step: int = 1

    def infer(self) -> tuple[Type, ...]:
        axis = axis_of(self.x, self.axis)
        extent = self.x.shape[axis]
        require(isinstance(extent, int), f"axis {axis} of {self.x.type} is ragged: it has no static slice")
        inside = 0 <= self.start <= self.stop <= extent and self.step >= 1  # type: ignore[operator]
        require(inside, f"slice {self.start}:{self.stop}:{self.step} is outside axis {axis} of {self.x.type}")
        length = -(-(self.stop - self.start) // self.step)
        return (Tensor(self.x.dtype, (*self.x.shape[:axis], length, *self.x.shape[axis + 1 :])),)


@op("concat")
class Concat(Op):
    """Tensors one after the other along an axis."""

    xs: tuple[Value, ...]
    axis: int

    def infer(self) -> tuple[Type, ...]:
        require(len(self.xs) > 0, "concat needs at least one tensor")
        first, axis = self.xs[0], axis_of(self.xs[0], self.axis)
        total = 0
        for x in self.xs:
            rest = [(a, b) for i, (a, b) in enumerate(zip(x.shape, first.shape, strict=False)) if i != axis]
            same = x.tensor.rank == first.tensor.rank and x.dtype is first.dtype and all(a == b for a, b in rest)
            require(same, f"operands differ outside axis {axis}: {first.type} and {x.type}")
            extent = x.shape[axis]
            require(isinstance(extent, int), f"axis {axis} of {x.type} is ragged: it cannot be joined")
            total += extent  # type: ignore[operator]
        return (Tensor(first.dtype, (*first.shape[:axis], total, *first.shape[axis + 1 :])),)


@op("pad")
class Pad(Op):
    """x with `low` and `high` more elements along each axis, filled with `value`."""

    x: Value
    low: tuple[int, ...]
    high: tuple[int, ...]
    value: float = 0.0

    def infer(self) -> tuple[Type, ...]:
        shape = static(self.x, "pad")
        require(
            len(self.low) == len(self.high) == len(shape),
            f"{self.x.type} has {len(shape)} axes, found {len(self.low)} and {len(self.high)}",
        )
        require(min((*self.low, *self.high), default=0) >= 0, "a pad is 0 or more")
        return (Tensor(self.x.dtype, tuple(lo + d + hi for lo, d, hi in zip(self.low, shape, self.high, strict=True))),)


@op("take")
class Take(Op):
    """x[..., indices, ...] along one axis: the indices' shape stands where the axis stood. An embedding is take along axis 0."""

    x: Value
    indices: Value
    axis: int = 0

    def infer(self) -> tuple[Type, ...]:
        require_int(self.indices)
        axis = axis_of(self.x, self.axis)
        return (Tensor(self.x.dtype, (*self.x.shape[:axis], *self.indices.shape, *self.x.shape[axis + 1 :])),)


@op("gather")
class Gather(Op):
    """result[i, j, ...] = x[i, indices[i, j, ...], ...] where `axis` is 1, and likewise for another: torch.gather."""

    x: Value
    indices: Value
    axis: int

    def infer(self) -> tuple[Type, ...]:
        require_int(self.indices)
        _same_outside(self.x, self.indices, axis_of(self.x, self.axis))
        return (Tensor(self.x.dtype, self.indices.shape),)


@op("scatter")
class Scatter(Op):
    """x with x[i, indices[i, j, ...], ...] replaced by updates[i, j, ...] where `axis` is 1: torch.scatter. Indices are distinct."""

    x: Value
    indices: Value
    updates: Value
    axis: int

    def infer(self) -> tuple[Type, ...]:
        require_int(self.indices)
        _same_outside(self.x, self.indices, axis_of(self.x, self.axis))
        fits = self.updates.dtype is self.x.dtype and self.updates.shape == self.indices.shape
        require(fits, f"updates are {self.updates.type}, expected {Tensor(self.x.dtype, self.indices.shape)}")
        return (self.x.tensor,)


def _same_outside(x: Value, indices: Value, axis: int) -> None:
    pairs = zip(x.shape, indices.shape, strict=False)
    same = x.tensor.rank == indices.tensor.rank and all(a == b for i, (a, b) in enumerate(pairs) if i != axis)
    require(same, f"x and indices differ outside axis {axis}: {x.type} and {indices.type}")


@op("index_add")
class IndexAdd(Op):
    """x with row r of `updates` added to row indices[r], in float32 and in the order of r, rounded once."""

    x: Value
    indices: Value
    updates: Value

    def infer(self) -> tuple[Type, ...]:
        require_int(self.indices)
        rows: tuple[Dim, ...] = (*self.indices.shape, *self.x.shape[1:])
        fits = self.indices.tensor.rank == 1 and self.updates.shape == rows and self.updates.dtype is self.x.dtype
        require(fits, f"updates are {self.updates.type}, expected {Tensor(self.x.dtype, rows)}")
        return (self.x.tensor,)


@op("cache_append")
class CacheAppend(Op):
    """cache[b, positions[b]] = new[b] for each sequence b: [B, N, ...] with [B, ...] at i64[B]."""

    cache: Value
    new: Value
    positions: Value

    def infer(self) -> tuple[Type, ...]:
        require_int(self.positions)
        cache = self.cache.tensor
        require(cache.rank >= 2, f"a cache is [B, N, ...], found {cache}")
        entry = Tensor(cache.dtype, (cache.shape[0], *cache.shape[2:]))
        require(self.new.type == entry, f"new is {self.new.type}, expected {entry}")
        require(
            self.positions.shape == cache.shape[:1],
            f"positions are {self.positions.type}, expected one for each of {cache.shape[0]} sequences",
        )
        return (cache,)
