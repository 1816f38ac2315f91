"""A function as tasks on two streams, and how long an order of them takes.

One thread issues the tasks in the order; computing keeps it busy, a collective runs beside it, after the collectives issued before. A task
waits for the collectives that it reads. Weights, and views that take no time, are no tasks: they stand before their first reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...hardware.streams import Durations, Stream, simulate
from ...ir.core import Func, Module, Op, Trait, Value
from ...ir.flight import axes
from ...ir.ops.collective import Transfer, reads
from ...ir.ops.control import Call


@dataclass(frozen=True, slots=True)
class Task:
    """Work of `seconds` on `stream` after the tasks that `after` numbers. A `barrier` waits for all collectives issued before it."""

    op: Op
    stream: Stream
    seconds: float
    after: tuple[int, ...]
    barrier: bool = False


def tasks_of(module: Module, func: Func, durations: Durations) -> list[Task]:
    """The tasks of a function, in its order. A call that communicates is a barrier; it takes as long as what it runs."""
    numbers: dict[Op, int] = {}
    behind: dict[Value, tuple[int, ...]] = {p: () for p in func.params}
    called: dict[str, float] = {}
    tasks: list[Task] = []
    for op in func.ops:
        after = tuple(dict.fromkeys(n for v in reads(op) for n in behind[v]))
        free = Trait.SOURCE in op.traits or (Trait.VIEW in op.traits and not durations.seconds(op))
        if not free:
            numbers[op] = len(tasks)
            if isinstance(op, Call):
                if op.callee not in called:
                    called[op.callee] = simulate(module, durations, module[op.callee]).total
                tasks.append(Task(op, "compute", called[op.callee], after, bool(axes(module, op))))
            else:
                stream: Stream = "comm" if isinstance(op, Transfer) else "compute"
                tasks.append(Task(op, stream, durations.seconds(op), after))
            after = (numbers[op],)
        behind.update((result, after) for result in op.results)
    return tasks


def length(tasks: Sequence[Task], order: Sequence[int], *, started: bool = True) -> float:
    """Seconds until everything is over. Where collectives are not `started`, each keeps the thread waiting."""
    ends = [0.0] * len(tasks)
    now = free = 0.0
    for i in order:
        task = tasks[i]
        now = max([now, *(ends[j] for j in task.after)])
        if task.stream == "comm":
            free = ends[i] = max(now, free) + task.seconds
            now = now if started else free
        else:
            now = (max(now, free) if task.barrier else now) + task.seconds
            ends[i] = now
    return max(now, free)
