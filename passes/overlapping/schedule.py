"""One function put in order: candidates by the cost model, under a cap on memory, and what comes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from ...hardware.streams import Costing
from ...ir.core import Func, Module, Op
from ...ir.flight import differences
from ...ir.liveness import live_bytes
from ...ir.ops.collective import Done, Transfer
from .components import blocks, published
from .emit import emit
from .order import Order, candidates
from .tasks import Task, length, tasks_of


@dataclass(frozen=True)
class Ordered:
    """A function in its order. Seconds are those of one run by the cost model, `plain` as the program stood before."""

    func: Func
    seconds: float
    plain: float
    over: int = 0
    """Bytes by which the least memory that was found is more than the cap."""


def ordered(module: Module, func: Func, costing: Costing, cap: float = inf, backward: Mapping[Op, bool] | None = None) -> Ordered:
    """`func` in the quickest order that was found: of the program's own, those of list scheduling and, for a forward and a backward chunk
    (`backward` says which ops are of the latter), the published one, the first of the quickest whose memory is at most `cap` bytes.
    """
    before = tasks_of(module, func, costing.alone, costing)
    plain = length(before, range(len(before)), started=False)
    starts = any(isinstance(task.op, Transfer) for task in before)
    if not starts or any(isinstance(op, Done) for op in func.ops):
        return Ordered(func, plain, plain)
    tasks = tasks_of(module, func, costing.beside, costing)
    found: list[tuple[float, int, Order]] = [(length(tasks, order), i, order) for i, order in enumerate(orders(tasks, backward))]
    choices: list[tuple[float, int, Order | None]] = sorted([(plain, -1, None), *found], key=lambda choice: choice[:2])
    least: tuple[int, float, Func] | None = None
    for seconds, _, order in choices:
        made = func if order is None else emit(module, func, tasks, order)
        assert not (faults := list(differences(func, made))), faults
        if cap == inf:
            return Ordered(made, seconds, plain)
        peak = live_bytes(module, made).peak
        if peak <= cap:
            return Ordered(made, seconds, plain)
        if least is None or peak < least[0]:
            least = peak, seconds, made
    assert least is not None
    return Ordered(least[2], least[1], plain, int(least[0] - cap))


def orders(tasks: list[Task], backward: Mapping[Op, bool] | None = None) -> list[Order]:
    """The orders that are looked at."""
    found = list(candidates(tasks))
    if backward is not None and (known := blocks(tasks, backward)) is not None:
        found.append(published(tasks, known))
    return found
