"""Collectives on one rank: what it sends, and what it makes of what comes. Reductions add up in the order of the ranks, and round once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from ...distributed.world import Exchange, Gather, Index, Program
from ...ir.errors import DscError
from ...ir.ops import collective as ops
from ...ir.types import DType, bound
from ..arrays import Array, rounded, widen
from .elementwise import larger
from .registry import collective, reference

Wide = np.dtype[Any]


@reference(ops.Done, operands="stored")
def done(op: ops.Done, *xs: Array) -> Any:
    """By itself: what is on its way is held as the array that it is going to be."""
    return xs if len(xs) > 1 else xs[0]


@collective(ops.AllGather)
def all_gather(op: ops.AllGather, wide: Wide, x: Array) -> Program[Array]:
    found = yield Gather(op.axis, op.size, x)
    return np.concatenate(found, axis=op.dim)


@collective(ops.ReduceScatter)
def reduce_scatter(op: ops.ReduceScatter, wide: Wide, x: Array) -> Program[Array]:
    return (yield from _reduced(op, np.split(x, op.size, axis=op.dim), wide))


@collective(ops.AllReduce)
def all_reduce(op: ops.AllReduce, wide: Wide, x: Array) -> Program[Array]:
    """Each rank reduces one of `size` equal parts, the last filled up with zeros, and gathers the others'."""
    flat = np.zeros(-(-x.size // op.size) * op.size, x.dtype)
    flat[: x.size] = x.reshape(x.size)
    total = yield from _reduced(op, np.split(flat, op.size), wide)
    found = yield Gather(op.axis, op.size, _narrowed(total, op.x.dtype))
    return np.concatenate(found)[: x.size].reshape(x.shape)


def _reduced(op: ops.ReduceScatter | ops.AllReduce, parts: Sequence[Array], wide: Wide) -> Program[Array]:
    """The sum, or the largest, of what all ranks have in this rank's place, not yet rounded."""
    found = yield Exchange(op.axis, op.size, tuple((part,) for part in parts), ((parts[0].shape,),) * op.size)
    together = larger if isinstance(op, ops.AllReduce) and op.kind == "max" else np.add
    terms = (widen(x, wide) if op.x.dtype.is_float else x for (x,) in found)
    total = next(terms)
    for x in terms:
        total = together(total, x)
    return total


def _narrowed(x: Array, dtype: DType) -> Array:
    return rounded(x, dtype) if dtype.is_float else x


@collective(ops.OwnPart)
def own_part(op: ops.OwnPart, wide: Wide, x: Array) -> Program[Array]:
    index = yield Index(op.axis, op.size)
    return np.split(x, op.size, axis=op.dim)[index]


@collective(ops.AllToAll)
def all_to_all(op: ops.AllToAll, wide: Wide, x: Array) -> Program[Array]:
    parts = x.reshape(op.size, len(x) // op.size, *x.shape[1:])
    found = yield Exchange(op.axis, op.size, tuple([(part,) for part in parts]), ((parts.shape[1:],),) * op.size)
    return np.concatenate([part for (part,) in found])


@collective(ops.AllToAllRows)
def all_to_all_rows(op: ops.AllToAllRows, wide: Wide, *operands: Array) -> Program[Any]:
    *xs, send, recv = operands
    sent, received = send.ravel().tolist(), recv.ravel().tolist()
    if min(*sent, *received) < 0:
        raise DscError(f"send is {send.tolist()} and recv {recv.tolist()}, expected no negative number")
    if sum(sent) > len(xs[0]):
        raise DscError(f"send is {send.tolist()}, {sum(sent)} rows in all, but there are {len(xs[0])}")
    if sum(received) > bound(op.rows):
        raise DscError(f"{sum(received)} rows arrive, but there is room for {bound(op.rows)}: {op.rows}")
    leave, come = ops.rows_of_ranks(send.tolist()), ops.rows_of_ranks(recv.tolist())
    messages = tuple([tuple([_joined([x[rows] for rows in places]) for x in xs]) for places in leave])
    lengths = [[rows.stop - rows.start for rows in places] for places in come]
    shapes = tuple([tuple([(sum(own), *x.shape[1:]) for x in xs]) for own in lengths])
    found = yield Exchange(op.axis, op.size, messages, shapes)
    results = []
    for parts in zip(*found, strict=True):
        pieces = [_cut(part, own) for part, own in zip(parts, lengths, strict=True)]  # of each rank, block by block
        results.append(np.concatenate([piece for block in zip(*pieces, strict=True) for piece in block]))
    return tuple(results) if len(results) > 1 else results[0]


def _joined(parts: Sequence[Array]) -> Array:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _cut(x: Array, counts: Sequence[int]) -> list[Array]:
    """The first counts[0] rows of x, the next counts[1], ..."""
    return [x[stop - count : stop] for stop, count in zip(accumulate(counts), counts, strict=True)]
