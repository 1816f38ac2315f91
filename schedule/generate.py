"""The published schedules, by name.

A model is cut into `stages`. `1f1b` gives one to each rank; `interleaved` and `zb1p` give each rank `chunks` of them, rank r the stages
r, r + ranks, ... (Narayanan et al., SC 2021; Qi et al., ICLR 2024; the order is that of torch.distributed.pipelining). `dualpipe` has a
rank for each stage, which also holds the stage that lies opposite, for micro-batches that go through the ranks in reverse; `dualpipev`
folds the stages into a V, so that a rank holds two that lie opposite and half as many ranks do (DeepSeek-V3 report, section 3.2.1;
github.com/deepseek-ai/DualPipe).
"""

from __future__ import annotations

from collections import deque

from ..ir.errors import require
from .actions import Action, Kind, Overlap, Schedule, Step

NAMES = ("1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")
SIMPLE = ("gpipe", "forward")
"""`gpipe` does all forwards, then all backwards (Huang et al., NeurIPS 2019); `forward` has no backward at all, as inference has none."""


def generate(name: str, stages: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The schedule `name`. `chunks`, the stages of a rank, is for `interleaved` (2 if not given), `zb1p` and `forward` (1).

    `DscError` where the schedule has no such form: each says what it takes.
    """
    require(name in (*NAMES, *SIMPLE), f"unknown schedule {name}, expected one of {', '.join((*NAMES, *SIMPLE))}")
    require(stages > 0, f"--stages is {stages}, expected 1 or more")
    require(microbatches > 0, f"--microbatches is {microbatches}, expected 1 or more")
    if name in ("dualpipe", "dualpipev"):
        require(chunks in (None, 2), f"--chunks is {chunks}, but a rank of {name} has 2")
        return dualpipe(stages, microbatches) if name == "dualpipe" else dualpipev(stages, microbatches)
    several = name in ("interleaved", "zb1p", "forward")
    require(chunks in (None, 1) or several, f"--chunks is {chunks}, but a rank of {name} has 1: interleaved takes more")
    if name == "gpipe":
        return Schedule(tuple(tuple(Action(k, s, m) for k in (Kind.F, Kind.B) for m in range(microbatches)) for s in range(stages)), name)
    per_rank = (2 if name == "interleaved" else 1) if chunks is None else chunks
    require(per_rank > 0, f"--chunks is {chunks}, expected 1 or more")
    require(stages % per_rank == 0, f"{stages} stages do not make ranks of {per_rank}")
    rows = _interleaved(stages // per_rank, microbatches, per_rank, name == "zb1p")
    if name == "forward":
        rows = [tuple(step for step in row if isinstance(step, Action) and step.kind is Kind.F) for row in rows]
    return Schedule(tuple(rows), name)


def _interleaved(ranks: int, microbatches: int, chunks: int, zero_bubble: bool) -> list[tuple[Step, ...]]:
    """1F1B in every form without overlap. Micro-batches go in rounds of about `ranks`: a round passes a rank's first chunk, then the next.

    Before its first backward, rank r does the forwards of all chunks but the last for one round, and then one for each rank behind it
    (two without zero bubble and with several chunks, for a backward takes as long to return as a forward to arrive). With zero bubble,
    backward is split, and W stays r behind: later ranks have that many forwards fewer in flight, so that memory is that of 1F1B
    everywhere.
    """
    rounds = max(1, microbatches // ranks)
    require(
        chunks == 1 or microbatches % rounds == 0,
        f"{microbatches} micro-batches do not make {rounds} equal rounds over {ranks} ranks, as several stages on a rank need",
    )
    per_round = microbatches // rounds if chunks > 1 else microbatches
    every = microbatches * chunks

    def action(kind: Kind, rank: int, i: int) -> Action:
        """The i-th of its kind on a rank."""
        turn, place = divmod(i, per_round * chunks)
        chunk, microbatch = divmod(place, per_round)
        return Action(kind, rank + ranks * (chunk if kind is Kind.F else chunks - 1 - chunk), turn * per_round + microbatch)

    rows: list[tuple[Step, ...]] = []
    for rank in range(ranks):
        ahead = ranks - 1 - rank
        before = min(every, (chunks - 1) * per_round + (ahead if zero_bubble or chunks == 1 else 2 * ahead))
        row = [action(Kind.F, rank, i) for i in range(before)]
        for i in range(every):
            if before + i < every:
                row.append(action(Kind.F, rank, before + i))
            row.append(action(Kind.I if zero_bubble else Kind.B, rank, i))
            if zero_bubble and i >= rank:
                row.append(action(Kind.W, rank, i - rank))
        if zero_bubble:
            row += [action(Kind.W, rank, i) for i in range(max(0, every - rank), every)]
        rows.append(tuple(row))
    return rows


def dualpipe(stages: int, microbatches: int) -> Schedule:
    """DualPipe: half of the micro-batches enter at rank 0, the other half, numbered after them, at the last rank."""
    fits = microbatches % 2 == 0 and microbatches >= 2 * stages
    require(stages % 2 == 0, f"--stages is {stages}, but dualpipe takes an even number")
    require(fits, f"--microbatches is {microbatches}, but dualpipe takes an even number, and at least 2 for each of {stages} stages")
    half, each = stages // 2, microbatches // 2
    rows = []
    for rank in range(stages):
        down, up = _Way(rank), _Way(stages - 1 - rank, each, reverse=True)
        near, far = (up, down) if rank >= half else (down, up)
        rows.append(_eight_steps(near, far, min(rank, stages - 1 - rank), half, each))
    return Schedule(tuple(rows), "dualpipe")


def dualpipev(stages: int, microbatches: int) -> Schedule:
    """DualPipeV: rank r holds stage r and stage `stages` - 1 - r, and every micro-batch goes down the ranks and back up."""
    require(stages % 2 == 0, f"--stages is {stages}, but dualpipev takes an even number: two for each rank")
    require(microbatches >= stages, f"--microbatches is {microbatches}, but dualpipev takes at least as many as there are stages, {stages}")
    ranks = stages // 2
    rows = [_eight_steps(_Way(rank), _Way(stages - 1 - rank), rank, ranks, microbatches) for rank in range(ranks)]
    return Schedule(tuple(rows), "dualpipev")


class _Way:
    """One of the two ways that micro-batches take through a rank: counts what is done."""

    def __init__(self, stage: int, first: int = 0, reverse: bool = False) -> None:
        self.stage, self.reverse = stage, reverse
        self.forwards = self.backwards = first

    def forward(self) -> Action:
        self.forwards += 1
        return Action(Kind.F, self.stage, self.forwards - 1, self.reverse)

    def backward(self, kind: Kind = Kind.B) -> Action:
        self.backwards += 1
        return Action(kind, self.stage, self.backwards - 1, self.reverse)


def _eight_steps(way0: _Way, way1: _Way, depth: int, half: int, each: int) -> tuple[Step, ...]:
    """The row of a rank that is `depth` ranks from where way 0 enters, of `half` depths in all; `each` micro-batches go each way.

    The eight steps are those of `dualpipe.py` and `dualpipev.py` in github.com/deepseek-ai/DualPipe.
    """
    row: list[Step] = []
    waiting: deque[Action] = deque()
    away = half - depth - 1

    def split(way: _Way) -> None:
        row.append(action := way.backward(Kind.I))
        waiting.append(Action(Kind.W, action.stage, action.microbatch, action.reverse))

    def weights() -> None:
        if waiting:
            row.append(waiting.popleft())

    for _ in range(2 * away):  # 1
        row.append(way0.forward())
    for _ in range(depth + 1):  # 2
        row += [way0.forward(), way1.forward()]
    for _ in range(away):  # 3
        split(way1)
        weights()
        row.append(way1.forward())
    for i in range(each - 2 * half + depth + 1):  # 4
        if i == 0 and away == 0:  # in the middle they run one after the other, which makes the bubble smaller
            row += [way0.forward(), way1.backward()]
        else:
            row.append(Overlap(way0.forward(), way1.backward()))
        row.append(Overlap(way1.forward(), way0.backward()))
    for _ in range(away):  # 5
        row += [way1.backward(), Overlap(way1.forward(), way0.backward())]
    for i in range(2 * (depth + 1)):  # 6: from the middle on, weights wait
        way = way0 if i % 2 else way1
        if i <= depth:
            row.append(way.backward())
        else:
            split(way)
    for _ in range(away):  # 7
        weights()
        split(way0)
    for _ in range(depth + 1):  # 8
        weights()
    return tuple(row)
