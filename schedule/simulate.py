"""What a schedule takes: when every step runs, how long ranks idle, and in which order they communicate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

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
    """A schedule in time, from 0: when each turn of `_turns` starts and ends, and each transfer."""

    schedule: Schedule
    turns: tuple[tuple[Number, Number], ...]
    sent: tuple[tuple[Number, Number], ...]

    @cached_property
    def time(self) -> Number:
        """How long the step of training takes."""
        return max(end for _, end in self.turns)

    @cached_property
    def bubbles(self) -> tuple[Number, ...]:
        """How long each rank idles."""
        busy: list[Number] = [0] * self.schedule.ranks
        for (rank, *_), (start, end) in zip(_turns(self.schedule), self.turns, strict=True):
            busy[rank] += end - start
        return tuple(self.time - each for each in busy)

    @cached_property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """Of each rank."""
        rows: list[list[Span]] = [[] for _ in self.schedule.rows]
        for (rank, cell, step, *_), (start, end) in zip(_turns(self.schedule), self.turns, strict=True):
            rows[rank].append(Span(step, cell, start, end))
        return tuple(map(tuple, rows))

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """From rank to rank, in the order in which what they send is made."""
        sends = [(token, send, rank, to) for rank, _, _, _, made in _turns(self.schedule) for token, send, to in made if send is not None]
        return tuple(Transfer(*what, *when) for what, when in zip(sends, self.sent, strict=True))


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
    free: list[Number] = [0] * plain.ranks
    come: dict[tuple[Token, int], Number] = {}
    link_free: dict[tuple[int, int], Number] = {}
    turns: list[tuple[Number, Number]] = []
    sent: list[tuple[Number, Number]] = []
    for rank, _, step, needed, made in _turns(plain):
        start = free[rank]
        for at in needed:
            if (there := come[at]) > start:
                start = there
        free[rank] = end = start + cost(step)
        turns.append((start, end))
        for token, send, target in made:
            come[token, rank] = end
            if send is not None:
                begin = max(end, link_free.get((rank, target), 0))
                come[token, target] = link_free[rank, target] = begin + delay(step)
                sent.append((begin, come[token, target]))
    return Timeline(plain, tuple(turns), tuple(sent))


Made = tuple[Token, Action | None, int]
"""What a step hands on, as which send, and to which rank; None where it stays."""


@lru_cache(maxsize=256)
def _turns(plain: Schedule) -> list[tuple[int, int, Step, list[tuple[Token, int]], list[Made]]]:
    """The steps of a schedule without sends in an order in which each finds what it needs: rank, cell, step, what it waits for and where
    that comes, and what it hands on. Many meshes follow one schedule."""
    found = []
    for rank, cell, step in execution(plain):
        made: list[Made] = []
        for action in step.parts:
            if (token := action.makes) is not None:
                send = sending(action, plain.stages)
                target = peer(plain, send) if send else rank
                made.append((token, send if target != rank else None, target))
        found.append((rank, cell, step, [(token, rank) for token in needs(step, plain.stages)], made))
    return found


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
