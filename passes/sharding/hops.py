"""The way to the experts over nodes: a token's vector crosses the network once for each node that holds one of its experts.

A rank sends to the rank of its own index in the other node, and that one to the ranks of the experts, where a token becomes a row for each:

    rows, ids, handle = internode_dispatch(x, ids)        to the ranks of its experts, with what it chose there
    rows, chosen, counts, tokens = dispatch_groups(rows, ids)     a row for each expert

The way back is the reverse. The rows of a token are added up where they were parted: weighted at the rank of its experts, then at the
rank through which it entered the node, then at home; each sum is accumulated in float32 and rounded to the dtype of the rows, BF16 in the
recipe. With `dispatch=two-hop` the exchanges between ranks are those that `internode_dispatch` and its like mean (ir/ops/internode.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.core import Builder, Value
from ...ir.ops.control import Literal, Pack, Unpack
from ...ir.ops.elementwise import Ge, Where
from ...ir.ops.internode import WAY, Internode, InternodeCombine, InternodeDispatch, InternodeRedispatch
from ...ir.ops.moe import CombineGroups, DispatchGroups
from ...ir.ops.reduce import Sum
from ...ir.ops.shape import Take
from ...ir.types import DType
from .body import Body


@dataclass(frozen=True)
class Way:
    """What the handle of a dispatch over nodes carries: the one between ranks, and of the last step the ids of the rows that it parts, the
    row of each expert's, and the slots of each: not negative where it is it."""

    between: Value
    ids: Value
    tokens: Value
    chosen: Value


def send(
    body: Body, xs: Sequence[Value], ids: Value, weights: Value | None, experts: int, name: str
) -> tuple[Sequence[Value], Value, Value]:
    """The rows at their experts, with the weight of each behind them where there are weights, how many each expert has, and the handle."""
    xs = (*xs, weights) if weights else tuple(xs)
    axis, size, nodes = _axis(body)
    names = tuple(x.name for x in xs)
    sent = InternodeDispatch(xs, ids, experts, axis, size, nodes)
    made = _emitted(body, sent.copy(names=(*names, *(WAY * len(sent.hops)))))
    inside, between = made[len(xs)], body.emit(Pack((ids, *made[len(xs) + 1 :]), names=("between",))).result
    last = body.emit(DispatchGroups(tuple(made[: len(xs)]), inside, experts // size, 1, names=(*names, "chosen", "counts", "tokens")))
    *rows, chosen, counts, tokens = last.results
    handle = body.emit(Pack((between, inside, tokens, chosen), names=(name,))).result
    return [*rows[:-1], _chosen_weight(body, rows[-1], chosen)] if weights else rows, counts, handle


def send_again(body: Body, xs: Sequence[Value], way: Way) -> Sequence[Value]:
    """Other vectors of the same tokens by the same way."""
    arrived = _emitted(body, InternodeRedispatch(tuple(xs), way.between, *_axis(body), names=tuple(x.name for x in xs)))
    return [body.emit(Take(x, way.tokens, names=(x.name,))).result for x in arrived]


def bring_back(body: Body, x: Value, way: Way, weights: Value | None = None) -> Value:
    """The sum of each token's rows, those at the experts times `weights`."""
    own = body.emit(CombineGroups(x, way.tokens, way.ids, weights, names=(x.name,))).result
    return _emitted(body, InternodeCombine(own, way.between, *_axis(body), names=(x.name,)))[0]


def row_weights(body: Body, weights: Value, way: Way) -> Value:
    """The weight of each row at its expert, f32[R, 1], of the tokens' weights f32[T, k]."""
    (at_rows,) = send_again(body, [weights], way)
    return _chosen_weight(body, at_rows, way.chosen)


def _chosen_weight(body: Body, at_rows: Value, chosen: Value) -> Value:
    """Of the weights of a row's token that of its slot, the only one that is chosen."""
    return body.emit(Sum(_where_chosen(body, at_rows, chosen), (1,), keepdims=True, names=("row_weights",))).result


def slot_values(body: Body, x: Value, way: Way) -> Value:
    """What each row x [R, 1] says of its slot, back at the tokens: [T, k]. Every slot has one row, so nothing is rounded."""
    return bring_back(body, _where_chosen(body, x, way.chosen), way)


def unpacked(body: Body, handle: Value) -> Way:
    """The fields of a handle."""
    return Way(*body.emit(Unpack(handle, names=("between", "ids", "tokens", "chosen"))).results)


def _axis(body: Body) -> tuple[str, int, int]:
    return "ep", body.size("ep"), body.size("ep.node")


def _emitted(body: Body, op: Internode) -> Sequence[Value]:
    """The results of an exchange over nodes: of one kernel, or hop by hop."""
    if body.dispatch == "forwarded":
        return body.emit(op).results
    b = Builder("hops")
    results = op.expand(b)
    for inner in b.ops:
        body.emit(inner)
    return results


def _where_chosen(body: Body, x: Value, chosen: Value) -> Value:
    """x at the slots of each row, 0 at its token's other slots."""
    none = body.emit(Literal((0,), (), DType.i32)).result
    return body.emit(Where(body.emit(Ge(chosen, none)).result, x, body.number(0))).result
