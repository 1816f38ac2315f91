"""Calls of layers as one function, so that what they do can be mixed; equal groups of calls are one function, called several times."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ...ir.core import Func, Module, Op, Symbol, Trait, Value
from ...ir.ops.control import Call, Pack, Param, Unpack
from ...ir.ops.fused import Fused
from ...ir.walk import numbered
from ..rewrite import Replacements, unused


@dataclass(frozen=True)
class Member:
    """A call that becomes part of a group, under a tag that its ids begin with."""

    call: Call
    tag: str


@dataclass
class Groups:
    """Makes functions of groups of calls of a module, one for all equal groups."""

    module: Module
    made: dict[tuple[object, ...], Func] = field(default_factory=dict)
    parts: dict[str, Mapping[Op, str]] = field(default_factory=dict)
    """Of each function made, the tag of the call that each op comes from."""

    @property
    def funcs(self) -> tuple[Func, ...]:
        """What was made."""
        return tuple(self.made.values())

    def add(self, func: Func) -> Func:
        """A further function of the module; the one of this name, if there is one."""
        if func.name not in self.module.by_name:
            self.module = self.module.replace(funcs=(*self.module.funcs, func))
        return self.module[func.name]

    def call(self, members: Sequence[Member], read: Collection[Value], id: str) -> tuple[Call, tuple[Value, ...]]:
        """One call in place of several, and the values that its results stand for: those of `read` that the members make.

        Members stand in the order in which they may run; each may read what those before it make.
        """
        inside = {r for member in members for r in member.call.results}
        args = tuple(dict.fromkeys(v for member in members for v in member.call.args if v not in inside))
        returned = tuple(r for member in members for r in member.call.results if r in read)
        prefixes = tuple(dict.fromkeys(member.call.weights for member in members))
        key = self._key(members, args, returned, prefixes)
        if key not in self.made:
            func = _Opened(self, members, args, returned, prefixes, self._name(members)).func()
            self.made[key] = func
        func = self.made[key]
        call = Call(
            Symbol(func.name),
            args,
            tuple(r.type for r in returned),
            weights=";".join(prefixes) if any(prefixes) else "",
            id=id,
            phase=members[0].call.phase,
            names=tuple(r.name for r in returned),
        )
        return call, returned

    def _key(
        self, members: Sequence[Member], args: Sequence[Value], returned: Sequence[Value], prefixes: Sequence[str]
    ) -> tuple[object, ...]:
        number: dict[Value, int] = {v: i for i, v in enumerate(args)}
        for member in members:
            number.update((r, len(number) + i) for i, r in enumerate(member.call.results))
        calls = tuple((str(m.call.callee), m.tag, prefixes.index(m.call.weights), tuple(number[v] for v in m.call.args)) for m in members)
        return calls, tuple(number[v] for v in returned)

    def _name(self, members: Sequence[Member]) -> str:
        stem = f"{members[0].call.callee}_overlapped"
        taken = {f.name for f in (*self.module.funcs, *self.made.values())}
        return unused(stem, taken)


@dataclass
class _Opened:
    """The body of a group."""

    groups: Groups
    members: Sequence[Member]
    args: Sequence[Value]
    returned: Sequence[Value]
    prefixes: Sequence[str]
    name: str
    ops: list[Op] = field(default_factory=list)
    sources: dict[object, Op] = field(default_factory=dict)
    tags: dict[Op, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def func(self) -> Func:
        params = tuple(Value(v.type, v.name) for v in self.args)
        outer: dict[Value, Value] = dict(zip(self.args, params, strict=True))
        for member in self.members:
            number = self.prefixes.index(member.call.weights)
            prefix = f"{number}:" if len(self.prefixes) > 1 else ""
            callee = self.groups.module[member.call.callee]
            results = self.body(callee, [outer[v] for v in member.call.args], prefix, member.tag, member.tag)
            outer.update(zip(member.call.results, results, strict=True))
        returned = tuple(outer[v] for v in self.returned)
        func = Func(self.name, params, tuple(without_idle_packs(self.ops, returned)), returned)
        self.groups.parts[func.name] = self.tags
        return func

    def body(self, func: Func, args: Sequence[Value], prefix: str, tag: str, place: str) -> list[Value]:
        """The ops of a function, calls opened. A weight that several read is read once."""
        new: dict[Value, Value] = dict(zip(func.params, args, strict=True))
        for index, old in enumerate(func.ops):
            if isinstance(old, Call) and not isinstance(old, Fused):
                within = numbered(prefix, old.weights)
                inner = self.groups.module[old.callee]
                results = self.body(inner, [new[v] for v in old.args], within, tag, f"{place}.c{index}")
                new.update(zip(old.results, results, strict=True))
                continue
            if (values := opened(old, new)) is not None:
                new.update(zip(old.results, values, strict=True))
                continue
            op = old.with_operands(new.__getitem__)
            changes = {"path": numbered(prefix, op.path)} if isinstance(op, Param) else {}
            op = op.copy(**changes, id=self.unique(f"{place}.{op.id}"))
            if Trait.SOURCE in op.traits:
                key = (op.name, repr(op.attributes), tuple(r.type for r in op.results), op.phase)
                known = self.sources.setdefault(key, op)
                if known is not op:
                    new.update(zip(old.results, known.results, strict=True))
                    continue
            self.taken.add(op.id)
            self.ops.append(op)
            self.tags[op] = tag
            new.update(zip(old.results, op.results, strict=True))
        return [new[v] for v in func.results]

    def unique(self, id: str) -> str:
        number, found = 0, id
        while found in self.taken:
            number += 1
            found = f"{id}.{number}"
        return found


def opened(op: Op, new: Mapping[Value, Value]) -> Sequence[Value] | None:
    """The values of a bundle that `op` unpacks, where it is packed beside it: who reads one need not wait for the others."""
    owner = new[op.x].owner if isinstance(op, Unpack) else None
    return owner.values if isinstance(owner, Pack) else None


def without_idle_packs(ops: Sequence[Op], results: Sequence[Value]) -> list[Op]:
    """Without bundles that nobody takes any more."""
    read = {v for op in ops for v in op.operands} | set(results)
    return [op for op in ops if not isinstance(op, Pack) or op.result in read]


def halves(func: Func, last_of_first: Collection[Op]) -> tuple[Func, Func, tuple[Value, ...]]:
    """A function in two, and the values that the first half hands to the second: the first does `last_of_first` and what those need.

    The first takes the parameters that it reads; the second those that it reads, and then what it is handed.
    """
    needed: set[Op] = set()

    def need(op: Op) -> None:
        if op not in needed:
            needed.add(op)
            for value in op.operands:
                if value.owner is not None:
                    need(value.owner)

    for op in last_of_first:
        need(op)
    first = [op for op in func.ops if op in needed]
    second = [op for op in func.ops if op not in needed]
    again = [op for op in first if Trait.SOURCE in op.traits]  # a weight is not handed on: it is read again
    made = {r for op in first for r in op.results}
    read = {v for op in second for v in op.operands} | set(func.results)
    own = [op for op in again if any(r in read for r in op.results)]
    handed = tuple(v for op in first if op not in again for v in op.results if v in read)
    copies = [op.copy() for op in own]
    new = Replacements((r, c) for op, copy in zip(own, copies, strict=True) for r, c in zip(op.results, copy.results, strict=True))
    assert made.issuperset(handed)
    used = {v for op in first for v in op.operands}
    before = tuple(p for p in func.params if p in used)
    rest = tuple(p for p in func.params if p in read)
    new |= {v: Value(v.type, v.name) for v in (*rest, *handed)}
    params = tuple(new[v] for v in (*rest, *handed))
    body = (*copies, *map(new.moved, second))
    head = Func(f"{func.name}_first", before, tuple(first), handed)
    tail = Func(f"{func.name}_second", params, body, tuple(new[v] for v in func.results))
    return head, tail, handed
