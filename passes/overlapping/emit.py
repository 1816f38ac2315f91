"""An order of tasks as a function: collectives started where the order has them and done before their first reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...ir.core import Func, Module, Op, Value
from ...ir.flight import axes
from ...ir.ops.collective import Done, Transfer
from ...ir.ops.control import Call
from ..rewrite import Replacements, fresh
from .tasks import Task


def emit(module: Module, func: Func, tasks: Sequence[Task], order: Sequence[int]) -> Func:
    """`func` with its tasks in this order. What takes no time stands before its first reader; ids of starts are new, dones keep those of
    their collectives. A collective beside which nothing would run is one op, as before.
    """
    return _Emitter(module, func, frozenset(func.ops) - {task.op for task in tasks}).func(tasks, order)


@dataclass
class _Emitter:
    module: Module
    old: Func
    free: frozenset[Op]
    """Those that stand before their first reader, wherever that is."""
    ops: list[Op] = field(default_factory=list)
    new: Replacements = field(default_factory=Replacements)
    emitted: set[Op] = field(default_factory=set)
    flying: dict[str, list[tuple[Transfer, Transfer]]] = field(default_factory=dict)
    """By axis what was started and is not done, each as it was and as it is."""
    taken: set[str] = field(default_factory=set)
    unhurried: set[Op] = field(default_factory=set)
    """The free ones as they are emitted."""

    def func(self, tasks: Sequence[Task], order: Sequence[int]) -> Func:
        self.taken = {op.id for op in self.old.ops}
        for i in order:
            self.task(tasks[i].op)
        for line in list(self.flying.values()):
            while line:
                self.land(line[0][0])
        for op in self.old.ops:
            if op not in self.emitted:
                self.append(op)
        results = tuple(self.new[v] for v in self.old.results)
        return Func(self.old.name, self.old.params, tuple(self.ops), results, self.old.updates)

    def task(self, op: Op) -> None:
        for operand in op.operands:
            self.ready(operand)
        if isinstance(op, Transfer):
            started = op.copy(start=True, id=fresh(op.id, self.taken)).with_operands(self.new.__getitem__)
            self.emitted.add(op)
            self.ops.append(started)
            self.flying.setdefault(op.along()[0], []).append((op, started))
            return
        if isinstance(op, Call):
            for axis in sorted(axes(self.module, op)):
                while line := self.flying.get(axis):
                    self.land(line[0][0])
        self.append(op)

    def ready(self, value: Value) -> None:
        """See to it that `value` is there: what is free is emitted, what flies is done."""
        owner = value.owner
        if owner is None:
            return
        if isinstance(owner, Transfer) and value not in self.new:
            self.land(owner)
        elif owner not in self.emitted and owner in self.free:
            for operand in owner.operands:
                self.ready(operand)
            self.append(owner)

    def append(self, op: Op) -> None:
        made = self.new.moved(op)
        self.emitted.add(op)
        self.ops.append(made)
        if op in self.free:
            self.unhurried.add(made)

    def land(self, op: Transfer) -> None:
        """Wait for a collective, and before it for those started earlier along its axis."""
        line = self.flying[op.along()[0]]
        while line:
            old, started = line.pop(0)
            self.done(old, started)
            if old is op:
                return

    def done(self, old: Transfer, started: Transfer) -> None:
        at = self.ops.index(started)
        if not self.flying[old.along()[0]] and all(op in self.unhurried for op in self.ops[at + 1 :]):
            del self.ops[at]
            made: Op = old.with_operands(self.new.__getitem__)
        else:
            made = Done(started.results, id=old.id, phase=old.phase, names=tuple(r.name for r in old.results))
        self.ops.append(made)
        self.new.update(zip(old.results, made.results, strict=True))
