"""Functions made of parts of others. What a part needs from outside comes in one bundle; what can be had for nothing it computes itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..ir.core import Builder, Func, Op, Phase, Trait, Value
from ..ir.ops.control import Pack, Unpack
from ..ir.ops.elementwise import Cast


@dataclass(frozen=True)
class Packed:
    """Several values that a function takes or returns as one bundle."""

    name: str
    values: tuple[Value, ...]
    phase: Phase


def is_free(op: Op) -> bool:
    """Whether running `op` again costs no more than reading what it would otherwise have kept.

    Weights and constants are read again, views move nothing (though a `done` waits), and a cast to a dtype that is no narrower reads less
    than it makes.
    """
    viewed = Trait.VIEW in op.traits and Trait.COLLECTIVE not in op.traits
    return Trait.SOURCE in op.traits or viewed or (isinstance(op, Cast) and op.dtype.bits >= op.x.dtype.bits)


def needed(ops: Iterable[Op], results: Iterable[Value], given: Collection[Value], free: Callable[[Op], bool] = is_free) -> set[Value]:
    """The values from outside that `ops` and `results` read, but for those in `given` and what is free of them."""
    known, found = set(given), set[Value]()

    def visit(value: Value) -> None:
        if value in known:
            return
        known.add(value)
        if value.owner and free(value.owner):
            for operand in value.owner.operands:
                visit(operand)
        else:
            found.add(value)

    for op in ops:
        for operand in op.operands:
            visit(operand)
        known.update(op.results)
    for value in results:
        visit(value)
    return found


def outlined(
    name: str,
    inside: Packed,
    params: Sequence[Value],
    ops: Iterable[Op],
    results: Iterable[Value | Packed],
    phases: Mapping[Op, Phase],
) -> Func:
    """The function `name` of what is `inside` a bundle (no parameter, where nothing is) and of `params`, that runs `ops`.

    Free ops from outside are repeated right before their first reader, in its phase. An empty bundle among the results is left out.
    """
    b = Builder(name, component=name, phase=inside.phase)
    values: dict[Value, Value] = {}
    if inside.values:
        given = b.param(inside.name, Pack(inside.values).result.type)
        unpacked = b.emit(Unpack(given, names=tuple(v.name for v in inside.values)))
        values.update(zip(inside.values, unpacked.results, strict=True))
    values.update((p, b.param(p.name, p.type)) for p in params)

    def get(value: Value, phase: Phase) -> Value:
        if value not in values:
            assert value.owner, f"%{value.name} comes from nowhere"
            place(value.owner, phase)
        return values[value]

    def place(op: Op, phase: Phase) -> None:
        new = op.with_operands(lambda v: get(v, phase))
        new = new if new.phase is phase else new.copy(phase=phase)
        values.update(zip(op.results, b.emit(new).results, strict=True))

    for op in ops:
        place(op, phases[op])
    found = []
    for result in results:
        if isinstance(result, Value):
            found.append(get(result, inside.phase))
        elif result.values:
            b.phase = result.phase
            found.append(b.emit(Pack(tuple(get(v, result.phase) for v in result.values), names=(result.name,))).result)
    return b.finish(found)
