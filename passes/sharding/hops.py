"""The way to the experts in two hops: over the network once for each node that holds an expert of the token, then on inside the node.

A rank sends to the rank of its own index in the other node (axis ep.node), and that one to the ranks of the experts (axis ep.local), so a
token's vector crosses the network as often as its experts have nodes, and a link inside a node as often as they have ranks there. Each
hop, and the last step to the experts of a rank, is the same:

    rows, ids, send, tokens = dispatch_groups(x, ids)     a row for each group of experts, with what it chose of the group
    recv = all_to_all(send)                               how many rows come from each rank
    rows, ids = all_to_all_rows([rows, ids], send, recv)

The way back is the reverse. The rows of a token are added up where they were parted: weighted at the rank of its experts, then at the
rank through which it entered the node, then at home; each sum is accumulated in float32 and rounded to the dtype of the rows, BF16 in the
recipe. The handle is all that the way needs: of each step the ids that it was given and the token of each row, of a hop `send` and `recv`
as well, of the last step the slots of each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...ir.core import Value
from ...ir.ops.collective import AllToAll, AllToAllRows
from ...ir.ops.control import Literal, Pack, Unpack
from ...ir.ops.elementwise import Ge, Where
from ...ir.ops.moe import CombineGroups, DispatchGroups
from ...ir.ops.reduce import Sum
from ...ir.ops.shape import Take
from ...ir.types import DType, Ragged, bound
from .body import Body

HOPS = {"ep.node": ("to_nodes", "entered"), "ep.local": ("to_ranks", "arrived")}
"""The axis of each hop, and what its rows are called where they leave and where they arrive."""


@dataclass(frozen=True)
class Step:
    """One step of the way: the ids of the tokens that it parts, and the token of each row; of a hop how many rows go and come."""

    ids: Value
    tokens: Value
    axis: str = ""
    send: Value | None = None
    recv: Value | None = None


@dataclass(frozen=True)
class Way:
    """What the handle of a dispatch in two hops carries. `chosen` are the slots of each row at its expert: not negative where it is it."""

    steps: tuple[Step, ...]
    chosen: Value


def send(
    body: Body, xs: Sequence[Value], ids: Value, weights: Value | None, experts: int, name: str
) -> tuple[Sequence[Value], Value, Value]:
    """The rows at their experts, with the weight of each behind them where there are weights, how many each expert has, and the handle."""
    xs = (*xs, weights) if weights else xs
    fields: list[Value] = []
    held = experts
    arriving = bound(ids.shape[0])
    names = tuple(x.name for x in xs)
    for axis, ranks in _hops(body):
        there, here = HOPS[axis]
        held, arriving = held // ranks, arriving * ranks
        made = body.emit(DispatchGroups(tuple(xs), ids, ranks, held, there, names=(*names, "ids", "send", "tokens")))
        *rows, inside, counts, tokens = made.results
        received = body.emit(AllToAll(counts, axis, ranks, names=("recv",))).result
        fields += [ids, tokens, counts, received]
        xs, ids = _exchanged(body, (*rows, inside), counts, received, axis, Ragged(here, arriving))
    last = body.emit(DispatchGroups(tuple(xs), ids, held, 1, names=(*names, "chosen", "counts", "tokens")))
    *rows, chosen, counts, tokens = last.results
    handle = body.emit(Pack((*fields, ids, tokens, chosen), names=(name,))).result
    return [*rows[:-1], _chosen_weight(body, rows[-1], chosen)] if weights else rows, counts, handle


def send_again(body: Body, xs: Sequence[Value], way: Way) -> Sequence[Value]:
    """Other vectors of the same tokens by the same way."""
    for step in way.steps:
        xs = [body.emit(Take(x, step.tokens, names=(x.name,))).result for x in xs]
        if step.send and step.recv:
            arrive = _arriving(way, step)
            xs = body.emit(
                AllToAllRows(tuple(xs), step.send, step.recv, step.axis, body.size(step.axis), arrive, names=tuple(x.name for x in xs))
            ).results
    return xs


def bring_back(body: Body, x: Value, way: Way, weights: Value | None = None) -> Value:
    """The sum of each token's rows, those at the experts times `weights`."""
    for step in reversed(way.steps):
        if step.send and step.recv:
            leave = step.tokens.shape[0]
            ranks = body.size(step.axis)
            x = body.emit(AllToAllRows((x,), step.recv, step.send, step.axis, ranks, leave, names=(x.name,))).result
        x = body.emit(CombineGroups(x, step.tokens, step.ids, weights, names=(x.name,))).result
        weights = None
    return x


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
    hops = list(_hops(body))
    of_hop, last = ("ids", "tokens", "send", "recv"), ("ids", "tokens", "chosen")
    fields = iter(body.emit(Unpack(handle, names=(*of_hop * len(hops), *last))).results)
    steps = [Step(next(fields), next(fields), axis, next(fields), next(fields)) for axis, _ in hops]
    return Way((*steps, Step(next(fields), next(fields))), next(fields))


def _hops(body: Body) -> Iterator[tuple[str, int]]:
    """The axes of the hops; where every rank is a node, or all are in one, there is one hop."""
    return ((axis, ranks) for axis in HOPS if (ranks := body.size(axis)) > 1)


def _exchanged(body: Body, xs: Sequence[Value], counts: Value, received: Value, axis: str, rows: Ragged) -> tuple[Sequence[Value], Value]:
    made = body.emit(AllToAllRows(tuple(xs), counts, received, axis, body.size(axis), rows, names=tuple(x.name for x in xs))).results
    return made[:-1], made[-1]


def _arriving(way: Way, step: Step) -> Ragged:
    """The rows that arrive by a hop are the tokens of the next step."""
    extent = way.steps[way.steps.index(step) + 1].ids.shape[0]
    assert isinstance(extent, Ragged)
    return extent


def _where_chosen(body: Body, x: Value, chosen: Value) -> Value:
    """x at the slots of each row, 0 at its token's other slots."""
    none = body.emit(Literal((0,), (), DType.i32)).result
    return body.emit(Where(body.emit(Ge(chosen, none)).result, x, body.number(0))).result
