"""Which op of one program is which op of another: by id, and where the ids of the two count different ops, by kind and shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

from ..ir.core import Func, Module, Op
from ..ir.ops.fused import Fused
from ..ir.types import Tensor, landed


def align(a: Module, b: Module) -> Mapping[tuple[str, str], str]:
    """(function, id of an op in b) -> id of that op in a. Functions correspond by name.

    Passes keep ids, so ids decide between programs that were traced alike. But a program that was traced at another dtype has
    other casts, which shift the count within a component: there the ops are matched in order, by kind and by the shapes of their
    results.
    """
    found: dict[tuple[str, str], str] = {}
    for func in b.funcs:
        if func.name in a.by_name:
            mine, theirs = _components(a, a[func.name]), _components(b, func)
            for component, ops in theirs.items():
                found |= {(func.name, id_b): id_a for id_b, id_a in _pair(mine.get(component, []), ops).items()}
    return found


def _ops(module: Module, func: Func) -> Iterator[Op]:
    for op in func.ops:
        if isinstance(op, Fused):
            yield from module[op.callee].ops
        yield op


def _components(module: Module, func: Func) -> dict[str, list[Op]]:
    found: dict[str, list[Op]] = {}
    for op in _ops(module, func):
        found.setdefault(op.id.rpartition("#")[0], []).append(op)
    return found


def _pair(a: list[Op], b: list[Op]) -> dict[str, str]:
    """Ids in b -> ids in a, whichever way matches more."""
    known = {op.id: op for op in a}
    by_id = {op.id: op.id for op in b if op.id in known and _alike(known[op.id], op)}
    if len(by_id) == len(b):
        return by_id
    blocks = SequenceMatcher(None, [_kind(op) for op in a], [_kind(op) for op in b], autojunk=False).get_matching_blocks()
    by_kind = {b[at_b + i].id: a[at_a + i].id for at_a, at_b, length in blocks for i in range(length)}
    return by_kind if len(by_kind) > len(by_id) else by_id


def _alike(a: Op, b: Op) -> bool:
    """A dispatch may send codes and scales in one program and rows in the other."""
    return type(a) is type(b) or _shapes(a) == _shapes(b)


def _kind(op: Op) -> tuple[str, Any]:
    return op.name, _shapes(op)


def _shapes(op: Op) -> tuple[Any, ...]:
    there = (landed(r.type) for r in op.results)
    return tuple(type.shape if isinstance(type, Tensor) else len(type.fields) for type in there)
