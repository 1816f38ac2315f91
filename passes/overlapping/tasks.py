"""A function as tasks on streams, and how long an order of them takes.

One thread issues the tasks in the order; computing keeps it busy, a collective runs beside it, after those issued before on its link. A
task waits for the collectives that it reads. Weights, and views that take no time, are no tasks: they stand before their first reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...hardware.streams import COMPUTE, Costing, Durations, simulate
from ...ir.core import Func, Module, Op, Trait, Value
from ...ir.flight import axes
from ...ir.ops.collective import Transfer, reads
from ...ir.ops.control import Call
from ...ir.ops.fused import Fused


@dataclass(frozen=True, slots=True)
class Task:
    """Work of `seconds` on `stream` after the tasks that `after` numbers. A `barrier` waits for all collectives issued before it."""

    op: Op
    stream: str
    seconds: float
    after: tuple[int, ...]
    barrier: bool = False

    @property
    def sends(self) -> bool:
        """Whether it runs on a link."""
        return self.stream != COMPUTE


def tasks_of(module: Module, func: Func, durations: Durations, calls: Durations | Costing | None = None) -> list[Task]:
    """The tasks of a function, in its order. A call that communicates is a barrier; it takes as long as what it runs, by `calls`."""
    numbers: dict[Op, int] = {}
    behind: dict[Value, tuple[int, ...]] = {p: () for p in func.params}
    called: dict[str, float] = {}
    tasks: list[Task] = []
    for op in func.ops:
        after = tuple(dict.fromkeys(n for v in reads(op) for n in behind[v]))
        free = Trait.SOURCE in op.traits or (Trait.VIEW in op.traits and not durations.seconds(op))
        if not free:
            numbers[op] = len(tasks)
            if isinstance(op, Call) and not isinstance(op, Fused):
                if op.callee not in called:
                    called[op.callee] = simulate(module, calls or durations, module[op.callee]).total
                tasks.append(Task(op, COMPUTE, called[op.callee], after, bool(axes(module, op))))
            else:
                stream = durations.stream(op) if isinstance(op, Transfer) else COMPUTE
                tasks.append(Task(op, stream, durations.seconds(op), after))
            after = (numbers[op],)
        behind.update((result, after) for result in op.results)
    return tasks


def length(tasks: Sequence[Task], order: Sequence[int], *, started: bool = True) -> float:
    """Seconds until everything is over. Where collectives are not `started`, each keeps the thread waiting."""
    ends = [0.0] * len(tasks)
    free = dict.fromkeys((task.stream for task in tasks), 0.0)
    now = 0.0
    for i in order:
        task = tasks[i]
        for j in task.after:
            if ends[j] > now:
                now = ends[j]
        if task.sends:
            free[task.stream] = ends[i] = max(now, free[task.stream]) + task.seconds
            now = now if started else ends[i]
        else:
            now = (max([now, *free.values()]) if task.barrier else now) + task.seconds
            ends[i] = now
    return max([now, *free.values()])
