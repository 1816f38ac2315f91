"""A function on the streams of one rank: when each op runs, what communication it leaves exposed, and what of it is hidden.

The model of who runs a program: one thread goes through it in order and computes. A collective in flight runs beside it, after those that
were started before on the same link: each link is a stream, so what goes between nodes and what goes inside one do not wait for each other,
as NCCL's groups do not. Its `done` makes the thread wait. A collective that is not started keeps the thread waiting until it is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from ..ir.core import Func, Module, Op
from ..ir.ops.collective import Done, Transfer
from ..ir.ops.control import Call
from ..ir.ops.fused import Fused
from ..ir.walk import join

COMPUTE = "compute"
"""The stream of computation. Any other name is a link's."""


class Durations(Protocol):
    """How long an op takes, and where it runs. `hardware.cost.Costs` is one."""

    def seconds(self, op: Op) -> float:
        """Of one execution; 0 for what moves nothing."""
        ...

    def stream(self, op: Op) -> str:
        """`compute`, or the link over which ranks communicate."""
        ...


@dataclass(frozen=True)
class Costing:
    """What ops take: `alone`, where nothing runs beside them, and `beside` communication, which slows both down."""

    alone: Durations
    beside: Durations

    def within(self, func: Func) -> Durations:
        """What holds in a function: whether it has anything in flight."""
        return self.beside if any(isinstance(op, Done) for op in func.ops) else self.alone


@dataclass(frozen=True, slots=True)
class Span:
    """One execution of one op, in seconds from the start; `weights` is the prefix of the call that it is part of."""

    op: Op
    weights: str
    stream: str
    start: float
    end: float


@dataclass(frozen=True)
class Times:
    """A function as it ran: what takes time, in the order of the program."""

    spans: tuple[Span, ...]
    total: float

    def busy(self, stream: str) -> float:
        """Seconds that a stream works."""
        return sum(s.end - s.start for s in self.spans if s.stream == stream)

    @cached_property
    def computing(self) -> float:
        """Seconds of computation."""
        return self.busy(COMPUTE)

    @cached_property
    def sending(self) -> tuple[tuple[float, float], ...]:
        """When any link works."""
        return united((s.start, s.end) for s in self.spans if s.stream != COMPUTE)

    @cached_property
    def communicating(self) -> float:
        """Seconds in which any link works."""
        return sum(end - start for start, end in self.sending)

    @cached_property
    def exposed(self) -> float:
        """Seconds of communication during which nothing computes."""
        return self.communicating - _common(self.sending, united((s.start, s.end) for s in self.spans if s.stream == COMPUTE))

    @property
    def hidden(self) -> float:
        """The share of communication during which something computes; 1 where nothing is sent."""
        return hidden(self.exposed, self.communicating)


def hidden(exposed: float, communicating: float) -> float:
    """The share of communication that does not show."""
    return 1 - exposed / communicating if communicating else 1.0


def united(spans: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The union of some spans of time, in order."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(s for s in spans if s[1] > s[0]):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return tuple(found)


def _common(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    i = j = 0
    total = 0.0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def simulate(module: Module, durations: Durations | Costing, func: Func | None = None) -> Times:
    """One run of a function, by default of main, calls followed. With a `Costing` each function takes what holds in it."""
    run = _Run(module, durations)
    run.through(module.main if func is None else func, "")
    return Times(tuple(run.spans), max([run.now, *run.free.values()]))


@dataclass
class _Run:
    module: Module
    given: Durations | Costing
    now: float = 0.0
    """Where the thread is."""
    free: dict[str, float] = field(default_factory=dict)
    """When each link is."""
    spans: list[Span] = field(default_factory=list)
    known: dict[tuple[int, Op], tuple[float, str]] = field(default_factory=dict)
    """What ops take, and where: many functions run more than once."""

    def through(self, func: Func, prefix: str) -> None:
        durations = self.given.within(func) if isinstance(self.given, Costing) else self.given
        ends: dict[Op, float] = {}
        for op in func.ops:
            if isinstance(op, Call) and not isinstance(op, Fused):
                self.through(self.module[op.callee], join(prefix, op.weights))
                continue
            if isinstance(op, Done):
                self.now = max(self.now, ends.get(op.started, 0.0) if op.started else 0.0)
                continue
            key = id(durations), op
            if key not in self.known:
                self.known[key] = durations.seconds(op), durations.stream(op)
            seconds, stream = self.known[key]
            start = self.now if stream == COMPUTE else max(self.now, self.free.get(stream, 0.0))
            if stream != COMPUTE:
                self.free[stream] = start + seconds
            if isinstance(op, Transfer) and op.start:
                ends[op] = start + seconds
            else:
                self.now = start + seconds
            if seconds:
                self.spans.append(Span(op, prefix, stream, start, start + seconds))
