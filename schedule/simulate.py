"""What a schedule takes: when every step runs, how long ranks idle, and in which order they communicate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from ..ir.errors import DscError, require
from .actions import Action, Kind, Number, Overlap, Schedule, Step, Token
from .validate import counterpart, execution, needs, peer, sending


@dataclass(frozen=True)
class Durations:
    """How long the steps of a chunk (a stage of one rank) take, in any unit. A full backward, B, is I and W.

    `overlap` is a forward and a full backward as one, F + B where it is not given. `comm` passes between the end of a step and the moment
    at which what it made has come to another rank; the link to that rank carries one tensor at a time. `comm_overlap` is the same for
    overlapped pairs, whose transfers may go on inside them (DeepSeek-V3 report, figure 4: 0); without it, it is `comm`.
    """

    F: Number = 1
    I: Number = 1  # noqa: E741 - the name that the field and torch use
    W: Number = 1
    overlap: Number | None = None
    comm: Number = 0
    comm_overlap: Number | None = None

    @property
    def B(self) -> Number:
        """A full backward."""
        return self.I + self.W

    @property
    def FB(self) -> Number:
        """An overlapped pair."""
        return self.F + self.B if self.overlap is None else self.overlap

    def __call__(self, step: Step) -> Number:
        """How long `step` takes."""
        if isinstance(step, Overlap):
            return self.FB
        return {Kind.F: self.F, Kind.I: self.I, Kind.W: self.W, Kind.B: self.B}[step.kind]

    def transfer(self, step: Step) -> Number:
        """How long what `step` made is under way after it."""
        return self.comm if self.comm_overlap is None or isinstance(step, Action) else self.comm_overlap

    def scaled(self, part: Number) -> Durations:
        """Those of a chunk that is `part` of this one. What a transfer takes does not depend on that."""
        overlap = None if self.overlap is None else self.overlap * part
        return replace(self, F=self.F * part, I=self.I * part, W=self.W * part, overlap=overlap)


def parse_durations(text: str) -> Durations:
    """`F=1,I=1,W=0.8,overlap=2.5,comm=0.1`; what is not named keeps its default. `B=2` is I and W in equal parts."""
    found: dict[str, Number] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        known = (*Durations.__dataclass_fields__, "B")
        require(name.strip() in known, f"--durations: unknown {name.strip()!r}, expected some of {', '.join(known)}, such as F=1,I=1,W=0.8")
        try:
            number = float(value)
        except ValueError:
            raise DscError(f"--durations: {item!r}, expected a number, such as {name}=1") from None
        require(0 <= number < float("inf"), f"--durations: {item!r}, expected a number of 0 or more")
        found[name.strip()] = int(number) if number == int(number) else number
    if (full := found.pop("B", None)) is not None:
        require(not {"I", "W"} & found.keys(), "--durations: B is I and W: expected B, or I and W")
        found |= {"I": full / 2, "W": full / 2}
    durations = Durations(**found)
    require(min(durations.F, durations.I, durations.FB) > 0, "--durations: F, I and overlap are expected to take time")
    return durations


@dataclass(frozen=True, slots=True)
class Span:
    """When a step runs, `cell` being its place in the row of its rank."""

    step: Step
    cell: int
    start: Number
    end: Number


@dataclass(frozen=True, slots=True)
class Transfer:
    """When a tensor goes from one rank to another, and as which action."""

    token: Token
    send: Action
    source: int
    target: int
    start: Number
    end: Number


@dataclass(frozen=True)
class Timeline:
    """A schedule in time, from 0."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    transfers: tuple[Transfer, ...]

    @cached_property
    def time(self) -> Number:
        """How long the step of training takes."""
        return max(row[-1].end for row in self.spans if row)

    @cached_property
    def bubbles(self) -> tuple[Number, ...]:
        """How long each rank idles."""
        return tuple(self.time - sum(span.end - span.start for span in row) for row in self.spans)


def simulate(
    schedule: Schedule,
    durations: Durations | Callable[[Step], Number] | None = None,
    transfer: Callable[[Step], Number] | None = None,
) -> Timeline:
    """Run a schedule that `check` passes: each step as soon as its rank is free and what it needs has come.

    `durations` may be any function of the step, for stages that differ, and `transfer` another, of the time for which what a step made is
    under way to another rank. Sends and receives that stand in the schedule are not waited for in order: transfers run beside
    computation.
    """
    cost = durations or Durations()
    delay = transfer or (cost.transfer if isinstance(cost, Durations) else lambda step: 0)
    plain = schedule.compute()
    spans: list[list[Span]] = [[] for _ in plain.rows]
    come: dict[tuple[Token, int], Number] = {}
    link_free: dict[tuple[int, int], Number] = {}
    transfers: list[Transfer] = []
    for rank, cell, step in execution(plain):
        start = max((come[token, rank] for token in needs(step, plain.stages)), default=0)
        if spans[rank]:
            start = max(start, spans[rank][-1].end)
        end = start + cost(step)
        spans[rank].append(Span(step, cell, start, end))
        for action in step.parts:
            if (token := action.makes) is None:
                continue
            come[token, rank] = end
            if (send := sending(action, plain.stages)) and (target := peer(plain, send)) != rank:
                begin = max(end, link_free.get((rank, target), 0))
                come[token, target] = link_free[rank, target] = begin + delay(step)
                transfers.append(Transfer(token, send, rank, target, begin, come[token, target]))
    return Timeline(plain, tuple(map(tuple, spans)), tuple(transfers))


def lower(timeline: Timeline) -> Schedule:
    """The schedule with sends and receives, in the order of the simulated time.

    What is sent stands right after the step that made it, and its receive in the other rank's row where that rank then is. Sends and
    receives are so placed in pairs along one order of time: ranks that take them in turn, even blocking, cannot wait for each other in a
    ring.
    """
    made = {transfer.send: transfer for transfer in timeline.transfers}
    order: list[tuple[Number, int, int, Step | Transfer]] = []
    for rank, row in enumerate(timeline.spans):
        for span in row:
            order.append((span.start, 1, rank, span.step))
            sends = (sending(action, timeline.schedule.stages) for action in span.step.parts)
            order += [(span.end, 0, rank, made[send]) for send in sends if send in made]
    rows: list[list[Step]] = [[] for _ in timeline.spans]
    for _, _, rank, item in sorted(order, key=lambda entry: entry[:3]):
        if isinstance(item, Transfer):
            rows[rank].append(item.send)
            rows[item.target].append(counterpart(item.send))
        else:
            rows[rank].append(item)
    return replace(timeline.schedule, rows=tuple(map(tuple, rows)))
