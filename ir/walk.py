"""The module as it runs: calls followed, weights by their full names, totals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .core import Func, Module, Op, Trait, Value, called, once
from .errors import require
from .ops.control import Call, Param
from .ops.internode import InternodeDispatch
from .ops.linalg import GroupedMatmul
from .ops.moe import Dispatch, DispatchGroups
from .ops.quant import GroupedScaledMatmul, Quantize
from .quantization import SCALE_SUFFIX
from .types import Tensor, bound


def join(prefix: str, name: str) -> str:
    """A name below a prefix: `model.layers.3` and `mlp.gate.weight` with a dot between, either alone where the other is empty.

    A function that does the work of several layers is called with a prefix for each, `model.layers.3;model.layers.57`, and its names begin
    with the number of theirs: `1:mlp.gate.weight` is then `model.layers.57.mlp.gate.weight`.
    """
    if ";" in name:
        return ";".join(join(prefix, part) for part in name.split(";"))
    number, colon, rest = name.partition(":")
    if colon and number.isdigit():
        several = prefix.split(";")
        require(int(number) < len(several), f"{name} is a name under prefix {number} of {prefix!r}, counted from 0")
        return join(several[int(number)], rest)
    return f"{prefix}.{name}" if prefix and name else prefix or name


def numbered(number: str, name: str) -> str:
    """A name, or several prefixes, below prefix `number` (`1:`, or empty where there is one) of those that a function is called with."""
    head, colon, tail = number.partition(":")
    if not colon:
        return join(number, name)
    return f"{head}:{join(tail, name)}"


def walk(module: Module, func: Func | None = None, prefix: str = "") -> Iterator[tuple[str, Func, Op]]:
    """Every op in the order in which it runs, with the prefix of its weights' names and its function. Calls are entered."""
    func = module.main if func is None else func
    for op in func.ops:
        yield prefix, func, op
        if isinstance(op, Call):
            yield from walk(module, module[op.callee], join(prefix, op.weights))


def communicating(module: Module) -> frozenset[str]:
    """The names of the functions that run a collective, in their own ops or in what they call."""
    found = {func.name for func in module.funcs if any(Trait.COLLECTIVE in op.traits for op in func.ops)}
    while more := {func.name for func in module.funcs if not found.isdisjoint(called(module, func))} - found:
        found |= more
    return frozenset(found)


def executed(module: Module) -> int:
    """How many ops one run executes."""
    return sum(1 for _ in walk(module))


@once
def weights(module: Module) -> Mapping[str, Tensor]:
    """Every weight that the module reads, by full name, in the order of first use. One name has one type."""
    found: dict[str, Tensor] = {}
    for prefix, _, op in walk(module):
        if isinstance(op, Param):
            name, tensor = join(prefix, op.path), op.result.tensor
            known = found.setdefault(name, tensor)
            require(known == tensor, f"weight {name} is read as {known} and as {tensor}")
    return found


@dataclass(frozen=True)
class Count:
    """Parameters: all of them, and those that work on one token."""

    total: int
    active: int


def parameters(module: Module, types: Mapping[str, Tensor] | None = None) -> dict[str, Count]:
    """Elements of each weight by full name. Of a stack of experts top_k / experts are active.

    `types` are the weights', those that the module reads unless they are given; of what one rank of many reads `sharding.whole_weights`
    makes the whole model's.
    """
    shares = expert_weights(module)
    counted = {}
    for name, tensor in (weights(module) if types is None else types).items():
        if name.endswith(SCALE_SUFFIX) or not tensor.dtype.is_float:
            continue  # a scale belongs to its codes, a table to the way to the experts: they are bytes, but no parameters
        chosen, experts = shares.get(name, (1, 1))
        counted[name] = Count(tensor.size, tensor.size * chosen // experts)
    return counted


@once
def expert_weights(module: Module) -> Mapping[str, tuple[int, int]]:
    """The stacks of experts by full name: to how many experts a token goes, and of how many."""
    found: dict[str, tuple[int, int]] = {}
    sent: dict[Value, tuple[int, int] | None] = {}
    handed = _handed(module)
    for prefix, _, op in walk(module):
        if isinstance(op, GroupedMatmul | GroupedScaledMatmul) and (owner := _weight(op.w)):
            if op.counts not in sent:  # once, however often the function runs
                sent[op.counts] = _chosen(op.counts, handed)
            if chosen := sent[op.counts]:
                found[join(prefix, owner.path)] = chosen
    return found


def _handed(module: Module) -> dict[Value, Value]:
    """Where values that cross a call come from: a parameter from its argument (of the first call), a call's result from its function's."""
    found: dict[Value, Value] = {}
    for op in (op for func in module.funcs for op in func.ops):
        if isinstance(op, Call):
            callee = module[op.callee]
            for param, given in zip(callee.params, op.operands, strict=True):
                found.setdefault(param, given)
            found.update(zip(op.results, callee.results, strict=True))
    return found


def _chosen(counts: Value, handed: Mapping[Value, Value]) -> tuple[int, int] | None:
    """To how many experts a token goes whose rows `counts` counts, and of how many."""
    match _dispatch(counts, handed):
        case Dispatch(ids=ids, experts=experts) | InternodeDispatch(ids=ids, experts=experts):
            return bound(ids.shape[1]), experts
        case DispatchGroups(ids=ids, groups=groups, size=size):
            return bound(ids.shape[1]), groups * size
    return None


def _dispatch(counts: Value, handed: Mapping[Value, Value]) -> Dispatch | InternodeDispatch | DispatchGroups | None:
    """The dispatch whose rows `counts` counts, exchanged between ranks as they may be; of hops the first, which knows all experts.

    Only integers lead there: behind the scores that chose the experts lie the layers before.
    """
    seen, ahead = set[Value](), [counts]
    while ahead:
        value = ahead.pop()
        while value in handed:
            value = handed[value]
        if isinstance(value.owner, Dispatch | InternodeDispatch):
            return value.owner
        if isinstance(value.owner, DispatchGroups):
            return _dispatch(value.owner.ids, handed) or value.owner
        if value.owner and value not in seen:
            seen.add(value)
            ahead += [v for v in value.owner.operands if not (isinstance(v.type, Tensor) and v.dtype.is_float)]
    return None


def _weight(value: Value) -> Param | None:
    """The weight that a product reads, quantised on the way or not."""
    owner = value.owner.x.owner if isinstance(value.owner, Quantize) else value.owner
    return owner if isinstance(owner, Param) else None


def flops(module: Module, func: Func | None = None) -> int:
    """Floating-point operations of one run, of all of the module or of one of its functions."""
    return _flops(module)[(func or module.main).name]


@once
def _flops(module: Module) -> Mapping[str, int]:
    found: dict[str, int] = {}

    def enter(name: str) -> int:
        if name not in found:
            found[name] = sum(enter(op.callee) if isinstance(op, Call) else op.flops() for op in module[name].ops)
        return found[name]

    for func in module.funcs:
        enter(func.name)
    return found
