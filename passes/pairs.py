"""Functions and their backward: where residuals pass from one to the other, and how a different choice of them is carried out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..ir.core import Func, Module, Op, Phase, Trait, Value
from ..ir.errors import require
from ..ir.ops.control import Call, Pack, Unpack
from ..ir.types import Bundle
from .bundles import links, packed, retyped
from .outline import is_free
from .rewrite import Replacements, fresh
from .simplify import drop_unused


@dataclass(frozen=True, eq=False)
class Pair:
    """A function whose bundle of residuals goes to the one that runs its backward pass."""

    forward: Func
    backward: Func
    result: int
    """Which result of `forward` the bundle is."""
    param: int
    """Which parameter of `backward` it is."""
    pack: Pack
    unpack: Unpack

    @property
    def kept(self) -> tuple[Value, ...]:
        """The values of `forward` that are residuals now."""
        return self.pack.values

    @cached_property
    def needed(self) -> tuple[Value, ...]:
        """Those among them that `backward` reads."""
        read = {v for op in self.backward.ops for v in op.operands} | set(self.backward.results)
        return tuple(v for v, got in zip(self.kept, self.unpack.results, strict=True) if got in read)

    @cached_property
    def order(self) -> Mapping[Value, int]:
        """The values of `forward` in the order in which they come to be."""
        made = (*self.forward.params, *(r for op in self.forward.ops for r in op.results))
        return {v: i for i, v in enumerate(made)}


Plan = Mapping[str, Collection[Value]]
"""By the name of a forward function: which of its values are residuals. Functions that it does not name stay as they are."""


def can_rerun(op: Op) -> bool:
    """Whether `op` may run a second time in backward.

    What decides where tokens go may not (ids and handles are its results), nor a collective, nor what makes a bundle, nor a call. Whole
    numbers are small, and mostly say where something is: they are kept.
    """
    pinned = not op.traits.isdisjoint((Trait.ROUTING, Trait.COLLECTIVE)) or isinstance(op, Call)
    whole = Trait.SOURCE not in op.traits and any(isinstance(r.type, Bundle) or not r.dtype.is_float for r in op.results)
    return not pinned and not whole


def pairs(module: Module) -> tuple[Pair, ...]:
    """Every pair of functions of which each serves the other alone. One whose residuals are those of functions that it calls is none."""
    every, made = links(module), []
    for link in every:
        alone = sum(link.source == other.source or link.target == other.target for other in every) == 1
        f, b = module[link.source], module[link.target]
        pack, param = packed(module, link), b.params[link.param]
        unpacks = [op for op in b.ops if param in op.operands]
        own = pack and pack.phase is Phase.F and not any(isinstance(v.type, Bundle) and isinstance(v.owner, Call) for v in pack.values)
        if alone and pack and own and len(unpacks) == 1 and isinstance(unpacks[0], Unpack):
            made.append(Pair(f, b, link.result, link.param, pack, unpacks[0]))
    return tuple(made)


def rerun(pair: Pair, saved: Collection[Value]) -> tuple[list[Op], list[Value]]:
    """The ops that backward has to run again where only `saved` is kept, and what of `saved` it then reads, both in forward order.

    Raises `DscError` where a value can be had in neither way.
    """
    kept, used, ops = set(saved), dict[Value, None](), dict[Op, None]()
    waiting = list(pair.needed)
    while waiting:
        value = waiting.pop()
        if value in kept:
            used[value] = None
            continue
        owner = value.owner
        if owner is None or not can_rerun(owner):
            require(False, f"%{value.name} of @{pair.forward.name} is neither kept nor can it be computed again")
        elif owner not in ops:
            ops[owner] = None
            waiting += owner.operands
    return [op for op in pair.forward.ops if op in ops], sorted(used, key=pair.order.__getitem__)


def carried_out(module: Module, pairs: Collection[Pair], plan: Plan) -> Module:
    """`module` with the residuals of `plan`: the bundles hold them, and backward runs again what it has no longer, right before the first
    op that reads it, in phase R."""
    changed: dict[str, Func] = {}
    for pair in pairs:
        if pair.forward.name not in plan:
            continue
        _, saved = rerun(pair, plan[pair.forward.name])
        if tuple(saved) == pair.kept:
            continue
        forward, backward = _forward(pair, saved), _backward(pair, saved)
        changed[forward.name], changed[backward.name] = forward, backward
    return retyped(module.map(lambda func: changed.get(func.name, func))) if changed else module


def _forward(pair: Pair, saved: Collection[Value]) -> Func:
    pack = pair.pack.copy(values=tuple(saved))
    ops = [op for op in pair.forward.ops if op is not pair.pack]
    results = tuple(pack.result if r is pair.pack.result else r for r in pair.forward.results)
    return Func(pair.forward.name, pair.forward.params, (*ops, pack), results, pair.forward.updates)


def _backward(pair: Pair, saved: Collection[Value]) -> Func:
    old = pair.backward
    bundle = Value(Bundle(tuple(v.type for v in saved)), old.params[pair.param].name)
    unpack = pair.unpack.copy(x=bundle, names=tuple(v.name for v in saved))
    have: dict[Value, Value] = dict(zip(saved, unpack.results, strict=True))
    inside = Replacements()
    residual = dict(zip(pair.unpack.results, pair.kept, strict=True))
    taken = {op.id for op in old.ops}
    ops: list[Op] = []

    def again(value: Value) -> Value:
        """A value of forward."""
        if value not in have:
            assert value.owner, f"%{value.name} comes from nowhere"
            new = value.owner.with_operands(again).copy(phase=Phase.R, id=fresh(value.owner.id, taken))
            ops.append(new)
            have.update(zip(value.owner.results, new.results, strict=True))
        return have[value]

    def get(value: Value) -> Value:
        return again(residual[value]) if value in residual else inside[value]

    for op in old.ops:
        if op is pair.unpack:
            ops.append(unpack)
            continue
        new = op.with_operands(get)
        ops.append(new)
        inside.update(zip(op.results, new.results, strict=True))
    params = tuple(bundle if i == pair.param else p for i, p in enumerate(old.params))
    return drop_unused(Func(old.name, params, tuple(ops), tuple(get(r) for r in old.results), old.updates))


def listed(pair: Pair, again: Collection[Op]) -> Collection[Value]:
    """The residuals of a policy that runs the ops `again` in backward, and with them what only moves, turns or quantises their results.

    What such an op reads is kept, unless it too is run again or can be had for nothing. What is made of weights alone, such as their copies
    in FP8, is the same for every micro-batch, and no residual of any.
    """
    rerun_too, weights = set(again), set[Op]()
    for op in pair.forward.ops:
        if Trait.SOURCE in op.traits or (op.operands and can_rerun(op) and all(v.owner in weights for v in op.operands)):
            weights.add(op)
        moves = is_free(op) or op.name in ("concat", "rope", "quantize")
        if moves and can_rerun(op) and any(v.owner in rerun_too for v in op.operands):
            rerun_too.add(op)
    rerun_too |= weights
    saved: set[Value] = set()

    def want(value: Value) -> None:
        owner = value.owner
        if owner and can_rerun(owner) and (owner in rerun_too or (is_free(owner) and value not in pair.kept)):
            for operand in owner.operands:
                want(operand)
        else:
            saved.add(value)

    for value in pair.needed:
        want(value)
    return saved


def runs(module: Module) -> Mapping[str, int]:
    """How often each function runs."""
    return Counter(_entered(module, module.main))


def _entered(module: Module, func: Func) -> Iterator[str]:
    yield func.name
    for op in func.ops:
        if isinstance(op, Call):
            yield from _entered(module, module[op.callee])
