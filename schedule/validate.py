"""Whether a schedule can run and computes what a training step is: each micro-batch forward and backward once on each stage.

A lowered schedule is run as strictly as any transport could: a send ends when its receive does. What gets through that cannot hang
anywhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from operator import add
from typing import NoReturn

from ..ir.errors import DscError
from .actions import COMPUTE, Action, Kind, Number, Schedule, Step, Token

AROUND = 3
"""Cells that are shown on each side of the one that is wrong."""


def check(schedule: Schedule, most: Number | None = None) -> None:
    """Raise `DscError` at the first fault: one line that says what is wrong, and the part of the grid where, the cell marked.

    `most` is how many chunks of activations a rank has room for.
    """
    _check_counts(schedule)
    for _ in execution(schedule.compute()):
        pass
    if schedule.lowered:
        _check_transfers(schedule)
        _check_rendezvous(schedule)
    for rank, row in enumerate(in_flight(schedule)):
        cell = next((cell for cell, held in enumerate(row) if most is not None and held > most), None)
        if cell is not None:
            _fail(schedule.compute(), f"the rank holds the activations of {row[cell]:g} chunks, but has room for {most:g}", rank, cell)


def in_flight(
    schedule: Schedule, kept: Number | Sequence[Number] = 1, waiting: Number | Sequence[Number] | None = None
) -> tuple[tuple[Number, ...], ...]:
    """The chunks of activations that each rank holds while each of its computations runs, in that order.

    A chunk is held from its forward to the end of its backward, and counts what is `kept` of it: 1, or for each stage so many bytes, say.
    Where backward is split, I lets go of all but what is `waiting`, by default everything, W of that; where there is none, it is gone
    after its forward.
    """
    rows, states = _held(schedule)
    by_stage = [what if isinstance(what, Sequence) else [what] * schedule.stages for what in (kept, kept if waiting is None else waiting)]
    known = [_counted(held, *by_stage) for held in states]
    return tuple(tuple(map(known.__getitem__, row)) for row in rows)


def most_in_flight(schedule: Schedule, rank: int, kept: Mapping[int, Number], waiting: Mapping[int, Number]) -> Number:
    """The most that a rank holds at once, as `in_flight` has it, of what each of its stages keeps and lets wait."""
    return max(_counted(held, kept, waiting) for held in _fullest(schedule)[rank])


@lru_cache(maxsize=256)
def _fullest(schedule: Schedule) -> tuple[tuple[Held, ...], ...]:
    """What each rank holds at some time, but what is no more of anything than it holds at another."""
    rows, states = _held(schedule)
    found = []
    for row in rows:
        fullest: list[Held] = []
        for held in sorted((states[number] for number in set(row)), key=lambda held: -sum(whole + part for _, whole, part in held)):
            if not any(_within(held, other) for other in fullest):
                fullest.append(held)
        found.append(tuple(fullest))
    return tuple(found)


def _within(held: Held, other: Held) -> bool:
    """Whether there is no more of anything in it than in the other."""
    more = {stage: (whole, part) for stage, whole, part in other}
    return all(whole <= more.get(stage, (0, 0))[0] and part <= more.get(stage, (0, 0))[1] for stage, whole, part in held)


def _counted(held: Held, kept: _Counts, waiting: _Counts) -> Number:
    return sum([whole * kept[stage] + part * waiting[stage] for stage, whole, part in held])


_Counts = Sequence[Number] | Mapping[int, Number]
Held = tuple[tuple[int, int, int], ...]
"""What a rank holds: stage, and how many chunks of it, whole and for W alone."""


@lru_cache(maxsize=256)
def _held(schedule: Schedule) -> tuple[list[list[int]], list[Held]]:
    """What each rank holds while each of its computations runs, by number, and what the numbers stand for."""
    forward_only = all(action.kind is Kind.F for _, _, action in schedule.compute().actions())
    change = {Kind.F: (-int(forward_only), 0), Kind.B: (-1, 0), Kind.I: (-1, 1), Kind.W: (0, -1)}
    rows = []
    numbers: dict[Held, int] = {}
    for row in schedule.compute().rows:
        held: dict[int, tuple[int, int]] = {}
        found = []
        for step in row:
            for a in step.parts:
                whole, part = held.get(a.stage, (0, 0))
                held[a.stage] = whole + (a.kind is Kind.F), part
            found.append(numbers.setdefault(tuple([(stage, *counts) for stage, counts in held.items()]), len(numbers)))
            for a in step.parts:
                held[a.stage] = tuple(map(add, held[a.stage], change[a.kind]))
        rows.append(found)
    return rows, list(numbers)


def execution(schedule: Schedule) -> Iterator[tuple[int, int, Step]]:
    """(rank, cell, step) in an order in which every step finds what it needs. `DscError` where ranks wait for each other."""
    stages = schedule.stages
    reached = [0] * schedule.ranks
    done: set[Token] = set()
    waiting: defaultdict[Token, list[int]] = defaultdict(list)
    ready = list(range(schedule.ranks))[::-1]
    while ready:
        rank = ready.pop()
        while reached[rank] < len(schedule.rows[rank]):
            step = schedule.rows[rank][reached[rank]]
            missing = next((token for token in needs(step, stages) if token not in done), None)
            if missing is not None:
                waiting[missing].append(rank)
                break
            yield rank, reached[rank], step
            reached[rank] += 1
            for action in step.parts:
                if (token := action.makes) is not None:
                    done.add(token)
                    ready += waiting.pop(token, ())
    stuck = [rank for rank in range(schedule.ranks) if reached[rank] < len(schedule.rows[rank])]
    if stuck:
        rank = stuck[0]
        lacks = {token: stuck_rank for token, ranks in waiting.items() for stuck_rank in ranks}
        waits = "; ".join(
            f"rank {r} at {schedule.rows[r][reached[r]]} for {_told(token)}" for token, r in sorted(lacks.items(), key=lambda x: x[1])
        )
        _fail(schedule, f"no rank can go on: {waits}", rank, reached[rank])


def needs(step: Step, stages: int) -> tuple[Token, ...]:
    """What a step waits for; an overlapped pair for what both halves need."""
    return tuple(token for action in step.parts for token in action.needs(stages))


def _told(token: Token) -> str:
    kind, stage, microbatch = token
    return f"the {'output' if kind is Kind.F else 'gradient'} of {stage}{kind}{microbatch}"


def _check_counts(schedule: Schedule) -> None:
    """Every stage does F, and B or I and W, once for every micro-batch, on one rank, in that order; or all do F alone."""
    cells: dict[tuple[Kind, int, int], tuple[int, int]] = {}
    direction: dict[int, bool] = {}
    for rank, cell, action in schedule.actions():
        kind, stage, microbatch = action.kind, action.stage, action.microbatch
        if kind not in COMPUTE:
            continue
        home = schedule.home[stage, action.reverse]
        if home != rank:
            _fail(schedule, f"{action} is on rank {rank}, but rank {home} has stage {stage}", rank, cell)
        if direction.setdefault(microbatch, action.reverse) != action.reverse:
            _fail(schedule, f"{action} and other actions of micro-batch {microbatch} differ in direction", rank, cell)
        if (kind, stage, microbatch) in cells:
            _fail(schedule, f"{action} stands twice", rank, cell)
        cells[kind, stage, microbatch] = rank, cell
        if kind is Kind.B and any((half, stage, microbatch) in cells for half in (Kind.I, Kind.W)):
            _fail(schedule, f"{action} is I and W in one, and one of them stands before it", rank, cell)
        if kind in (Kind.I, Kind.W) and (Kind.B, stage, microbatch) in cells:
            _fail(schedule, f"{action} is part of {stage}B{microbatch}, which stands before it", rank, cell)
        first = {Kind.I: Kind.F, Kind.B: Kind.F, Kind.W: Kind.I}.get(kind)
        if first and (first, stage, microbatch) not in cells:
            _fail(schedule, f"{action} stands before its {stage}{first}{microbatch}", rank, cell)
    forward_only = all(kind is Kind.F for kind, _, _ in cells)
    wanted = [{Kind.F}] if forward_only else [{Kind.F, Kind.B}, {Kind.F, Kind.I, Kind.W}]
    for microbatch in range(schedule.microbatches):
        for stage in range(schedule.stages):
            have = {kind for kind in COMPUTE if (kind, stage, microbatch) in cells}
            if have in wanted:
                continue
            found = ", ".join(f"{stage}{kind}{microbatch}" for kind in sorted(have)) or "nothing"
            near = next((at for (_, s, m), at in cells.items() if (s, m) == (stage, microbatch)), None)
            rank, cell = near or (schedule.home.get((stage, direction.get(microbatch, False)), 0), 0)
            expected = "F" if forward_only else "F and B, or F, I and W"
            _fail(schedule, f"micro-batch {microbatch} on stage {stage}: found {found}, expected {expected}", rank, cell)


def sending(action: Action, stages: int) -> Action | None:
    """The send of what a computation makes, if another stage reads it."""
    forward = action.kind is Kind.F
    if action.makes is None or not 0 <= action.stage + (1 if forward else -1) < stages:
        return None
    return Action(Kind.SEND_F if forward else Kind.SEND_B, action.stage, action.microbatch, action.reverse)


def peer(schedule: Schedule, action: Action) -> int:
    """The rank at the other end of a send or a receive."""
    forward = action.kind in (Kind.SEND_F, Kind.RECV_B)
    return schedule.home[action.stage + (1 if forward else -1), action.reverse]


def counterpart(action: Action) -> Action:
    """The receive of a send, and the reverse: `2SEND_F0` and `3RECV_F0`."""
    kind, step = {
        Kind.SEND_F: (Kind.RECV_F, 1),
        Kind.RECV_F: (Kind.SEND_F, -1),
        Kind.SEND_B: (Kind.RECV_B, -1),
        Kind.RECV_B: (Kind.SEND_B, 1),
    }[action.kind]
    return Action(kind, action.stage + step, action.microbatch, action.reverse)


def _check_transfers(schedule: Schedule) -> None:
    """Every tensor that another rank reads is sent after it is made and received before it is read, once each, and nothing else is."""
    cells: dict[Action, tuple[int, int]] = {}
    reads: dict[Token, tuple[int, int, Action]] = {}
    for rank, cell, action in schedule.actions():
        if action.kind not in COMPUTE and action in cells:
            _fail(schedule, f"{action} stands twice", rank, cell)
        cells[action] = rank, cell
        reads |= {token: (rank, cell, action) for token in action.needs(schedule.stages) if token[1] != action.stage}
    used: set[Action] = set()
    for rank, cell, action in schedule.actions():
        send = sending(action, schedule.stages)
        if send is None or (target := peer(schedule, send)) == rank:
            continue
        receive = counterpart(send)
        used |= {send, receive}
        assert action.makes is not None
        _, read_at, reader = reads[action.makes]
        why = f"{reader} on rank {target} reads what {action} on rank {rank} makes"
        if cells.get(send, (-1, 0))[0] != rank:
            _fail(schedule, f"{why}, but rank {rank} has no {send}", rank, cell)
        if cells.get(receive, (-1, 0))[0] != target:
            _fail(schedule, f"{why}, but rank {target} has no {receive}", target, read_at)
        if cells[send][1] < cell:
            _fail(schedule, f"{send} stands before {action}, which makes what it sends", *cells[send])
        if cells[receive][1] > read_at:
            _fail(schedule, f"{receive} stands after {reader}, which reads what it receives", *cells[receive])
    for action, (rank, cell) in cells.items():
        if action.kind not in COMPUTE and action not in used:
            _fail(schedule, f"{action}: no rank reads what would be sent or received here", rank, cell)


def _check_rendezvous(schedule: Schedule) -> None:
    """Run the ranks, every send and receive blocking until the other end has come to it."""
    reached = [0] * schedule.ranks

    def head(rank: int) -> Step | None:
        row = schedule.rows[rank]
        while reached[rank] < len(row) and row[reached[rank]].parts[0].kind in COMPUTE:
            reached[rank] += 1
        return row[reached[rank]] if reached[rank] < len(row) else None

    ready = list(range(schedule.ranks))
    while ready:
        rank = ready.pop()
        while isinstance(action := head(rank), Action):
            other = peer(schedule, action)
            if head(other) != counterpart(action):
                break
            reached[rank] += 1
            reached[other] += 1
            ready.append(other)
    stuck = {rank: action for rank in range(schedule.ranks) if isinstance(action := head(rank), Action)}
    if stuck:
        waits = "; ".join(f"rank {rank} at {action} for rank {peer(schedule, action)}" for rank, action in stuck.items())
        rank = next(iter(stuck))
        _fail(schedule, f"no send meets its receive: {waits}", rank, reached[rank])


def _fail(schedule: Schedule, message: str, rank: int, cell: int) -> NoReturn:
    """Raise with the message and the grid around the cell."""
    first = max(0, cell - AROUND)
    columns = range(first, cell + AROUND + 1)
    lines = [["", *map(str, columns)]]
    for r, row in enumerate(schedule.rows):
        words = [str(row[c]) if c < len(row) else "" for c in columns]
        if r == rank and cell < len(row):
            words[cell - first] = f">{row[cell]}<"
        lines.append([f"rank {r}", *words])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    grid = ["  " + "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    raise DscError("\n".join([f"{schedule.name}, rank {rank}, cell {cell}: {message}", *grid]))
