"""Bundles that travel from one function to another through a third: where they come from, and how a change of them is carried on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.core import Func, Module, Op, Value, callees_first
from ..ir.ops.control import Call, Pack, Unpack
from ..ir.types import Bundle, Type
from .rewrite import Replacements


@dataclass(frozen=True)
class Link:
    """A bundle that `source` packs as one of its results and `target` takes as one of its parameters."""

    source: str
    result: int
    target: str
    param: int


def links(module: Module) -> tuple[Link, ...]:
    """Every bundle that a caller hands from one function to the next, each once: at once, or inside of other bundles, as stages do."""
    every = _Sources(module)
    calls = ((func, op) for func in module.funcs for op in func.ops if isinstance(op, Call))
    bundles = ((func, call, i, value) for func, call in calls for i, value in enumerate(call.args) if isinstance(value.type, Bundle))
    return tuple(dict.fromkeys(Link(*made, str(call.callee), i) for func, call, i, value in bundles for made in every(func, value)))


class _Sources:
    """Of a bundle, the results of functions that it is: followed through the callers of functions, and bundles that it lies in."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.known: dict[Value, tuple[tuple[str, int], ...]] = {}
        self.calls: defaultdict[str, list[tuple[Func, Call]]] = defaultdict(list)
        for func in module.funcs:
            for op in func.ops:
                if isinstance(op, Call):
                    self.calls[str(op.callee)].append((func, op))

    def __call__(self, func: Func, value: Value) -> tuple[tuple[str, int], ...]:
        if value not in self.known:
            self.known[value] = ()  # what a function is handed of its own results adds nothing
            self.known[value] = tuple(dict.fromkeys(self._found(func, value)))
        return self.known[value]

    def _found(self, func: Func, value: Value) -> Iterator[tuple[str, int]]:
        owner = value.owner
        if isinstance(owner, Call):
            yield str(owner.callee), value.index
        elif isinstance(owner, Unpack):
            for name, result in self(func, owner.x):
                pack = self.module[name].results[result].owner
                if isinstance(pack, Pack):
                    yield from self(self.module[name], pack.values[value.index])
        elif owner is None:
            for caller, call in self.calls[func.name]:
                yield from self(caller, call.args[func.params.index(value)])


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
            after = _given(module, results)
        if after is module:
            return module
        module = after


def _given(module: Module, results: Mapping[str, tuple[Type, ...]]) -> Module:
    """The parameters of each function as its callers have them, callers first: what these hand on depends on what they are given."""
    made, taken = {func.name: func for func in module.funcs}, dict[str, Sequence[Value]]()
    for func in reversed(callees_first(module)):
        made[func.name] = _retyped(func, results, taken.get(func.name, func.params))
        taken |= {str(op.callee): op.args for op in made[func.name].ops if isinstance(op, Call)}
    return module.map(lambda func: made[func.name])


def _retyped(func: Func, results: Mapping[str, tuple[Type, ...]], given: Sequence[Value]) -> Func:
    values = Replacements()
    for param, value in zip(func.params, given, strict=True):
        values[param] = param if param.type == value.type else Value(value.type, param.name)
    params = tuple(values[p] for p in func.params)
    ops: list[Op] = []
    for old in func.ops:
        op = old.with_operands(values.__getitem__)
        if isinstance(op, Call) and tuple(r.type for r in op.results) != results[op.callee]:
            op = op.copy(result_types=results[op.callee])
        ops.append(op)
        values.update(zip(old.results, op.results, strict=True))
    if all(a is b for a, b in zip((*ops, *params), (*func.ops, *func.params), strict=True)):
        return func
    return replace(func, params=params, ops=tuple(ops), results=tuple(values[r] for r in func.results))
