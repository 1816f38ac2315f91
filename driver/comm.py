"""What a rank of a mesh sends: every collective that runs, its bytes by kind and axis, and how many of them leave the node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations
from typing import Any

from ..distributed.pipeline import Pipeline
from ..ir.core import Module, Value
from ..ir.errors import require
from ..ir.mesh import ATTRIBUTE, Mesh, mesh_of
from ..ir.ops.collective import AllGather, AllReduce, AllToAll, AllToAllRows, Collective, OwnPart, ReduceScatter
from ..ir.ops.control import Call
from ..ir.ops.internode import exchanges_of
from ..ir.routing import Routing, routing_by_gate
from ..ir.stages import BACKWARD, END, FORWARD, INPUT, is_staged
from ..ir.types import Tensor, bound
from ..ir.walk import walk
from ..schedule.actions import Schedule
from .pipelining import schedule_for
from .ui import plural, size, table

HOPS = ("ep.node", "ep.local")
"""The axes of dispatch over nodes: over the network, then inside the node."""


@dataclass(frozen=True)
class Sent:
    """One collective of a step, or a hop of one over nodes. Bytes are what a rank hands over, of rows its own part included, on average.

    Over nodes a token's row is sent as often as its experts have nodes, and then ranks: as many as the gate's rule gives on average where
    the scores of experts are independent (ir/routing.py), 3.954 of 8 nodes where DeepSeek-V3 chooses 8 of 256 experts in 4 of 8 groups.
    """

    func: str
    weights: str
    op: str
    phase: str
    kind: str
    axis: str
    ranks: int
    bytes: int
    crossing: int
    """Of `bytes`, what goes to ranks of other nodes, destinations being equally likely."""


def sent(module: Module) -> Iterator[Sent]:
    """Every collective, hop by hop, in the order in which a rank runs them. `DscError` where the program was not sharded."""
    require(ATTRIBUTE in module.attributes, "the program runs on one rank and sends nothing: compile it with --mesh")
    mesh = mesh_of(module)
    gates = routing_by_gate(module)
    for prefix, func, op in walk(module):
        if not isinstance(op, Collective) or isinstance(op, OwnPart):
            continue
        for part in exchanges_of(op):
            axis, ranks = part.along()
            routing = gates.get(prefix, next(iter(gates.values()), None)) if axis in HOPS else None
            number = volume(part) if routing is None else _hop(mesh, part, routing)
            kind = op.name if isinstance(part, AllToAllRows) else part.name  # what ranks first tell each other is no row
            yield Sent(func.name, prefix, op.id, op.phase.name, kind, axis, ranks, int(number), int(number * _leaving(mesh, axis, part)))


def volume(op: Collective) -> Fraction:
    """Bytes that a rank hands over: (n - 1) / n of the whole, twice that where it is reduced and gathered; of rows all that are sent."""
    ranks = op.along()[1]
    match op:
        case AllGather(x=x):
            return Fraction(x.type.bytes * (ranks - 1))
        case ReduceScatter(x=x) | AllToAll(x=x):
            return Fraction(x.type.bytes * (ranks - 1), ranks)
        case AllReduce(x=x):
            return Fraction(2 * x.type.bytes * (ranks - 1), ranks)
        case AllToAllRows(xs=xs):
            return Fraction(sum(_row_bytes(x.tensor) for x in xs) * _rows(op))
    return Fraction(0)


def _hop(mesh: Mesh, op: Collective, routing: Routing) -> Fraction:
    """Bytes of one hop: rows as often as the gate's rule says for each of the rank's tokens, which are what the larger bound counts."""
    if not isinstance(op, AllToAllRows):
        return volume(op)
    reach = mesh.size("ep.node") if op.axis == "ep.node" else mesh.ep
    tokens = max(bound(op.xs[0].shape[0]), bound(op.rows)) // reach
    return sum(_row_bytes(x.tensor) for x in op.xs) * tokens * Fraction(routing.distinct(reach))


def _row_bytes(x: Tensor) -> int:
    return Tensor(x.dtype, (1, *x.shape[1:])).bytes


def _rows(op: AllToAllRows) -> int:
    """As many on average as the end at which their number is known: that of the tokens."""
    extent = op.xs[0].shape[0]
    return extent if isinstance(extent, int) else bound(op.rows)


def _leaving(mesh: Mesh, axis: str, op: Collective) -> Fraction:
    """The share of what is sent that goes to another node: of rows each rank gets as many, itself too; in a ring each sends to the next."""
    group = mesh.group(axis, 0)
    if isinstance(op, AllToAllRows):
        return Fraction(sum(mesh.crosses(group[0], other) for other in group), len(group))
    if isinstance(op, AllToAll):
        return Fraction(sum(mesh.crosses(group[0], other) for other in group[1:]), max(1, len(group) - 1))
    steps = list(zip(group, (*group[1:], group[0]), strict=True))
    return Fraction(sum(mesh.crosses(a, b) for a, b in steps), len(steps))


def handed_on(plan: Pipeline) -> Iterator[Sent]:
    """What stages send to their neighbours for one micro-batch, by the call that made it; nothing where both are on one rank."""
    stages, home = plan.stages, plan.schedule.home
    way = min(reverse for _, reverse in home)  # where there are two, one is as long as the other
    for (stage, reverse), place in sorted(home.items()):
        for step, role, values in ((1, FORWARD, stages.forward(stage)), (-1, BACKWARD, stages.backward(stage))):
            other = home.get((stage + step, reverse), place)
            if other != place and values and reverse == way:
                yield _between(plan, stages.calls[stage].get(role) or stages.calls[stage][INPUT], place, other, values)


def delivered(plan: Pipeline) -> Iterator[Sent]:
    """What ranks along pp send one another for calls that are made once, after all micro-batches."""
    for stage in range(len(plan.stages)):
        end, places = plan.stages.calls[stage].get(END), plan.places(stage)
        if end and len(places) > 1:  # each tells the other its sums
            yield from (_between(plan, end, a, b, plan.summed(stage)) for a, b in permutations(places, 2))
    for call, transfers in plan.deliveries():
        yield from (_between(plan, call, *transfer) for transfer in transfers if call)


def _between(plan: Pipeline, call: Call, source: int, target: int, values: Sequence[Value]) -> Sent:
    """What a rank of one place along pp sends to one of another."""
    mesh = mesh_of(plan.module)
    each, number = mesh.dp * mesh.tp, sum(value.type.bytes for value in values)
    crossing = Fraction(number * sum(mesh.crosses(source * each + i, target * each + i) for i in range(each)), each)
    return Sent(str(call.callee), "", call.id, call.phase.name, "send", "pp", mesh.pp, number, int(crossing))


def describe_comm(module: Module, update: Module | None = None, schedule: Schedule | None = None) -> tuple[dict[str, Any], str]:
    """What a rank sends in a step and in the `update` after it, as JSON with every collective, and as text by function and call.

    Of a program that is cut into stages it is what one rank of each stage sends for a micro-batch, and once at the end.
    """
    if is_staged(module):
        return _describe_pipeline(Pipeline(module, schedule or schedule_for(module)), update)
    every = list(sent(module))
    after = list(sent(update)) if update and ATTRIBUTE in update.attributes else []
    total, crossing = _total(every)
    summary = f"a rank sends {size(total)} in a step, {size(crossing)} to other nodes, in {plural(len(every), 'collective')}"
    value = {"mesh": mesh_of(module).record(), "bytes": total, "crossing": crossing, "collectives": [vars(one) for one in every]}
    if after:
        more, leaving = _total(after)
        summary += f"; in the update {size(more)}, {size(leaving)} to other nodes, in {plural(len(after), 'collective')}"
        value["update"] = {"bytes": more, "crossing": leaving, "collectives": [vars(one) for one in after]}
    return value, f"{_by_call([*every, *after])}\n\n{summary}"


def _describe_pipeline(plan: Pipeline, update: Module | None) -> tuple[dict[str, Any], str]:
    ends = {str(call.callee) for call, _ in plan.deliveries() if call}
    every = [*sent(plan.module), *handed_on(plan), *delivered(plan)]
    once = [one for one in every if one.func in ends]
    each = [one for one in every if one.func not in ends]
    (many, leaving), (total, crossing) = _total(each), _total(once)
    value: dict[str, Any] = {"mesh": mesh_of(plan.module).record(), "microbatches": plan.schedule.microbatches}
    value |= {"bytes": many + total, "crossing": leaving + crossing, "collectives": [vars(one) for one in every]}
    value |= {"microbatch": {"bytes": many, "crossing": leaving}, "end": {"bytes": total, "crossing": crossing}}
    summary = (
        f"one rank of each stage, together, send {size(many)} for a micro-batch, {size(leaving)} to other nodes, "
        f"and {size(total)} at the end of a step of {plan.schedule.microbatches}, {size(crossing)} to other nodes"
    )
    after = [*sent(update), *delivered(Pipeline(update, plan.schedule))] if update else []
    if after:
        value["update"] = {**dict(zip(("bytes", "crossing"), _total(after), strict=True)), "collectives": [vars(one) for one in after]}
        summary += "; in the update {}, {} to other nodes".format(*map(size, _total(after)))
    return value, f"{_by_call([*every, *after])}\n\n{summary}"


def _by_call(every: Sequence[Sent]) -> str:
    """A table of what is sent, by function, kind and axis."""
    calls: dict[tuple[str, str, str], list[Sent]] = {}
    for one in every:
        calls.setdefault((one.func, one.kind, one.axis), []).append(one)
    rows = []
    for (func, kind, axis), found in calls.items():
        times = len({one.weights for one in found})
        each = _total(found)
        rows.append((f"@{func}", kind, f"{axis}={found[0].ranks}", str(times), str(len(found)), *map(size, each), size(each[0] // times)))
    heads = ("function", "collective", "axis", "calls", "in all", "bytes", "leave the node", "per call")
    return table(heads, rows, left=3)


def _total(found: Sequence[Sent]) -> tuple[int, int]:
    return sum(one.bytes for one in found), sum(one.crossing for one in found)
