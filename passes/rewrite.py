"""What rewriting passes share: the skeleton that walks a function and lets a rule replace ops, values that stand for others, new names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

from ..ir.core import Builder, Func, Op, OpT, Value
from ..ir.errors import require

Rule = Callable[[Op, Builder], Sequence[Value] | None]
"""What to put in place of an op whose operands are already replaced: a value for each of its results, or None to keep it.

New ops are emitted into the builder. They are given no id yet: the name that an op will bear depends on what replaces what.
"""


class Replacements(dict[Value, Value]):
    """What stands for which value; one that is not named stands for itself."""

    def __missing__(self, value: Value) -> Value:
        return value

    def moved(self, op: OpT) -> OpT:
        """`op` over what stands for its operands. Its results stand for those of `op` from then on."""
        made = op.with_operands(self.__getitem__)
        if made is not op:
            self.update(zip(op.results, made.results, strict=True))
        return made


def fresh(name: str, taken: set[str], mark: str = ".") -> str:
    """`name.1`, or the first `name.n` that is not taken yet; it is taken then."""
    found = next(each for n in count(1) if (each := f"{name}{mark}{n}") not in taken)
    taken.add(found)
    return found


def unused(name: str, taken: set[str]) -> str:
    """`name`, or the first `name_n` where it is taken; it is taken then."""
    if name in taken:
        return fresh(name, taken, "_")
    taken.add(name)
    return name


class _Body(Builder):
    """A builder whose ops wait for their ids."""

    def emit(self, op: OpT) -> OpT:
        self.ops.append(op)
        return op


def rebuild(func: Func, rule: Rule) -> Func:
    """`func` with `rule` applied to each op; `func` itself where it replaces nothing. Ops that do not change are shared.

    Of the ops put in place of `mlp#3` the one that yields its first result is `mlp#3` from then on, and the others are
    `mlp#3.1`, `mlp#3.2`, ... in order, past ids already taken; ops that bring an id of their own keep it. All inherit the
    phase, and the replacing values the names of the replaced. A value of another type raises `DscError`.
    """
    body, new = _Body(func.name), Replacements()
    taken = {op.id for op in func.ops}
    for old in func.ops:
        op = old.with_operands(new.__getitem__)
        start = len(body.ops)
        values = rule(op, body)
        if values is None:
            body.ops.append(op)
            values = op.results
        else:
            inherit(old, values, body.ops[start:], taken)
        for was, now in zip(old.results, values, strict=True):
            require(was.type == now.type, f"{old.name} {old.id}: %{was.name} is {was.type}, but its replacement is {now.type}")
            if now is not was:
                new[was] = now
    if not new:
        return func
    return Func(func.name, func.params, tuple(body.ops), tuple(new[v] for v in func.results), func.updates)


def inherit(old: Op, values: Sequence[Value], made: Sequence[Op], taken: set[str]) -> None:
    """Give ids, phase and names to the ops `made` in place of `old`. They have entered no function yet, so they may be written."""
    heir, count = (values[0].owner if values else None), 0
    for op in (op for op in made if not op.id):
        id = old.id
        while id and op is not heir and id in taken:
            count += 1
            id = f"{old.id}.{count}"
        taken.add(id)
        object.__setattr__(op, "id", id)
        object.__setattr__(op, "phase", old.phase)
    for was, now in zip(old.results, values, strict=True):
        if now.owner and now.owner in made and not now.owner.names:
            now.name = was.name
