"""Bundles that travel from one function to another through a third: where they come from, and how a change of them is carried on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.core import Func, Module, Op, Value
from ..ir.ops.control import Call, Pack, Unpack
from ..ir.types import Bundle, Type


@dataclass(frozen=True)
class Link:
    """A bundle that `source` packs as one of its results and `target` takes as one of its parameters."""

    source: str
    result: int
    target: str
    param: int


def links(module: Module) -> tuple[Link, ...]:
    """Every bundle that a caller hands from one function to the next, each once."""
    return tuple(dict.fromkeys(_links(module)))


def _links(module: Module) -> Iterator[Link]:
    for func in module.funcs:
        for call in func.ops:
            for index, value in enumerate(call.args if isinstance(call, Call) else ()):
                if isinstance(value.type, Bundle) and isinstance(value.owner, Call) and isinstance(call, Call):
                    yield Link(value.owner.callee, value.index, call.callee, index)


def packed(module: Module, link: Link) -> Pack | None:
    """The op that packs the bundle."""
    owner = module[link.source].results[link.result].owner
    return owner if isinstance(owner, Pack) else None


def unpacked(module: Module, link: Link) -> Unpack | None:
    """The op that unpacks it."""
    param = module[link.target].params[link.param]
    return next((op for op in module[link.target].ops if isinstance(op, Unpack) and op.x is param), None)


def retyped(module: Module) -> Module:
    """`module` with calls and parameters brought in line with what functions return now, and so on until nothing changes."""
    while True:
        results = {func.name: tuple(r.type for r in func.results) for func in module.funcs}
        after = module.map(lambda func: _retyped(func, results, func.params))  # noqa: B023 - it is called at once
        if after is module:  # calls give what is returned, so parameters may become what calls are given
            taken = {str(op.callee): op.args for func in module.funcs for op in func.ops if isinstance(op, Call)}
            after = module.map(lambda func: _retyped(func, results, taken.get(func.name, func.params)))  # noqa: B023
        if after is module:
            return module
        module = after


def _retyped(func: Func, results: Mapping[str, tuple[Type, ...]], given: Sequence[Value]) -> Func:
    values: dict[Value, Value] = {}
    for param, value in zip(func.params, given, strict=True):
        values[param] = param if param.type == value.type else Value(value.type, param.name)
    params = tuple(values[p] for p in func.params)
    ops: list[Op] = []
    for old in func.ops:
        op = old.with_operands(lambda v: values.get(v, v))
        if isinstance(op, Call) and tuple(r.type for r in op.results) != results[op.callee]:
            op = op.copy(result_types=results[op.callee])
        ops.append(op)
        values.update(zip(old.results, op.results, strict=True))
    if all(a is b for a, b in zip((*ops, *params), (*func.ops, *func.params), strict=True)):
        return func
    return replace(func, params=params, ops=tuple(ops), results=tuple(values.get(r, r) for r in func.results))
