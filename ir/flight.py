"""Collectives in flight: how `start` and `done` have to stand in a function, and in which order those of one axis end.

Each axis of the mesh is a stream: what its ranks do together they do in the order in which their program starts it, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

from .core import Func, Module, Op, Trait
from .ops.collective import Collective, Done, Transfer
from .ops.control import Call
from .printer import print_attribute
from .types import Async, Bundle, Type


def law(module: Module, func: Func) -> Iterator[tuple[Op | Func, str]]:
    """Every started collective is done once, all of it, in the same function, and nothing else reads what is on its way."""
    for what, values in (("takes", func.params), ("returns", func.results)):
        for value in values:
            if _on_its_way(value.type):
                yield func, f"@{func.name} {what} %{value.name}, which is on its way: a collective is done in the function that starts it"
    ended: dict[Op, Op] = {}
    for op in func.ops:
        if isinstance(op, Done):
            started = op.started
            if started is None or op.xs != started.results:
                expected = ", ".join(f"%{r.name}" for r in started.results) if started else "the results of a start"
                yield op, f"waits for {', '.join(f'%{x.name}' for x in op.xs)}, expected all of one start, in order: {expected}"
            elif ended.setdefault(started, op) is not op:
                yield op, f"waits for {started.id}, which {ended[started].id} has waited for"
            continue
        for value in op.operands:
            if isinstance(value.type, Async):
                yield op, f"reads %{value.name}, which is on its way: only a done can"
    for op in func.ops:
        if isinstance(op, Transfer) and op.start and op not in ended:
            yield op, f"{op.name} is started and never done"


def _on_its_way(type: Type) -> bool:
    return any(map(_on_its_way, type.fields)) if isinstance(type, Bundle) else isinstance(type, Async)


def in_order(module: Module, func: Func) -> Iterator[tuple[Op | Func, str]]:
    """Along each axis collectives end in the order in which they began; one that is not started begins and ends where it stands."""
    flying: dict[str, list[Op]] = {}
    for op in func.ops:
        if isinstance(op, Done) and op.started is not None:
            axis = axis_of(op.started)
            line = flying.get(axis, [])
            if op.started in line:
                if line[0] is not op.started:
                    yield op, f"ends {op.started.id} before {line[0].id}, which began earlier along {axis}"
                line.remove(op.started)
        elif isinstance(op, Call) or (Trait.COLLECTIVE in op.traits and not isinstance(op, Done)):
            if isinstance(op, Transfer) and op.start:
                flying.setdefault(axis_of(op), []).append(op)
                continue
            for axis in sorted(axes(module, op)):
                if flying.get(axis):
                    yield op, f"communicates along {axis} while {flying[axis][0].id} is in flight there"


def axis_of(op: Op) -> str:
    """The axis whose stream a collective is on."""
    assert isinstance(op, Collective)
    return op.along()[0]


def axes(module: Module, op: Op) -> frozenset[str]:
    """The axes along which `op` communicates, what it calls included; empty where a function that it calls is missing."""
    if isinstance(op, Call):
        callee = module.by_name.get(op.callee)
        return frozenset().union(*(axes(module, inner) for inner in callee.ops)) if callee else frozenset()
    return frozenset({axis_of(op)}) if isinstance(op, Collective) and Trait.COLLECTIVE in op.traits else frozenset()


def differences(before: Func, after: Func) -> Iterator[str]:
    """What makes `after` more than another order of `before`: ops that are missing, added or changed, and dependences that are broken.

    A collective that is started and done is the one of the id of its `done`.
    """
    old, new = _described(before), _described(after)
    for id in dict.fromkeys((*old, *new)):
        if id not in new:
            yield f"{id} is missing"
        elif id not in old:
            yield f"{id} is new"
        elif old[id] != new[id]:
            yield f"{id} was {old[id]}, and is {new[id]}"


def _described(func: Func) -> dict[str, str]:
    """Each op by its id, and the function's results, with the ids of what they read."""
    known = {p: f"%{i}" for i, p in enumerate(func.params)}
    found: dict[str, str] = {}
    for op in func.ops:
        if isinstance(op, Transfer) and op.start:
            continue
        what = op.started if isinstance(op, Done) and op.started is not None else op
        given = (f"{key}={print_attribute(value)}" for key, value in what.attributes.items() if key not in ("start", "result_types"))
        types = (str(r.type) for r in op.results)
        found[op.id] = (
            f"{what.name}({', '.join([*(known.get(v, '?') for v in what.operands), *given])}) {op.phase.name} -> {', '.join(types)}"
        )
        known.update((r, f"{op.id}/{i}") for i, r in enumerate(op.results))
    return found | {"return": ", ".join(known.get(v, "?") for v in func.results)}
