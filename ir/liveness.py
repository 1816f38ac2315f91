"""When values die, and how many bytes are alive at each point of a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .core import Func, Module, Op, Trait, Value
from .expected import expected_bytes
from .ops.collective import Done, reads
from .ops.control import Call, Pack, Unpack
from .types import Type


def last_uses(func: Func) -> tuple[tuple[Value, ...], ...]:
    """For each op, the values that nothing reads after it. Parameters and results of the function outlive it.

    What a started collective sends is read until it is done.
    """
    kept = set(func.params) | set(func.results)
    dead_after: list[tuple[Value, ...]] = []
    seen: set[Value] = set()
    for op in reversed(func.ops):
        last = [v for v in dict.fromkeys((*reads(op), *op.results)) if v not in seen and v not in kept]
        seen.update(last)
        dead_after.append(tuple(last))
    return tuple(reversed(dead_after))


@dataclass(frozen=True)
class Live:
    """Bytes alive while the functions run, weights and the caller's own values left out."""

    after: tuple[int, ...]
    """While each op runs: operands, results, and the workspace of a called function."""
    peak: int
    at: int
    """The op at which the peak is reached."""


def live_bytes(module: Module, func: Func) -> Live:
    """The bytes of `func`'s own values at each op, its parameters not counted.

    A view shares its operand's memory and a bundle its fields': such values cost nothing of their own and keep what they
    share alive. A weight is counted with the weights, and a call with the peak of what it calls. Rows that ranks exchange are as
    many as are expected (`expected.py`).
    """
    return _live(module, func, {}, expected_bytes(module))


def _live(module: Module, func: Func, known: dict[str, Live], size: Callable[[Type], int]) -> Live:
    roots = _roots(func)
    alive_until: dict[Value, int] = {}
    for index, op in enumerate(func.ops):
        for value in (*reads(op), *op.results):
            for root in roots.get(value, ()):
                alive_until[root] = index
    for value in func.results:
        for root in roots.get(value, ()):
            alive_until[root] = len(func.ops)
    released: dict[int, int] = {}
    for value, index in alive_until.items():
        released[index] = released.get(index, 0) + size(value.type)
    now, after = 0, []
    for index, op in enumerate(func.ops):
        now += sum(size(root.type) for result in op.results for root in roots[result] if root is result)
        after.append(now + _inside(module, op, known, size))
        now -= released.get(index, 0)
    peak = max(after, default=0)
    return Live(tuple(after), peak, after.index(peak) if after else 0)


def _inside(module: Module, op: Op, known: dict[str, Live], size: Callable[[Type], int]) -> int:
    if not isinstance(op, Call):
        return 0
    if op.callee not in known:
        known[op.callee] = _live(module, module[op.callee], known, size)
    results = sum(size(r.type) for r in op.results)
    return max(0, known[op.callee].peak - results)


def _roots(func: Func) -> dict[Value, tuple[Value, ...]]:
    """Whose memory each value lies in: its own, what it is a view of, or nothing (weights and the caller's values)."""
    roots: dict[Value, tuple[Value, ...]] = {p: () for p in func.params}
    for op in func.ops:
        shared = Trait.VIEW in op.traits or isinstance(op, Pack | Unpack)
        inherited = tuple(dict.fromkeys(root for v in op.operands for root in roots[v]))
        for index, result in enumerate(op.results):
            if isinstance(op, Done):
                roots[result] = roots[op.xs[index]]
                continue
            roots[result] = inherited if shared else () if Trait.SOURCE in op.traits else (result,)
    return roots
