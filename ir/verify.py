"""The laws of the IR. `verify` runs after every pass and reports everything that is wrong at once.

Laws of every stage:

1. Function names are unique names, and no function calls itself, directly or through others.
2. A value is defined once, before its first use, in the function that uses it.
3. An op's id is `component#n`, `component#n.k`, ... and unique in its function.
4. The types of an op's results are what its type rule infers.
5. A call names a function of the module, and its operands and results have the types of that function.
6. A collective that is started is done once, all of its results together, in the same function; nothing else reads what is on its way.
7. An update gives a parameter a result of the same type; no parameter and no result takes part in two.
8. Main of a program that is cut into stages calls their functions once each, and each takes from its neighbours alone (`ir/stages.py`).

A stage adds laws of its own (`STAGES`). Laws of a stage that a pipeline skips do not apply.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import flight, gradients, stages
from .core import Func, Module, Op, Phase, Value, called
from .diagnostics import Diagnostic, IRError
from .errors import DscError
from .mesh import mesh_of
from .ops.collective import Collective
from .ops.control import Call
from .ops.internode import exchanges_of
from .printer import print_op

Places = Mapping[Any, tuple[int, int]]
Found = Iterator[tuple[Op | Func, str]]
Law = Callable[[Module, Func], Found]

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
ID = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*#[0-9]+(\.[0-9]+)*")


def verify(module: Module) -> Module:
    """`module` itself, if it keeps every law of its stage. Raises `IRError` with all that it breaks."""
    if faults := check(module):
        raise IRError(faults)
    return module


def check(module: Module, places: Places | None = None) -> list[Diagnostic]:
    """Every broken law. `places` says where in a text an op or a function stands."""
    faults = []
    for func in module.funcs:
        for law in (*LAWS, *STAGES.get(module.stage, ())):
            for what, message in law(module, func):
                line, column = (places or {}).get(what, (0, 0))
                at = "" if line else f"@{func.name}: " + (f"{print_op(what)}: " if isinstance(what, Op) else "")
                faults.append(Diagnostic(line, column, at + message))
    return faults


def _names(module: Module, func: Func) -> Found:
    if not NAME.fullmatch(func.name):
        yield func, f"the name of a function is letters, digits and _, found @{func.name}"
    if next(other for other in module.funcs if other.name == func.name) is not func:
        yield func, f"function @{func.name} is defined twice"
    path = _cycle(module, func.name, ())
    if path:
        yield func, f"@{func.name} calls itself: {' -> '.join('@' + name for name in path)}"


def _cycle(module: Module, name: str, path: tuple[str, ...]) -> tuple[str, ...]:
    if name in path:
        return (*path, name) if name == path[0] else ()
    if name not in module.by_name:
        return ()
    for callee in dict.fromkeys(called(module, module.by_name[name])):
        if found := _cycle(module, callee, (*path, name)):
            return found
    return ()


def _definitions(module: Module, func: Func) -> Found:
    defined: set[Value] = set(func.params)
    if len(defined) != len(func.params):
        yield func, f"@{func.name} has the same parameter twice"
    for op in func.ops:
        for value in op.operands:
            if value not in defined:
                yield op, f"%{value.name} is used before it is defined"
        if not defined.isdisjoint(op.results):
            yield op, "stands twice in the function"
        defined.update(op.results)
    for value in func.results:
        if value not in defined:
            yield func, f"@{func.name} returns %{value.name}, which it does not define"


def _ids(module: Module, func: Func) -> Found:
    seen: dict[str, Op] = {}
    for op in func.ops:
        if op.id and not ID.fullmatch(op.id):
            yield op, f"an id is component#n, found {op.id}"
        if op.id and seen.setdefault(op.id, op) is not op:
            yield op, f"id {op.id} is taken by another op of @{func.name}"


def _types(module: Module, func: Func) -> Found:
    for op in func.ops:
        try:
            inferred = op.infer()
        except DscError as error:
            yield op, f"{op.name}: {error}"
            continue
        stated = tuple(r.type for r in op.results)
        if inferred != stated:
            yield op, f"has the types {', '.join(map(str, stated))}, but its rule gives {', '.join(map(str, inferred))}"


def _calls(module: Module, func: Func) -> Found:
    for op in func.ops:
        if not isinstance(op, Call):
            continue
        callee = module.by_name.get(op.callee)
        if callee is None:
            yield op, f"call: no function @{op.callee}; the module has {', '.join('@' + name for name in module.by_name)}"
            continue
        for what, given, expected in (("arguments", op.args, callee.params), ("results", op.results, callee.results)):
            found, wanted = ([str(v.type) for v in values] for values in (given, expected))
            if found != wanted:
                yield op, f"call: @{op.callee} has {what} ({', '.join(wanted)}), found ({', '.join(found)})"


def _updates(module: Module, func: Func) -> Found:
    if len(set(func.updates.values())) != len(func.updates):
        yield func, "two parameters are updated by the same result"
    for param, result in func.updates.items():
        if not (0 <= param < len(func.params) and 0 <= result < len(func.results)):
            counts = f"{len(func.params)} parameters and {len(func.results)} results, counted from 0"
            yield func, f"@{func.name} updates parameter {param} with result {result}, but has {counts}"
        elif func.params[param].type != func.results[result].type:
            found, expected = func.results[result].type, func.params[param].type
            yield func, f"%{func.params[param].name} is {expected}, but its update, result {result}, is {found}"


def _forward_only(module: Module, func: Func) -> Found:
    for op in func.ops:
        if op.phase is not Phase.F:
            yield op, f"is in phase {op.phase.name}, but nothing has been differentiated at stage {module.stage}"


def _nothing_recomputed(module: Module, func: Func) -> Found:
    for op in func.ops:
        if op.phase is Phase.R:
            yield op, f"is in phase R, but nothing is recomputed at stage {module.stage}"


def _collectives(module: Module, func: Func) -> Found:
    for op in func.ops:
        if isinstance(op, Collective):
            for axis, size in dict.fromkeys((op.along(), *(inner.along() for inner in exchanges_of(op)))):
                try:
                    ranks = mesh_of(module).size(axis)
                except DscError as error:
                    yield op, f"{op.name}: {error}"
                    continue
                if size != ranks:
                    yield op, f"{op.name}: size is {size}, but the mesh {mesh_of(module)} has {ranks} ranks along {axis}"


LAWS: tuple[Law, ...] = (_names, _definitions, _ids, _types, _calls, flight.law, _updates, stages.law)

STAGES: dict[str, tuple[Law, ...]] = {
    "traced": (_forward_only,),
    "differentiated": (_nothing_recomputed, gradients.law),
    "quantized": (gradients.law,),
    "sharded": (_collectives, gradients.law),
    "rematerialized": (_collectives, gradients.law),
    "scheduled": (_collectives, gradients.law, flight.in_order),
    "lowered": (_collectives, gradients.law, flight.in_order),
}
"""The stages in their order, each with the laws that it adds."""


def stage_index(stage: str) -> int:
    """Where `stage` stands among the stages."""
    return list(STAGES).index(stage)
