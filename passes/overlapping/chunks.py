"""Two chunks of work as one: a forward and a backward pass of different micro-batches, or two micro-batches of inference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...ir.core import Func, Module, Op, Phase, Symbol, Value, called
from ...ir.ops.collective import Collective, RowExchange
from ...ir.ops.control import Call
from ...ir.ops.moe import Dispatch
from ...ir.walk import communicating
from ..rewrite import Replacements
from .components import PRODUCTS
from .merge import Groups, Member, halves, opened, without_idle_packs

FORWARD, BACKWARD = "fwd", "bwd"
FIRST, SECOND = "mb0", "mb1"
"""What the ids of the ops of either chunk begin with."""

NOTHING: Mapping[int, int] = {}
Split = Callable[[Call], "tuple[Call, Call] | None"]


def together(groups: Groups, name: str, forward: Func, backward: Sequence[Func], handed: Mapping[int, int] = NOTHING) -> Func:
    """A forward chunk and a backward chunk as one function.

    `backward` is one function, or the parts for inputs and for weights, of which the second takes what `handed` says of the first: its
    parameter -> the first one's result. The function takes what `forward` takes and then what else those of `backward` do, and returns what
    `forward` returns and then what each of those does. Calls of layers are grouped one with one, in their order, together with the calls
    for gradients of weights that read nothing but what theirs makes.
    """
    names = exchanging(groups.module)
    params = [Value(p.type, p.name) for p in forward.params]
    mine, results = copied(forward, params, FORWARD)
    others: list[Op] = []
    made: list[Value] = []
    for i, func in enumerate(backward):
        given = [made[handed[at]] if i and at in handed else Value(p.type, p.name) for at, p in enumerate(func.params)]
        params += [v for v in given if v not in made]
        ops, made = copied(func, given, BACKWARD)
        others += ops
        results += made
    body = _Body(groups, [*mine, *others], results)
    for x, y in zip(_calls(mine, names), _calls(others, names), strict=False):
        gradients = [op for op in others if isinstance(op, Call) and gradients_of(op, y)]
        body.group([Member(x, FORWARD), *(Member(call, BACKWARD) for call in (y, *gradients))])
    return body.func(name, params)


def beside(groups: Groups, forward: Call, backward: Sequence[Call]) -> tuple[Func, Mapping[Op, bool]]:
    """The function that `together` makes of one layer forward and one backward, and which of its ops are of the latter."""
    calls = (forward, *backward)
    members = [Member(call, FORWARD if call is forward else BACKWARD) for call in calls]
    made, _ = groups.call(members, {r for call in calls for r in call.results}, forward.id)
    func = next(func for func in groups.funcs if func.name == made.callee)
    return func, {op: groups.parts[func.name][op] == BACKWARD for op in func.ops}


def interleaved(groups: Groups) -> Func:
    """Main for two micro-batches: it takes and returns what main does, of the one and then of the other.

    The second runs half a layer behind: while one computes attention the other exchanges rows.
    """
    main, names = groups.module.main, exchanging(groups.module)
    cut: dict[Call, Call] = {}

    def split(call: Call) -> tuple[Call, Call] | None:
        found = _halved(groups, call) if call.callee in names else None
        if found is not None:
            cut[found[0]] = found[1]
        return found

    params: list[Value] = []
    results: list[Value] = []
    chunks: list[list[Op]] = []
    for tag in (FIRST, SECOND):
        own = [Value(p.type, f"{p.name}_{tag}") for p in main.params]
        ops, found = copied(main, own, tag, split if tag == SECOND else None)
        for value in found:
            value.name = f"{value.name}_{tag}"
        params += own
        results += found
        chunks.append(ops)
    body = _Body(groups, [*chunks[0], *chunks[1]], results)
    behind: list[Call] = []
    ahead = (call for call in chunks[1] if isinstance(call, Call) and (call in cut or call.callee in names))
    for x in _calls(chunks[0], names):
        y = next(ahead)
        late = [*behind, y] if y in cut and all(_directly(y, call) for call in behind) else behind
        body.group([Member(x, FIRST), *(Member(call, SECOND) for call in late)])
        behind = [cut[y]] if y in cut else []
    count = len(main.params), len(main.results)
    updates = dict(main.updates) | {p + count[0]: r + count[1] for p, r in main.updates.items()}
    return body.func(main.name, params, updates)


def copied(func: Func, args: Sequence[Value], tag: str, split: Split | None = None) -> tuple[list[Op], list[Value]]:
    """The ops of a function on other arguments, under ids that begin with `tag`, and its results. `split` makes two calls of one."""
    new: dict[Value, Value] = dict(zip(func.params, args, strict=True))
    ops: list[Op] = []
    for old in func.ops:
        if (values := opened(old, new)) is not None:
            new.update(zip(old.results, values, strict=True))
            continue
        op = old.with_operands(new.__getitem__).copy(id=f"{tag}.{old.id}")
        parts = split(op) if split is not None and isinstance(op, Call) else None
        ops += parts or (op,)
        new.update(zip(old.results, ops[-1].results, strict=True))
    return ops, [new[v] for v in func.results]


@dataclass
class _Body:
    """Ops in order, of which some calls become one."""

    groups: Groups
    old: list[Op]
    results: Sequence[Value]
    ops: list[Op] = field(default_factory=list)
    new: Replacements = field(default_factory=Replacements)
    emitted: set[Op] = field(default_factory=set)

    def group(self, members: Sequence[Member]) -> None:
        """One call in place of several, after all that they need."""
        calls = [member.call for member in members]
        if len(calls) == 1:
            self.need(calls[0])
            return
        for call in calls:
            for value in call.operands:
                if value.owner is not None and value.owner not in calls:
                    self.need(value.owner)
        outside = {v for op in self.old if op not in calls for v in op.operands} | set(self.results)
        mapped = []
        inner: dict[Value, Value] = {}
        for member in members:
            call = member.call.with_operands(lambda v: inner.get(v, self.new[v]))
            inner.update(zip(member.call.results, call.results, strict=True))
            mapped.append(Member(call, member.tag))
        read = {inner[r] for call in calls for r in call.results if r in outside}
        made, returned = self.groups.call(mapped, read, calls[0].id)
        self.ops.append(made)
        at = dict(zip(returned, made.results, strict=True))
        self.new.update((old, at[now]) for old, now in inner.items() if now in at)
        self.emitted.update(calls)

    def need(self, op: Op) -> None:
        """Emit `op`, after what it needs."""
        waiting = [op]
        while waiting:
            one = waiting[-1]
            missing = [v.owner for v in one.operands if v.owner is not None and v.owner not in self.emitted]
            if missing and one not in self.emitted:
                waiting += missing
                continue
            waiting.pop()
            if one not in self.emitted:
                self.emitted.add(one)
                self.ops.append(self.new.moved(one))

    def func(self, name: str, params: Sequence[Value], updates: dict[int, int] | None = None) -> Func:
        """The function, with the rest of the ops."""
        for op in self.old:
            self.need(op)
        results = tuple(self.new[v] for v in self.results)
        return Func(name, tuple(params), tuple(without_idle_packs(self.ops, results)), results, updates or {})


def exchanging(module: Module) -> frozenset[str]:
    """The names of the functions that do the work of layers: that exchange rows of tokens, or where none does, that communicate."""
    found = {func.name for func in module.funcs if any(isinstance(op, RowExchange) for op in func.ops)}
    while more := {func.name for func in module.funcs if not found.isdisjoint(called(module, func))} - found:
        found |= more
    return frozenset(found) or communicating(module)


def _calls(ops: Sequence[Op], names: Collection[str]) -> list[Call]:
    return [op for op in ops if isinstance(op, Call) and op.callee in names]


def gradients_of(op: Call, call: Call) -> bool:
    """Whether `op` is for gradients of weights and reads nothing but what `call` makes."""
    return op.phase is Phase.W and bool(op.args) and all(v.owner is call for v in op.args)


def _directly(op: Op, other: Op) -> bool:
    """Whether `op` has of `other` only what it reads from it."""
    waiting = [v.owner for v in op.operands if v.owner is not None and v.owner is not other]
    seen: set[Op] = set()
    while waiting:
        one = waiting.pop()
        if one is other:
            return False
        if one not in seen:
            seen.add(one)
            waiting += [v.owner for v in one.operands if v.owner is not None]
    return True


def _halved(groups: Groups, call: Call) -> tuple[Call, Call] | None:
    """A call of a layer as two, the first up to where rows are made ready for the experts; None where there are none."""
    func = groups.module[call.callee]
    last = list(_before_dispatch(func))
    if not last:
        return None
    first, second, handed = halves(func, last)
    first, second = groups.add(first), groups.add(second)
    given = dict(zip((p.name for p in func.params), call.args, strict=True))
    rest = second.params[: len(second.params) - len(handed)]
    head = _call(call, first, tuple(given[p.name] for p in first.params), f"{call.id}.1")
    return head, _call(call, second, (*(given[p.name] for p in rest), *head.results), call.id)


def _call(call: Call, func: Func, args: tuple[Value, ...], id: str) -> Call:
    names = tuple(v.name for v in func.results)
    return Call(Symbol(func.name), args, tuple(v.type for v in func.results), call.weights, id=id, phase=call.phase, names=names)


def _before_dispatch(func: Func) -> Iterator[Op]:
    """The ops that bring rows to experts need, but for those that begin with the tokens' dispatch or with what ranks say about it."""
    behind: dict[Op, set[Op]] = {}
    for op in func.ops:
        owners = [v.owner for v in op.operands if v.owner is not None]
        behind[op] = set(owners).union(*(behind[o] for o in owners))
    products = [op for op in func.ops if isinstance(op, PRODUCTS)]
    bringing = [op for op in func.ops if isinstance(op, RowExchange) and any(op in behind[p] for p in products)]
    if not bringing:
        return
    expert = bringing[0].along()[0].split(".")[0]
    begin = {op for op in func.ops if isinstance(op, Dispatch) or (isinstance(op, Collective) and op.along()[0].split(".")[0] == expert)}
    needed = set().union(*(behind[op] for op in bringing))
    yield from (op for op in func.ops if op in needed and op not in begin and behind[op].isdisjoint(begin))
