"""Rules of the way to the experts: what was a permutation on one rank becomes a permutation and an exchange.

Experts e * E / ep to (e + 1) * E / ep - 1 are those of rank e along ep. Rows sorted by expert are sorted by rank as well, so `dispatch` is

    rows, counts, order = dispatch(x, ids)                the rank's own tokens, by expert
    received = all_to_all(counts as [ep, E / ep])         how many rows of each of its experts every rank sends
    rows = all_to_all_rows(rows, send, received)          by expert again, then by rank

and the handle is the order with `send` and `received`. `combine` goes the same way back, `redispatch` the same way again. Over
nodes (hops.py) a token goes to each node once. The counts of local experts are the global ones, spread over ep and partial over edp.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from ...ir.core import Value
from ...ir.errors import DscError
from ...ir.ops.collective import AllToAll, AllToAllRows, OwnPart
from ...ir.ops.control import Iota, Pack, Unpack
from ...ir.ops.moe import ChooseSlots, Combine, Dispatch, Redispatch, Route, RouteBackward, RowWeights, SlotWeights
from ...ir.ops.reduce import Sum
from ...ir.ops.shape import Reshape
from ...ir.types import DType, Ragged, bound
from . import hops
from .body import Body, sharding
from .layout import Carried, Dim, Layout, Rows, axes, factors, local, spread, whole
from .products import partial_of_experts, spread_experts
from .rules import keep


@sharding(Route)
def route(body: Body, op: Route) -> None:
    """Token by token."""
    own = body.dims(op.logits)[0]
    made = op.copy(logits=body.get(op.logits, Layout((own, *whole(op.logits.shape[1:]).dims))), bias=op.bias and body.whole(op.bias))
    result = Layout((own, *whole(op.results[0].shape[1:]).dims))
    keep(body, op, body.emit(made), result, result)


@sharding(RouteBackward)
def route_backward(body: Body, op: RouteBackward) -> None:
    own = body.dims(op.logits)[0]
    made = op.with_operands(lambda v: body.get(v, Layout((own, *whole(v.shape[1:]).dims))))
    keep(body, op, body.emit(made), Layout((own, *whole(op.result.shape[1:]).dims)))


def own_tokens(body: Body, dim: Dim) -> Dim:
    """`dim` spread over every rank of the stage, so that each token is sent once."""
    for axis in ("dp", "tp"):
        if (size := body.size(axis)) == 1 or axis in axes(dim):
            continue
        befores = accumulate((f.size for f in factors(dim)), mul, initial=1)
        found = next((cut for before in befores if (cut := spread(dim, axis, size, before)) is not None), None)
        if found is None:
            raise DscError(f"{local(dim)} tokens on each rank do not make {size} equal parts along {axis}")
        dim = found
    return dim


@sharding(ChooseSlots)
def choose_slots(body: Body, op: ChooseSlots) -> None:
    """Token by token, on the rank that sends it; ranks start with different slots, as each may have few tokens."""
    tokens = own_tokens(body, body.dims(op.ids)[0])
    own = Layout((tokens, *whole(op.ids.shape[1:]).dims))
    ranks, start = body.size("stage"), op.start and body.whole(op.start)
    if start is None and ranks > 1:
        every = body.emit(Iota(ranks, DType.i32)).result
        start = body.emit(OwnPart(every, "stage", ranks, names=("start",))).result
    keep(body, op, body.emit(op.copy(ids=body.get(op.ids, own), slots=body.whole(op.slots), start=start)), own)


@sharding(Dispatch)
def dispatch(body: Body, op: Dispatch) -> None:
    tokens = own_tokens(body, body.dims(op.ids)[0])
    ids = body.get(op.ids, Layout((tokens, *whole(op.ids.shape[1:]).dims)))
    xs = tuple(body.get(x, Layout((tokens, *whole(x.shape[1:]).dims))) for x in op.xs)
    weighing = _weighing(body, op)
    weights = body.get(weighing.weights, Layout((tokens, *whole(weighing.weights.shape[1:]).dims))) if weighing else None
    ep = body.size("ep")
    if body.over_nodes:
        _dispatched(body, op, weighing, *hops.send(body, xs, ids, weights, op.experts, op.handle.name), tokens)
        return
    made = body.emit(op.copy(xs=xs, ids=ids))
    rows: Sequence[Value] = made.results[:-2]
    counts, handle = made.counts, made.handle
    if weighing and weights:
        rows = (*rows, body.emit(weighing.copy(weights=weights, handle=handle)).result)
    if ep > 1:
        held = op.experts // ep
        sent = body.emit(Reshape(counts, (ep, held), names=("sent",))).result
        received = body.emit(AllToAll(sent, "ep", ep, names=("received",))).result
        send = body.emit(Sum(sent, (1,), names=("send",))).result
        rows = _there(body, rows, send, received, _arriving(body, received, *map(bound, ids.shape)))
        counts = body.emit(Sum(received, (0,), names=(op.counts.name,))).result
        handle = body.emit(Pack((handle, send, received), names=(op.handle.name,))).result
    _dispatched(body, op, weighing, rows, counts, handle, tokens)


def _weighing(body: Body, op: Dispatch) -> RowWeights | None:
    """The op that makes weights of rows of what is known when these are sent: they travel together."""
    found = (u for u in body.func.ops if isinstance(u, RowWeights) and u.handle is op.handle and u.phase is op.phase)
    return next((u for u in found if u.weights in body.layouts), None)


def _dispatched(
    body: Body, op: Dispatch, weighing: RowWeights | None, rows: Sequence[Value], counts: Value, handle: Value, tokens: Dim
) -> None:
    for old, new in zip((*op.results[:-2], *([weighing.result] if weighing else [])), rows, strict=True):
        body.set(old, _rows(new), new)
    body.set(op.counts, Layout((spread_experts(body, op.experts),), partial_of_experts(body)), counts)
    body.set(op.handle, Carried(handle.type, tokens), handle)


def _rows(value: Value) -> Layout:
    return Layout((Rows(value.shape[0]), *whole(value.shape[1:]).dims))


def _there(body: Body, xs: Sequence[Value], send: Value, received: Value, rows: Ragged) -> Sequence[Value]:
    """Rows sorted by expert to the ranks of their experts, and there by expert again."""
    return body.emit(AllToAllRows(tuple(xs), send, received, "ep", body.size("ep"), rows, names=tuple(x.name for x in xs))).results


def _arriving(body: Body, received: Value, tokens: int, k: int) -> Ragged:
    """The rows that a rank gets at most: all tokens of all ranks, each as often as it may choose experts of this one."""
    return Ragged("rows", tokens * body.size("ep") * min(k, bound(received.shape[1])))


def _back(body: Body, x: Value, op: Combine | SlotWeights) -> Value:
    """The other way: what `_there` sent lies at the end as it lay before."""
    order, send, received = _fields(body, op.handle)
    (slots,) = order.bundle.tensors()
    return body.emit(AllToAllRows((x,), received, send, "ep", body.size("ep"), slots.shape[0], names=(x.name,))).result


def _fields(body: Body, handle: Value) -> tuple[Value, ...]:
    """What a handle carries: the order, and where there are several ranks `send` and `received`."""
    if handle not in body.handles:
        made = body.form(handle)
        names = ("order", "send", "received")
        body.handles[handle] = body.emit(Unpack(made, names=names)).results if body.size("ep") > 1 else (made,)
    return body.handles[handle]


def _way(body: Body, handle: Value) -> hops.Way:
    """What the handle of a dispatch over nodes carries."""
    if handle not in body.ways:
        body.ways[handle] = hops.unpacked(body, body.form(handle))
    return body.ways[handle]


def _sender(body: Body, handle: Value) -> Dim:
    placement = body.layouts[handle]
    assert isinstance(placement, Carried)
    return placement.tokens


@sharding(Combine)
def combine(body: Body, op: Combine) -> None:
    tokens = _sender(body, op.handle)
    rows = body.form(op.rows)
    result = Layout((tokens, *whole(op.result.shape[1:]).dims))
    if body.over_nodes:
        way = _way(body, op.handle)
        body.set(op.result, result, hops.bring_back(body, rows, way, None if op.is_sum else _row_weights(body, op, tokens)))
        return
    order, *ways = _fields(body, op.handle)
    if ways:
        rows = _back(body, rows, op)
    weights = body.get(op.weights, Layout((tokens, *whole(op.weights.shape[1:]).dims)))
    keep(body, op, body.emit(op.copy(rows=rows, handle=order, weights=weights)), result)


def _row_weights(body: Body, op: Combine | RowWeights, tokens: Dim) -> Value:
    """The weights, gone to the experts."""
    weights = body.get(op.weights, Layout((tokens, *whole(op.weights.shape[1:]).dims)))
    return hops.row_weights(body, weights, _way(body, op.handle))


@sharding(Redispatch)
def redispatch(body: Body, op: Redispatch) -> None:
    tokens = _sender(body, op.handle)
    xs = tuple(body.get(x, Layout((tokens, *whole(x.shape[1:]).dims))) for x in op.xs)
    rows: Sequence[Value]
    if body.over_nodes:
        rows = hops.send_again(body, xs, _way(body, op.handle))
    else:
        order, *ways = _fields(body, op.handle)
        rows = body.emit(op.copy(xs=xs, handle=order)).results
    if not body.over_nodes and ways:
        send, received = ways
        (slots,) = order.bundle.tensors()
        held = bound(xs[0].shape[0])
        rows = _there(body, rows, send, received, _arriving(body, received, held, bound(slots.shape[0]) // max(1, held)))
    for old, new in zip(op.results, rows, strict=True):
        body.set(old, _rows(new), new)


@sharding(RowWeights)
def row_weights(body: Body, op: RowWeights) -> None:
    """The weights go to the experts, a number for each row, if they did not go with the tokens."""
    if op.result in body.layouts:
        return
    tokens = _sender(body, op.handle)
    if body.over_nodes:
        rows = _row_weights(body, op, tokens)
        body.set(op.result, _rows(rows), rows)
        return
    order, *ways = _fields(body, op.handle)
    weights = body.get(op.weights, Layout((tokens, *whole(op.weights.shape[1:]).dims)))
    rows = body.emit(op.copy(weights=weights, handle=order)).result
    if ways:
        send, received = ways
        (rows,) = _there(body, [rows], send, received, _arriving(body, received, *map(bound, weights.shape)))
    body.set(op.result, _rows(rows), rows)


@sharding(SlotWeights)
def slot_weights(body: Body, op: SlotWeights) -> None:
    """And back to their tokens."""
    like_weights = Layout((_sender(body, op.handle), *whole(op.result.shape[1:]).dims))
    rows = body.form(op.rows)
    if body.over_nodes:
        body.set(op.result, like_weights, hops.slot_values(body, rows, _way(body, op.handle)))
        return
    order, *ways = _fields(body, op.handle)
    keep(body, op, body.emit(op.copy(rows=_back(body, rows, op) if ways else rows, handle=order)), like_weights)
