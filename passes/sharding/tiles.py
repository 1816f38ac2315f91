"""Tiles of quantised values on ranks: where the scales are, and where tiles begin anew because a rank's share cuts them.

A matrix scaled in blocks of 128 x 128 and then split has the scales of the whole only where it is split at multiples of 128. What is
quantised on ranks has tiles of its own there, no larger than those of the whole, and a note says so. What is stored in FP8 keeps its
scales: a share that cuts blocks is read in the finer tiles that divide both, each with the scale of the block in which it lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import gcd, prod
from typing import TYPE_CHECKING

from ...ir.core import Op, Value
from ...ir.ops.control import Param
from ...ir.ops.quant import Dequantize, ScaledMatmul
from ...ir.ops.shape import Broadcast, Reshape, Slice
from ...ir.quantization import SCALE_SUFFIX
from ...ir.types import bound
from .layout import Dim, Factor, Layout, Rows, axes, canonical, coarse, factors, local, whole

if TYPE_CHECKING:
    from .body import Body

Tile = tuple[int, int]
SHOWN = 3
"""Components that a note names of those that are alike."""


def scale_layout(codes: Layout, tile: Tile) -> Layout:
    """Where the scales of codes are."""
    *outer, rows, columns = codes.dims
    return Layout((*outer, coarse(rows, tile[0]), coarse(columns, tile[1])))


def cut(codes: Layout, tile: Tile) -> Iterator[tuple[int, str, int]]:
    """(dimension from the end, axes, elements that lie together on a rank) where a share does not consist of tiles of the whole."""
    for i, (dim, extent) in enumerate(zip(codes.dims[-2:], tile, strict=True), -2):
        together = _together(dim)
        if axes(dim) and together % extent:
            yield i, " and ".join(f.axis for f in factors(dim) if f.axis), together


def _together(dim: Dim) -> int:
    """Elements of the whole that lie together on a rank: the local factors behind the last that is spread."""
    shown = factors(dim)
    last = max((i for i, f in enumerate(shown) if f.axis), default=-1)
    return prod(f.size for f in shown[last + 1 :])


def cuts_blocks(body: Body, scales: Param, dim: int, axis: str) -> bool:
    """Whether the shares of a stored weight along `axis` cut the blocks to which its `scales` belong."""
    if axis == "ep" or not scales.path.endswith(SCALE_SUFFIX):  # experts are whole: blocks begin anew at each
        return False
    found = next(filter(None, (_tile(op, scales.result) for op in body.func.ops)), None)
    return found is not None and bound(found[0].shape[dim]) // body.size(axis) % found[1][dim] != 0


def _tile(op: Op, scales: Value) -> tuple[Value, Tile] | None:
    match op:
        case ScaledMatmul() if op.b_scales is scales:
            return op.b, op.b_tile
        case Dequantize() if op.scales is scales:
            return op.codes, op.tile
    return None


def finer(body: Body, scales: Value, codes: Layout, tile: Tile) -> tuple[Value, Tile]:
    """The scales of a rank's share of `codes`, and the tiles that they are for: finer ones where it cuts those that `scales` belong to."""
    made, have, tile_of = body.form(scales), body.layout(scales), list(tile)
    for i, dim in enumerate(codes.dims[-2:], -2):
        spread = axes(dim)
        if not spread or isinstance(dim, Rows) or spread <= axes(have.dims[i]):
            continue
        share, at, shape = bound(local(dim)), i % len(have.dims), [bound(local(d)) for d in have.dims]
        tile_of[i] = gcd(share, tile[i])
        times, count = tile[i] // tile_of[i], share * prod(map(body.size, spread)) // tile_of[i]
        apart = body.emit(Reshape(made, (*shape[: at + 1], 1, *shape[at + 1 :]))).result
        every = body.emit(Broadcast(apart, (*shape[: at + 1], times, *shape[at + 1 :]))).result
        joined = body.emit(Reshape(every, (*shape[:at], shape[at] * times, *shape[at + 1 :]))).result
        made = body.emit(Slice(joined, at, 0, count)).result
        have = Layout((*have.dims[:at], *whole((count,)).dims, *have.dims[at + 1 :]))
        want = canonical([*(f for f in factors(dim) if f.axis), Factor(share // tile_of[i])])
        after = Layout((*have.dims[:at], want, *have.dims[at + 1 :]))
        made, have = body.convert(made, have, after), after
    return made, (tile_of[0], tile_of[1])


def told(made: Mapping[Op, Sequence[tuple[str, str]]]) -> str:
    """Where tiles begin anew; "" if nowhere. `made` says of an op along which axes, and what of it lies together there."""
    alike: dict[str, dict[str, dict[str, None]]] = {}
    for op, places in made.items():
        for along, what in places:
            alike.setdefault(along, {}).setdefault(what, {})[op.id.partition("#")[0]] = None
    return "; ".join(
        f"along {along} {', '.join(f'{what} of {_few(list(ops))}' for what, ops in whats.items())}" for along, whats in alike.items()
    )


def _few(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
