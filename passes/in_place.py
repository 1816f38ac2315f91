"""What need not be moved: heads that attention reads and writes in two parts, and parts that are made where they are joined."""

from __future__ import annotations

from collections import Counter

from ..ir.core import Builder, Func, Module, Op, Trait, Value
from ..ir.ops.attention import Attention, AttentionBackward, AttentionDecode
from ..ir.ops.fused import HALVES, Joined
from ..ir.ops.shape import Concat, Slice, Transpose
from ..ir.walk import communicating
from .rewrite import rebuild
from .simplify import drop_unused


def in_place(module: Module) -> Module:
    """`module` without copies that attention's kernels make needless.

    Attention whose queries, and keys, are a `concat` of two along a head becomes attention of both parts, and in backward gives their
    gradients apart. A `concat` of what such kernels write, read by nothing else, becomes `joined`: they write into it.
    """
    pinned = communicating(module)

    def rewritten(func: Func) -> Func:
        apart = rebuild(func, _apart)
        return _joined(apart if apart is func else drop_unused(apart, pinned))

    return module.map(rewritten)


def _apart(op: Op, b: Builder) -> tuple[Value, ...] | None:
    """Attention on the parts of its heads; a slice of joined gradients as the part that it is."""
    match op:
        case Attention() | AttentionBackward() if type(op) in HALVES and (q := _parts(op.q, b)) and (k := _parts(op.k, b)):
            if q[0].shape[-1] != k[0].shape[-1]:
                return None
            made = _of_halves(op, q, k)
            if isinstance(op, Attention):
                return b.emit(made).results
            dq, dk, dv, *rest = b.emit(made.copy(names=("dq", "dk", "dv", "dq_pe", "dk_pe"))).results
            dq, dk = (b.emit(Concat((x, y), x.tensor.rank - 1)).result for x, y in zip((dq, dk), rest, strict=True))
            return dq, dk, dv
        case AttentionDecode() if type(op) in HALVES and (q := _parts(op.q, b)):
            return b.emit(_of_halves(op, q, (op.k, None))).results
        case Slice(axis=axis, start=start, stop=stop, step=1) if axis % op.x.tensor.rank == op.x.tensor.rank - 1:
            first, second = _parts(op.x, b) or (None, None)
            if first and second and (start, stop) in ((0, first.shape[-1]), (first.shape[-1], op.x.shape[-1])):
                return (first if start == 0 else second,)
    return None


def _of_halves(op: Op, q: tuple[Value, Value], k: tuple[Value, Value | None]) -> Op:
    given = {a.name: getattr(op, a.name) for a in op.arguments} | {"q": q[0], "q_pe": q[1], "k": k[0], "k_pe": k[1]}
    return HALVES[type(op)](**given)


def _parts(x: Value, b: Builder) -> tuple[Value, Value] | None:
    """The two values that x joins along its last axis, axes reordered as those of x are."""
    perms = []
    while isinstance(x.owner, Transpose) and x.owner.perm[-1] == x.tensor.rank - 1:
        perms.append(x.owner.perm)
        x = x.owner.x
    if not isinstance(x.owner, Concat) or len(x.owner.xs) != 2 or x.owner.axis % x.tensor.rank != x.tensor.rank - 1:
        return None
    first, second = x.owner.xs
    for perm in reversed(perms):
        first, second = (b.emit(Transpose(v, perm)).result for v in (first, second))
    return first, second


def _joined(func: Func) -> Func:
    """`func` with every `concat` whose operands can all be written in its place as `joined`."""
    uses = Counter(v for op in func.ops for v in op.operands)

    def rule(op: Op, b: Builder) -> tuple[Value, ...] | None:
        if type(op) is not Concat or not all(placed(x) for x in op.xs):
            return None
        return b.emit(Joined(op.xs, op.axis)).results

    def placed(x: Value) -> bool:
        while True:
            if uses[x] != 1 or x in func.results:
                return False
            if not isinstance(x.owner, Transpose) or x.owner.perm[-1] != x.tensor.rank - 1:
                return x.owner is not None and Trait.STRIDED in x.owner.traits
            x = x.owner.x

    return rebuild(func, rule)
