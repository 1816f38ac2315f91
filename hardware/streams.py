"""A function on the streams of one rank: when each op runs, what communication it leaves exposed, and what of it is hidden.

The model of who runs a program: one thread goes through it in order and computes. A collective in flight runs beside it, after those that
were started before, on the one stream of communication; its `done` makes the thread wait. A collective that is not started keeps the thread
waiting from beginning to end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

from ..ir.core import Func, Module, Op
from ..ir.ops.collective import Done, Transfer
from ..ir.ops.control import Call
from ..ir.walk import join

Stream = Literal["compute", "comm"]


class Durations(Protocol):
    """How long an op takes, and where it runs. `hardware.cost.Costs` is one."""

    def seconds(self, op: Op) -> float:
        """Of one execution; 0 for what moves nothing."""
        ...

    def stream(self, op: Op) -> Stream:
        """`comm` for what ranks do together."""
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """One execution of one op, in seconds from the start; `weights` is the prefix of the call that it is part of."""

    op: Op
    weights: str
    stream: Stream
    start: float
    end: float


@dataclass(frozen=True)
class Times:
    """A function as it ran: what takes time, in the order of the program."""

    spans: tuple[Span, ...]
    total: float

    def busy(self, stream: Stream) -> float:
        """Seconds that a stream works."""
        return sum(s.end - s.start for s in self.spans if s.stream == stream)

    @cached_property
    def exposed(self) -> float:
        """Seconds of communication during which nothing computes."""
        computing = [s for s in self.spans if s.stream == "compute"]
        beside, at = 0.0, 0
        for sent in (s for s in self.spans if s.stream == "comm"):  # both in the order of time
            while at < len(computing) and computing[at].end <= sent.start:
                at += 1
            for one in computing[at:]:
                if one.start >= sent.end:
                    break
                beside += min(one.end, sent.end) - max(one.start, sent.start)
        return self.busy("comm") - beside

    @property
    def hidden(self) -> float:
        """The share of communication during which something computes; 1 where nothing is sent."""
        sent = self.busy("comm")
        return 1 - self.exposed / sent if sent else 1.0


def simulate(module: Module, durations: Durations, func: Func | None = None) -> Times:
    """One run of a function, by default of main, calls followed."""
    run = _Run(module, durations)
    run.through(module.main if func is None else func, "")
    return Times(tuple(run.spans), max(run.now, run.free))


@dataclass
class _Run:
    module: Module
    durations: Durations
    now: float = 0.0
    """Where the thread is."""
    free: float = 0.0
    """When the stream of communication is."""
    spans: list[Span] = field(default_factory=list)

    def through(self, func: Func, prefix: str) -> None:
        ends: dict[Op, float] = {}
        for op in func.ops:
            if isinstance(op, Call) and op.callee in self.module.by_name:
                self.through(self.module[op.callee], join(prefix, op.weights))
                continue
            if isinstance(op, Done):
                self.now = max(self.now, ends.get(op.started, 0.0) if op.started else 0.0)
                continue
            seconds, stream = self.durations.seconds(op), self.durations.stream(op)
            start = max(self.now, self.free) if stream == "comm" else self.now
            if stream == "comm":
                self.free = start + seconds
            if isinstance(op, Transfer) and op.start:
                ends[op] = start + seconds
            else:
                self.now = start + seconds
            if seconds:
                self.spans.append(Span(op, prefix, stream, start, start + seconds))
