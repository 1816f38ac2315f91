"""Pipeline schedules as data and as text: what each rank does, in order.

An action is written as torch.distributed.pipelining writes it: stage, kind, micro-batch. `2F0` is the forward of micro-batch 0 on stage
2, `B` a full backward, `I` its part for inputs and `W` that for weights, `2SEND_F0` and `3RECV_F0` the way of its result to the next
stage, `SEND_B` and `RECV_B` that of a gradient to the stage before. `(0F7;7B3)OVERLAP_F_B` is a forward and a backward that run as one,
their communication hidden under the other's computation. What torch does not have: `7F10@r` belongs to a micro-batch that goes through
the ranks in reverse, as half of DualPipe's do.

A schedule is a CSV with a row for each rank and an action in each cell; empty cells and lines mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

from ..ir.errors import DscError, require

Number = float
"""Of times and sizes. Any ordered field will do: with `fractions.Fraction` every result is exact."""


class Kind(StrEnum):
    """What an action does, in torch's words."""

    F = "F"
    I = "I"  # noqa: E741 - the name that the field and torch use
    W = "W"
    B = "B"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"


COMPUTE = frozenset({Kind.F, Kind.I, Kind.W, Kind.B})

Token = tuple[Kind, int, int]
"""A tensor that actions hand on: (F, s, m) is the output of stage s for micro-batch m, (B, s, m) the gradient of its input."""


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a rank does for one stage and micro-batch."""

    kind: Kind
    stage: int
    microbatch: int
    reverse: bool = False

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}{'@r' if self.reverse else ''}"

    @property
    def parts(self) -> tuple[Action, ...]:
        """The action itself; `Overlap` has two."""
        return (self,)

    @property
    def makes(self) -> Token | None:
        """What a computation hands on."""
        match self.kind:
            case Kind.F:
                return Kind.F, self.stage, self.microbatch
            case Kind.I | Kind.B:
                return Kind.B, self.stage, self.microbatch
        return None

    def needs(self, stages: int) -> tuple[Token, ...]:
        """What a computation waits for: the stage before it, or in backward the one after it, and what it did itself before."""
        stage, microbatch = self.stage, self.microbatch
        match self.kind:
            case Kind.F:
                return ((Kind.F, stage - 1, microbatch),) if stage else ()
            case Kind.I | Kind.B:
                after = ((Kind.B, stage + 1, microbatch),) if stage + 1 < stages else ()
                return (Kind.F, stage, microbatch), *after
            case Kind.W:
                return ((Kind.B, stage, microbatch),)
        return ()


@dataclass(frozen=True, slots=True)
class Overlap:
    """A forward and a full backward that run as one."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"

    @property
    def parts(self) -> tuple[Action, ...]:
        """The forward and the backward."""
        return self.forward, self.backward


Step = Action | Overlap


@dataclass(frozen=True)
class Schedule:
    """What each rank does, in order. `str` gives the CSV that `parse` reads."""

    rows: tuple[tuple[Step, ...], ...]
    name: str = "schedule"

    def __str__(self) -> str:
        return "".join(",".join(map(str, row)) + "\n" for row in self.rows)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.rows, self.name))

    @property
    def ranks(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    @cached_property
    def stages(self) -> int:
        """How many stages the model is cut into."""
        return 1 + max(action.stage for _, _, action in self.actions())

    @cached_property
    def microbatches(self) -> int:
        """How many micro-batches there are, those in reverse included."""
        return 1 + max(action.microbatch for _, _, action in self.actions())

    @cached_property
    def home(self) -> dict[tuple[int, bool], int]:
        """The rank that computes a stage, for micro-batches in that direction."""
        found: dict[tuple[int, bool], int] = {}
        for rank, _, action in self.actions():
            if action.kind in COMPUTE:
                found.setdefault((action.stage, action.reverse), rank)
        return found

    @cached_property
    def lowered(self) -> bool:
        """Whether sends and receives stand in it."""
        return any(action.kind not in COMPUTE for _, _, action in self.actions())

    def actions(self) -> Iterator[tuple[int, int, Action]]:
        """(rank, cell, action) for every action, the parts of overlapped ones apart."""
        for rank, row in enumerate(self.rows):
            for cell, step in enumerate(row):
                for action in step.parts:
                    yield rank, cell, action

    def compute(self) -> Schedule:
        """The schedule without sends and receives."""
        return replace(self, rows=tuple(tuple(s for s in row if s.parts[0].kind in COMPUTE) for row in self.rows)) if self.lowered else self


ACTION = re.compile(rf"([0-9]{{1,9}})({'|'.join(sorted(Kind, key=len, reverse=True))})([0-9]{{1,9}})(@r)?")
OVERLAP = re.compile(r"\(([^;]*);([^;]*)\)OVERLAP_F_B")


def parse(text: str, name: str = "schedule") -> Schedule:
    """The schedule in a CSV. `DscError` names the row and cell that is no action."""
    rows = []
    for rank, line in enumerate(filter(str.strip, text.splitlines())):
        steps = []
        for cell, word in enumerate(line.split(",")):
            if word.strip():
                try:
                    steps.append(parse_step(word.strip()))
                except DscError as error:
                    raise DscError(f"{name}, row {rank}, cell {cell}: {error}") from None
        require(bool(steps), f"{name}, row {rank}: a rank without actions")
        rows.append(tuple(steps))
    require(bool(rows), f"{name}: expected a CSV with a row of actions for each rank, found no action")
    return Schedule(tuple(rows), name)


def parse_step(word: str) -> Step:
    """The action, or the overlapped pair, that `word` says."""
    if pair := OVERLAP.fullmatch(word):
        forward, backward = map(parse_step, pair.groups())
        if isinstance(forward, Action) and isinstance(backward, Action) and (forward.kind, backward.kind) == (Kind.F, Kind.B):
            return Overlap(forward, backward)
        raise DscError(f"found {word!r}, expected an F and a B to overlap, such as (0F7;7B3)OVERLAP_F_B")
    found = ACTION.fullmatch(word)
    if found is None:
        raise DscError(f"found {word!r}, expected stage, one of {', '.join(Kind)} and micro-batch, such as 2F0")
    stage, kind, microbatch, reverse = found.groups()
    return Action(Kind(kind), int(stage), int(microbatch), reverse is not None)
