"""How a value of the whole program lies on the ranks: each dimension as a product of factors, local or spread over a mesh axis.

A dimension of B * S tokens whose sequences are spread over dp and whose positions are spread over tp is (dp, B / dp, tp, S / tp), major
to minor: reshaping [B, S, H] to [B * S, H] joins factors and moves nothing. A rank holds the product of the local factors. A value may be
`partial` besides: the true value is the sum of what the ranks along those axes hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple, TypeAlias

from ...ir.core import Value
from ...ir.errors import DscError
from ...ir.sharding import Split, axes_of
from ...ir.types import Bundle, Shape, Tensor, Type, landed
from ...ir.types import Dim as Extent


class Factor(NamedTuple):
    """One factor of a dimension: `size` elements, or as many ranks along `axis`."""

    size: int
    axis: str | None = None


@dataclass(frozen=True)
class Rows:
    """A dimension of expert rows, of which every rank has its own, as many as `extent` says."""

    extent: Extent


Dim: TypeAlias = tuple[Factor, ...] | Rows


@dataclass(frozen=True)
class Layout:
    """Where the elements of a tensor are, and along which axes the ranks' values have still to be added up."""

    dims: tuple[Dim, ...]
    partial: frozenset[str] = frozenset()

    @property
    def shape(self) -> Shape:
        """What a rank holds."""
        return tuple(map(local, self.dims))

    def places(self) -> dict[str, tuple[int, int]]:
        """For each axis that a dimension is spread over: the dimension, and the product of the factors before it there."""
        found = {}
        for i, dim in enumerate(self.dims):
            before = 1
            for factor in factors(dim):
                if factor.axis:
                    found[factor.axis] = i, before
                before *= factor.size
        return found

    def summed(self) -> Layout:
        """The same without partial sums."""
        return replace(self, partial=frozenset())

    def without(self, axes: Collection[str]) -> Layout:
        """The same, no dimension spread over `axes`."""
        return replace(self, dims=tuple(gathered(dim, axes) for dim in self.dims))


@dataclass(frozen=True)
class Carried:
    """What a rank hands on to itself, such as the handle of a dispatch: it has a type here, and no meaning elsewhere."""

    type: Type
    tokens: Dim = ()
    """Of a handle: how the tokens that were sent lie."""


Placement: TypeAlias = "Layout | Carried | tuple[Placement, ...]"
"""Of a tensor a layout, of a bundle one for each field."""


def factors(dim: Dim) -> tuple[Factor, ...]:
    """None of a dimension of rows."""
    return () if isinstance(dim, Rows) else dim


def axes(dim: Dim) -> set[str]:
    """The axes that a dimension is spread over."""
    return {f.axis for f in factors(dim) if f.axis}


def local(dim: Dim) -> Extent:
    """The extent on a rank."""
    return dim.extent if isinstance(dim, Rows) else prod(f.size for f in dim if not f.axis)


def canonical(given: Iterator[Factor] | Sequence[Factor]) -> tuple[Factor, ...]:
    """Neighbouring local factors as one, those of 1 left out."""
    found: list[Factor] = []
    for factor in given:
        if factor.size == 1:
            continue
        if found and not factor.axis and not found[-1].axis:
            found[-1] = Factor(found[-1].size * factor.size)
        else:
            found.append(factor)
    return tuple(found)


def gathered(dim: Dim, over: Collection[str]) -> Dim:
    """The dimension when it is no longer spread over some axes."""
    return dim if isinstance(dim, Rows) else canonical([Factor(f.size) if f.axis in over else f for f in dim])


def whole(shape: Shape) -> Layout:
    """Everything on every rank."""
    return Layout(tuple(canonical([Factor(d)]) if isinstance(d, int) else Rows(d) for d in shape))


def spread(dim: Dim, axis: str, size: int, before: int) -> Dim | None:
    """The dimension spread over `axis` as well, `before` elements of the whole standing before it; None where that does not divide."""
    seen = 1
    for i, f in enumerate(factors(dim)):
        lead = before // seen if before % seen == 0 else 0
        if not f.axis and lead and f.size % (lead * size) == 0:
            cut = (Factor(lead), Factor(size, axis), Factor(f.size // lead // size))
            return canonical((*factors(dim)[:i], *cut, *factors(dim)[i + 1 :]))
        seen *= f.size
    return None


def reshaped(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """Of the same elements under another shape; None where a part of a rank would not lie together."""
    rest = [f for dim in layout.dims for f in factors(dim)]
    dims: list[Dim] = []
    for extent in shape:
        if not any(f.axis for f in rest):
            dims.append(canonical([Factor(extent)]))
            continue
        taken: list[Factor] = []
        while extent > 1:
            f = rest.pop(0)
            if extent % f.size == 0:
                taken.append(f)
                extent //= f.size
            elif not f.axis and f.size % extent == 0:
                taken.append(Factor(extent))
                rest.insert(0, Factor(f.size // extent))
                extent = 1
            else:
                return None
        dims.append(canonical(taken))
    return replace(layout, dims=tuple(dims))


def coarse(dim: Dim, tile: int) -> Dim:
    """A dimension in tiles; they restart at each rank."""
    if isinstance(dim, Rows) or tile == 1:
        return dim
    return canonical([*(f for f in dim if f.axis), Factor(-(-prod(f.size for f in dim if not f.axis) // tile))])


def local_type(type: Type, placement: Placement) -> Type:
    """What a rank holds of a value of `type`."""
    if isinstance(placement, Carried):
        return placement.type
    if isinstance(type, Bundle):
        assert isinstance(placement, tuple)
        return Bundle(tuple(map(local_type, type.fields, placement)))
    assert isinstance(placement, Layout)
    assert isinstance(type, Tensor)
    return Tensor(type.dtype, placement.shape)


def placed(type: Type) -> Placement:
    """A value that every rank holds whole."""
    there = landed(type)
    return tuple(map(placed, there.fields)) if isinstance(there, Bundle) else whole(there.shape)


def settled(have: Placement) -> Placement:
    """Where a result is handed out: added up, and in parts that lie together."""
    if isinstance(have, tuple):
        return tuple(map(settled, have))
    if not isinstance(have, Layout):
        raise DscError(f"main returns a value of {have.type}, which has a meaning on its rank alone")
    have = have.summed()
    return have if to_split(have) is not None else have.without(set(have.places()))


def from_split(value: Value, split: Split, sizes: Mapping[str, int]) -> Layout:
    """The layout that a split of a tensor says. `DscError` where a dimension does not divide."""
    dims: list[Dim] = []
    for i, extent in enumerate(value.shape):
        along = [axis for axis in axes_of(split, i) if sizes[axis] > 1]
        count = prod(sizes[a] for a in along)
        if not isinstance(extent, int) or extent % count:
            where = f"dimension {i} does not make {count} equal parts along {' and '.join(along)}"
            raise DscError(f"%{value.name} is {value.type}: {where}")
        dims.append(canonical([*(Factor(sizes[a], a) for a in along), Factor(extent // count)]))
    return Layout(tuple(dims))


def to_split(layout: Layout) -> Split | None:
    """The split that says a layout; None where axes do not stand before what is local."""
    found = []
    for dim in layout.dims:
        shown = factors(dim)
        leading = [f.axis for f in shown if f.axis]
        if isinstance(dim, Rows) or any(f.axis for f in shown[len(leading) :]) or not all(f.axis for f in shown[: len(leading)]):
            return None
        found.append("+".join(a for a in leading if a))
    while found and not found[-1]:
        found.pop()
    return tuple(found)
