"""Whether the ranks of a pipeline come to the same collectives in the same order, found before anything runs.

The ranks of one stage run the same functions in the order of one row of the schedule, and so come to the same collectives by construction:
along dp, tp, ep and whatever else lies within a stage. Ranks of different stages run other functions at other times. What those do
together, along pp or the whole world, is in the order that the schedule and the stages make of it, and that may differ: then ranks wait for
each other for ever, or add up what does not belong together.

Here every place along pp runs its program (`pipeline.program`, what a rank runs as well) with nothing in it but what it asks of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from ..ir.core import Module, Trait
from ..ir.errors import DscError
from ..ir.mesh import Mesh, mesh_of
from ..ir.ops.collective import Collective
from ..ir.types import Bundle, Type, landed
from ..ir.walk import walk
from . import local
from .pipeline import Data, Pipeline, program
from .world import Gather, Program, Receive, ranks_text


@dataclass(frozen=True)
class Met:
    """A collective along an axis, as ranks know it, and where it stands."""

    axis: str
    signature: str
    site: str

    def __str__(self) -> str:
        return f"{self.signature} at {self.site}"


def check_order(plan: Pipeline) -> None:
    """`DscError` with the ranks and the first collective in which they differ, or with who waits for whom for ever."""
    mesh = mesh_of(plan.module)
    wide = {axis for axis in mesh.axes if len(_places(mesh, axis)) > 1}
    meets = {func.name: tuple(_meets(plan.module, func.name, wide)) for func in plan.module.funcs}
    if not any(meets.values()):
        return
    orders = [_order(plan, place, meets) for place in range(mesh.pp)]
    for axis in sorted(wide):
        _compare(mesh, axis, [[met for met in order if met.axis == axis] for order in orders])
    try:
        local.run(Mesh(pp=mesh.pp), lambda place: _asks(plan, place, meets))
    except DscError as error:
        raise DscError(f"{plan.schedule.name} and what stages do together do not fit; of the ranks along pp {error}") from None


def _places(mesh: Mesh, axis: str) -> list[int]:
    """Where the ranks of the first group along an axis stand along pp."""
    return list(dict.fromkeys(mesh.index("pp", rank) for rank in mesh.group(axis, 0)))


def _meets(module: Module, name: str, axes: set[str]) -> list[Met]:
    """The collectives along `axes` that a function comes to, in order: what is started is, where it begins."""
    found = []
    for _, func, op in walk(module, module[name]):
        if isinstance(op, Collective) and Trait.COLLECTIVE in op.traits and op.along()[0] in axes:
            found.append(Met(op.along()[0], op.signature, f"@{func.name} {op.id}"))
    return found


def _asks(plan: Pipeline, place: int, meets: Mapping[str, Sequence[Met]]) -> Program[Any]:
    """What the ranks at `place` ask of other stages, and nothing else."""

    def run(name: str, given: Sequence[Data]) -> Program[tuple[Data, ...]]:
        for met in meets[name]:
            yield Gather(met.axis, plan.schedule.ranks, np.zeros(()), op=met.signature, site=met.site)
        return tuple(_blank(value.type) for value in plan.module[name].results)

    inputs = tuple(_blank(param.type) for param in plan.module.main.params)
    return program(plan, place, run, lambda microbatch: inputs, _blank)


def _order(plan: Pipeline, place: int, meets: Mapping[str, Sequence[Met]]) -> list[Met]:
    """The collectives that the ranks at `place` come to."""
    asks, answer, found = _asks(plan, place, meets), None, list[Met]()
    while True:
        try:
            asked = asks.send(answer)
        except StopIteration:
            return found
        if isinstance(asked, Gather):
            found.append(Met(asked.axis, asked.op, asked.site))
        answer = asked.likes if isinstance(asked, Receive) else None


def _blank(type: Type) -> Data:
    there = landed(type)
    return tuple(map(_blank, there.fields)) if isinstance(there, Bundle) else np.zeros(())


def _compare(mesh: Mesh, axis: str, orders: Sequence[Sequence[Met]]) -> None:
    """Raise at the first difference, with all ranks of the group along `axis` that rank 0 is in."""
    for index, met in enumerate(zip_longest(*orders)):
        if len({one and one.signature for one in met}) == 1:
            continue
        rows: dict[str, list[int]] = {}
        for rank in mesh.group(axis, 0):
            rows.setdefault(str(met[mesh.index("pp", rank)] or "nothing more"), []).append(rank)
        named = {text: ranks_text(ranks) for text, ranks in rows.items()}
        width = max(map(len, named.values()))
        table = "\n".join(f"  {ranks:{width}}  {text}" for text, ranks in named.items())
        raise DscError(f"collective {index + 1} along {axis} is not the same on all ranks:\n{table}")
