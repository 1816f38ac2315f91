"""Fold, share and drop: the same program in fewer ops, bit for bit.

Every rule is exact on every input: signed zeros, infinities and NaN included, whatever format the backend computes in. So
x + 0.0 stays (it turns -0.0 into 0.0) while x + -0.0 goes, and a cast there and back goes only where the way there loses
nothing. FP8 E5M2 and E5M6 have an infinity, which rounding to them turns into their largest number: there x * 1 stays.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, replace
from math import copysign
from operator import add, floordiv, mul, sub, truediv
from typing import ClassVar

from ..ir.core import Builder, Func, Module, Op, Phase, Role, Symbol, Trait, Value, called
from ..ir.ops.control import Call, Literal, Pack, Unpack
from ..ir.ops.elementwise import Add, Cast, Div, Mul, Sub, Where
from ..ir.ops.shape import Broadcast, Concat, Pad, Reshape, Slice, Transpose
from ..ir.types import DType, bound
from ..ir.walk import communicating
from .exact import exactly, holds, is_lossless
from .manager import Pass, register
from .rewrite import rebuild


@register
@dataclass(frozen=True)
class Simplify(Pass):
    """Fold what has no effect or is known, share what is computed twice, drop what nothing reads, until nothing changes.

    Identities (casts, reshapes, transposes, slices of everything, x * 1, x + -0.0, x - 0, x / 1, `where` with a known
    condition, unpack of pack) fold, views of views become one, exact arithmetic on literals is done here. Equal ops of a
    function become the first of them (a recomputed op only another recomputed one, or recomputing would be undone), and
    equal functions the first of those. The parameters and results of a function stay, as does the function that runs. Collectives stay
    as they are, used or not, and so do calls of functions that run them.

    Before `simplify`:

        func @f(%x: f32[2, 3, 5]) {
          %a: f32[5, 2, 3] = transpose(%x, perm=[2, 0, 1])  @ f#1 F
          %b: f32[3, 5, 2] = transpose(%a, perm=[2, 0, 1])  @ f#2 F
          %one: f32[] = literal([1.0], [], f32)             @ f#3 F
          %c: f32[3, 5, 2] = mul(%b, %one)                  @ f#4 F
          %d: f32[3, 5, 2] = exp(%c)                        @ f#5 F
          %e: f32[3, 5, 2] = exp(%b)                        @ f#6 F
          return %d, %e
        }

    after:

        func @f(%x: f32[2, 3, 5]) {
          %b: f32[3, 5, 2] = transpose(%x, perm=[1, 2, 0])  @ f#2 F
          %d: f32[3, 5, 2] = exp(%b)                        @ f#5 F
          return %d, %d
        }
    """

    name: ClassVar[str] = "simplify"

    def __call__(self, module: Module) -> Module:
        pinned = communicating(module)
        while (after := merge_functions(module.map(lambda func: simplify_func(func, pinned)))) is not module:
            module = after
        return module


def simplify_func(func: Func, pinned: Collection[str] = ()) -> Func:
    """One function, folded, shared and cleaned until nothing changes; itself where nothing does. Functions in `pinned` communicate."""
    while (after := drop_unused(share(fold(func), pinned), pinned)) is not func:
        func = after
    return func


def fold(func: Func) -> Func:
    """Apply `folded` to each op."""
    return rebuild(func, _fold)


def _fold(op: Op, b: Builder) -> tuple[Value, ...] | None:
    """What an op comes down to, given its operands; None where it stays."""
    match op:
        case Cast(x=x, dtype=dtype) if x.dtype is dtype:
            return (x,)
        case Cast(x=Value(owner=Cast(x=x, dtype=between)), dtype=dtype) if _composes(x.dtype, between, dtype):
            return b.emit(Cast(x, dtype)).results
        case Cast(x=Value(owner=Literal()) as x, dtype=dtype):
            return _cast_literal(x, dtype, b)
        case Reshape(x=x) | Transpose(x=x) | Broadcast(x=x) | Slice(x=x) | Pad(x=x) if _moves_nothing(op):
            return (x,)
        case Concat(xs=(x,)):
            return (x,)
        case Reshape(x=Value(owner=Reshape(x=x)), shape=shape):
            return b.emit(Reshape(x, shape)).results
        case Broadcast(x=Value(owner=Broadcast(x=x)), shape=shape):
            return b.emit(Broadcast(x, shape)).results
        case Transpose(x=Value(owner=Transpose(x=x, perm=first)), perm=second):
            return b.emit(Transpose(x, tuple(first[axis] for axis in second))).results
        case Reshape(x=Value(owner=Literal(values=values, dtype=dtype)), shape=shape):
            return b.emit(Literal(values, shape, dtype)).results
        case Broadcast(x=Value(owner=Literal(values=(value,), dtype=dtype)), shape=shape):
            return b.emit(Literal((value,), shape, dtype)).results
        case Unpack(x=Value(owner=Pack(values=values))):
            return values
        case Pack(values=(Value(owner=Unpack(x=x) as unpack), *_) as values) if values == unpack.results:
            return (x,)
        case Where(condition=Value(owner=Literal(values=values)), a=a, b=other) if len(set(map(bool, values))) == 1:
            return _stretched(a if values[0] else other, op, b)
        case Where(a=a, b=other) if a is other:
            return _stretched(a, op, b)
        case Add() | Sub() | Mul() | Div():
            return _arithmetic(op, b)
    return None


def _saturates(dtype: DType) -> bool:
    """Whether rounding to `dtype` turns an infinity that it has into its largest number."""
    return dtype in (DType.f8e5m2, DType.e5m6)


def _moves_nothing(op: Reshape | Transpose | Broadcast | Slice | Pad) -> bool:
    """A view or pad that keeps the shape keeps the elements' places too, but for a transpose."""
    return op.result.type == op.x.type and (not isinstance(op, Transpose) or op.perm == tuple(range(len(op.perm))))


