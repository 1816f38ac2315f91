"""What a rank of a mesh sends: every collective that runs, its bytes by kind and axis, and how many of them leave the node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..ir.core import Module
from ..ir.errors import require
from ..ir.mesh import ATTRIBUTE, Mesh, mesh_of
from ..ir.ops.collective import AllGather, AllReduce, AllToAll, AllToAllRows, Collective, OwnPart, ReduceScatter
from ..ir.types import Tensor, bound
from ..ir.walk import walk
from .ui import plural, size, table


@dataclass(frozen=True)
class Sent:
    """One collective of a step. Bytes are what a rank hands over, its own part included where rows are exchanged by expert, on average."""

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
    """Every collective, in the order in which a rank runs them. `DscError` where the program was not sharded."""
    require(ATTRIBUTE in module.attributes, "the program runs on one rank and sends nothing: compile it with --mesh")
    mesh = mesh_of(module)
    for prefix, func, op in walk(module):
        if isinstance(op, Collective) and not isinstance(op, OwnPart):
            axis, ranks = op.along()
            number = volume(op)
            yield Sent(func.name, prefix, op.id, op.phase.name, op.name, axis, ranks, int(number), int(number * _leaving(mesh, axis, op)))


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


def describe_comm(module: Module, update: Module | None = None) -> tuple[dict[str, Any], str]:
    """What a rank sends in a step and in the `update` after it, as JSON with every collective, and as text by function and call."""
    every = list(sent(module))
    after = list(sent(update)) if update and ATTRIBUTE in update.attributes else []
    calls: dict[tuple[str, str, str], list[Sent]] = {}
    for one in (*every, *after):
        calls.setdefault((one.func, one.kind, one.axis), []).append(one)
    rows = []
    for (func, kind, axis), found in calls.items():
        times = len({one.weights for one in found})
        each = _total(found)
        rows.append((f"@{func}", kind, f"{axis}={found[0].ranks}", str(times), str(len(found)), *map(size, each), size(each[0] // times)))
    heads = ("function", "collective", "axis", "calls", "in all", "bytes", "leave the node", "per call")
    total, crossing = _total(every)
    summary = f"a rank sends {size(total)} in a step, {size(crossing)} to other nodes, in {plural(len(every), 'collective')}"
    value = {"mesh": mesh_of(module).record(), "bytes": total, "crossing": crossing, "collectives": [vars(one) for one in every]}
    if after:
        more, leaving = _total(after)
        summary += f"; in the update {size(more)}, {size(leaving)} to other nodes, in {plural(len(after), 'collective')}"
        value["update"] = {"bytes": more, "crossing": leaving, "collectives": [vars(one) for one in after]}
    return value, f"{table(heads, rows, left=3)}\n\n{summary}"


def _total(found: Sequence[Sent]) -> tuple[int, int]:
    return sum(one.bytes for one in found), sum(one.crossing for one in found)
