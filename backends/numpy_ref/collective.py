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
from ..rows import by_rank, rows_of_each
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
    leaving, coming = int(send.sum()), int(recv.sum())
    if min(send.min(initial=0), recv.min(initial=0)) < 0:
        raise DscError(f"send is {send.tolist()} and recv {recv.tolist()}, expected no negative number")
    if leaving > len(xs[0]):
        raise DscError(f"send is {send.tolist()}, {leaving} rows in all, but there are {len(xs[0])}")
    if coming > bound(op.rows):
        raise DscError(f"{coming} rows arrive, but there is room for {bound(op.rows)}: {op.rows}")
    sorting, given, taken = by_rank(send), rows_of_each(send), rows_of_each(recv)
    messages = zip(*[_cut(x if sorting is None else x.take(sorting, axis=0), given) for x in xs], strict=True)
    shapes = tuple([tuple([(count, *x.shape[1:]) for x in xs]) for count in taken])
    found = yield Exchange(op.axis, op.size, tuple(messages), shapes)
    results = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    if (sorting := by_rank(recv)) is not None:
        for i, x in enumerate(results):
            results[i] = np.empty_like(x)
            results[i][sorting] = x
    return tuple(results) if len(results) > 1 else results[0]


def _cut(x: Array, counts: Sequence[int]) -> list[Array]:
    """The first counts[0] rows of x, the next counts[1], ..."""
    return [x[stop - count : stop] for stop, count in zip(accumulate(counts), counts, strict=True)]
