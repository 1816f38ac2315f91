"""Derivatives of collectives. What is differentiated is the sum, over the ranks, of what each of them returns: the gradient of a value that
every rank holds is the sum of the gradients on all ranks, and each rule is the transpose of its op.
"""

from __future__ import annotations

from ...ir.core import Value
from ...ir.ops.collective import AllGather, AllReduce, AllToAll, AllToAllRows, Done, OwnPart, ReduceScatter
from ...ir.ops.elementwise import Eq
from ...ir.ops.internode import InternodeCombine, InternodeDispatch, InternodeRedispatch
from .rules import Backward, Gradients, missing, vjp

missing("what is in flight is made by overlap, which comes after differentiation", Done)
missing("sharding comes after differentiation, and nothing before it makes one", OwnPart, InternodeDispatch, InternodeCombine)
missing("sharding comes after differentiation, and nothing before it makes one", InternodeRedispatch)


@vjp(AllGather)
def all_gather(op: AllGather, b: Backward, dy: Value) -> Gradients:
    """dx is this rank's part of the sum of every rank's dy."""
    return (b.fit(b.emit(ReduceScatter(dy, op.axis, op.size, op.dim)).result, op.x),)


@vjp(ReduceScatter)
def reduce_scatter(op: ReduceScatter, b: Backward, dy: Value) -> Gradients:
    """Every rank's x went into each part: dx holds the dy of every part."""
    return (b.fit(b.emit(AllGather(dy, op.axis, op.size, op.dim)).result, op.x),)


@vjp(AllReduce)
def all_reduce(op: AllReduce, b: Backward, dy: Value) -> Gradients:
    """Every rank's x went into the result on every rank: dx is the sum of all dy. Of the largest, the ranks that have it share that."""
    total = b.emit(AllReduce(dy, op.axis, op.size)).result
    if op.kind == "max":
        total = b.wide(total)
        largest = b.cast(b.emit(Eq(op.x, op.result)).result, total.dtype)
        total = b.div(b.mul(total, largest), b.emit(AllReduce(largest, op.axis, op.size)).result)
    return (b.fit(total, op.x),)


@vjp(AllToAll)
def all_to_all(op: AllToAll, b: Backward, dy: Value) -> Gradients:
    """The parts go back: all_to_all is its own transpose."""
    return (b.fit(b.emit(AllToAll(dy, op.axis, op.size)).result, op.x),)


@vjp(AllToAllRows)
def all_to_all_rows(op: AllToAllRows, b: Backward, *dys: Value | None) -> Gradients:
    """The rows go back, send and recv exchanged. Every row has to have been sent: the gradient has a row for each."""

    def back(dy: Value | None, x: Value) -> Value | None:
        return None if dy is None else b.fit(b.emit(AllToAllRows((dy,), op.recv, op.send, op.axis, op.size, x.shape[0])).result, x)

    return *map(back, dys, op.xs), None, None