def _composes(source: DType, between: DType, target: DType) -> bool:
    """Whether a cast to `between` and on to `target` is one cast, for every value of `source`."""
    if source is target and _saturates(target):
        return False  # there and back an infinity saturates, but a cast from a dtype to itself is no rounding
    if not source.is_float and between.is_float and not target.is_float and not is_lossless(source, target):
        return False  # an integer too large for the target wraps, a float becomes the target's end
    return is_lossless(source, between)


def _cast_literal(x: Value, dtype: DType, b: Builder) -> tuple[Value, ...] | None:
    match x.owner:
        case Literal(values=values, shape=shape) if all(holds(value, x.dtype) and holds(value, dtype) for value in values):
            return b.emit(Literal(tuple(map(float if dtype.is_float else int, values)), shape, dtype)).results
    return None


def _stretched(value: Value, op: Op, b: Builder) -> tuple[Value, ...] | None:
    """`value` in place of the result of `op`, broadcast where it has to be."""
    wanted = op.result.tensor
    if value.type == wanted:
        return (value,)
    if value.dtype is not wanted.dtype or not wanted.is_static:
        return None
    return b.emit(Broadcast(value, tuple(map(bound, wanted.shape)))).results


def _arithmetic(op: Add | Sub | Mul | Div, b: Builder) -> tuple[Value, ...] | None:
    wanted = op.result.tensor
    if not _saturates(wanted.dtype):
        if op.a.type == wanted and _is_neutral(op, op.b):
            return (op.a,)
        if op.b.type == wanted and isinstance(op, Add | Mul) and _is_neutral(op, op.a):
            return (op.b,)
    match op.a.owner, op.b.owner:
        case Literal(values=(left,)), Literal(values=(right,)) if not (isinstance(op, Div) and right == 0):
            function = {Add: add, Sub: sub, Mul: mul, Div: truediv if wanted.dtype.is_float else floordiv}[type(op)]
            value = exactly(function, left, right, wanted.dtype)
            if value is not None and holds(left, op.a.dtype) and holds(right, op.b.dtype):
                return b.emit(Literal((value,), tuple(map(bound, wanted.shape)), wanted.dtype)).results
    return None


def _is_neutral(op: Add | Sub | Mul | Div, operand: Value) -> bool:
    """Whether `operand`, a literal, leaves every value as it is: x * 1, x / 1, x - 0.0 and x + -0.0, but not x + 0.0."""
    if not isinstance(operand.owner, Literal):
        return False
    number, sign = (1, 1.0) if isinstance(op, Mul | Div) else (0, -1.0 if isinstance(op, Add) and op.result.dtype.is_float else 1.0)
    return all(value == number and copysign(1.0, value) == sign and holds(value, operand.dtype) for value in operand.owner.values)


def communicates(op: Op, pinned: Collection[str]) -> bool:
    """Whether `op` is a collective or calls a function of `pinned`: then it is run as often as it stands."""
    return Trait.COLLECTIVE in op.traits or (isinstance(op, Call) and op.callee in pinned)


def share(func: Func, pinned: Collection[str] = ()) -> Func:
    """Let equal ops be the first of them. Every op but collectives is a function of its operands and attributes, routing included."""
    first: dict[Hashable, Op] = {}

    def rule(op: Op, _: Builder) -> tuple[Value, ...] | None:
        if communicates(op, pinned):
            return None
        same = first.setdefault(structural_key(op), op)
        return None if same is op else same.results

    return rebuild(func, rule)


def structural_key(op: Op) -> Hashable:
    """What two ops that compute the same share: all but id, names and phase, save that recomputing is an end in itself."""
    arguments = (getattr(op, a.name) for a in op.arguments)
    # An attribute goes by its repr, so that 1, 1.0 and true differ, 0.0 and -0.0 too, and NaN equals itself.
    shown = (repr(given) if a.role is Role.ATTRIBUTE else given for a, given in zip(op.arguments, arguments, strict=True))
    return op.name, op.phase is Phase.R, tuple(r.type for r in op.results), *shown


def drop_unused(func: Func, pinned: Collection[str] = ()) -> Func:
    """Without the ops whose results nothing reads, but for what communicates. An update is a result of the function: it is read."""
    needed = set(func.results)
    kept: list[Op] = []
    for op in reversed(func.ops):
        if not needed.isdisjoint(op.results) or communicates(op, pinned):
            kept.append(op)
            needed.update(op.operands)
    return func if len(kept) == len(func.ops) else replace(func, ops=tuple(reversed(kept)))


def merge_functions(module: Module) -> Module:
    """Calls of equal functions go to the first of them, and functions that nothing calls go away."""
    first: dict[Hashable, str] = {}
    survivor = {func.name: first.setdefault(func.canonical[1:], func.name) for func in module.funcs}

    def rule(op: Op, b: Builder) -> tuple[Value, ...] | None:
        if isinstance(op, Call) and survivor[op.callee] != op.callee:
            return b.emit(op.copy(callee=Symbol(survivor[op.callee]))).results
        return None

    return reached(module.map(lambda func: rebuild(func, rule)))


def reached(module: Module) -> Module:
    """Without the functions that nothing calls."""
    needed, waiting = set[str](), [module.main.name]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += called(module, module[name])
    return module if len(needed) == len(module.funcs) else module.replace(funcs=tuple(f for f in module.funcs if f.name in needed))
