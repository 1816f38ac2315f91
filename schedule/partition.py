"""Placing layers on the stages of a pipeline: consecutive ones together, so that the stage that takes longest takes as little as can be,
and so that every rank has room for its stages where a `Room` says what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from ..ir.errors import require

Span = tuple[int, int]
"""The layers of a stage: the first, and the first after them."""
NEVER = float("inf")


@dataclass(frozen=True)
class Room:
    """What each rank has room for, and what one needs with such layers on its stages: never less with more layers."""

    limit: float
    needs: Callable[[int, tuple[Span, ...]], float]

    def lacking(self, ranks: Sequence[Sequence[int]], cuts: Sequence[int]) -> list[float]:
        """How much more each rank needs than there is, its stages being between these cuts."""
        needed = (self.needs(rank, tuple([(cuts[s], cuts[s + 1]) for s in stages])) for rank, stages in enumerate(ranks))
        return [max(0.0, needs - self.limit) for needs in needed]


def balanced(
    costs: Sequence[float],
    ranks: Sequence[Sequence[int]],
    together: Callable[[tuple[Span, ...]], float] | None = None,
    fill: float = 0.0,
    room: Room | None = None,
) -> tuple[int, ...]:
    """How many of the layers each stage takes, `ranks` saying which stages a rank has: the busiest rank has as little as can be found.

    A rank has the sum of its layers' costs, or what `together` says of the layers of its stages, where these hide one another's costs.
    Where each rank has one stage that is `partition`, the optimum. Else layers wander from the stages of the busiest rank, or to them, over
    the stages between, while that makes the most that a rank has less, or with it the sum of squares. The largest stage counts `fill` times
    besides: while a pipeline fills and drains a rank works on one stage, and the others wait for it.

    Of placements that have no `room` the one whose fullest rank lacks least is better, however busy ranks are. There layers wander between
    any stages.
    """
    count = 1 + max(stage for stages in ranks for stage in stages)
    if all(len(stages) == 1 for stages in ranks):
        rank_of = {stage: rank for rank, (stage,) in enumerate(ranks)}
        alone = room and Room(room.limit, lambda stage, spans: room.needs(rank_of[stage], spans))
        return partition(costs, count, alone)
    before = [0.0, *accumulate(costs)]
    of_rank = cache(together or (lambda spans: sum(before[b] - before[a] for a, b in spans)))

    def score(cuts: Sequence[int], room: Room | None = None) -> tuple[tuple[float, ...], int]:
        spans = list(pairwise(cuts))
        own = [before[b] - before[a] for a, b in spans]
        sums = [of_rank(tuple([spans[stage] for stage in stages])) for stages in ranks]
        lacking = room.lacking(ranks, cuts) if room else ()
        most, lacks = max(sums), max(lacking, default=0.0)
        worst = lacking.index(lacks) if lacks else sums.index(most)
        return (lacks, sum(lacking), most + fill * max(own), sum(x * x for x in (*sums, *own))), worst

    even = [0, *accumulate(partition(costs, count))]
    found = _wandered(even, ranks, score)
    if room and any(room.lacking(ranks, found)):
        within = [_wandered(start, ranks, lambda cuts: score(cuts, room)) for start in (found, even)]
        found = min(within, key=lambda cuts: score(cuts, room))
    return _sizes(found)


def _wandered(
    cuts: Sequence[int], ranks: Sequence[Sequence[int]], score: Callable[[Sequence[int]], tuple[tuple[float, ...], int]]
) -> list[int]:
    """Cuts that no layer makes better on its way from or to a stage of the worst rank, or where any rank lacks room, of any.

    `score` says how good cuts are, beginning with how much the fullest rank lacks, and which rank is the worst.
    """
    cuts, stages = list(cuts), range(len(cuts) - 1)
    best, worst = score(cuts)
    improved = True
    while improved:
        improved = False
        for tried in (ranks[worst], stages if best[0] else ()):  # a rank may have room once others have made it for theirs
            for stage, other in ((s, o) for s in tried for o in stages if o != s):
                first, last = min(stage, other) + 1, max(stage, other)
                for by in (1, -1):
                    moved = [c + by if first <= i <= last else c for i, c in enumerate(cuts)]
                    if all(a < b for a, b in pairwise(moved[first - 1 : last + 2])) and (found := score(moved))[0] < best:
                        cuts, (best, worst), improved = moved, found, True
            if improved:
                break
    return cuts


def _sizes(cuts: Sequence[int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in pairwise(cuts))


def partition(costs: Sequence[float], stages: int, room: Room | None = None) -> tuple[int, ...]:
    """How many of the layers each stage takes, in order: the largest sum is the least possible, and of such splits the sum of squares.

    A stage has one layer at least, and those that it has `room` for, a stage being a rank; where no split has room for all, it is one
    in which the fullest needs the least possible. Exact, by dynamic programming in O(stages x layers^2), first for the largest, then for
    the squares. `DscError` where there are fewer layers than stages.
    """
    count = len(costs)
    require(0 < stages <= count, f"{count} layers do not make {stages} stages; 1 to {count} would fit")
    before = [0.0, *accumulate(costs)]

    def own(stage: int, span: Span) -> float:
        return NEVER if room and room.needs(stage, (span,)) > room.limit else before[span[1]] - before[span[0]]

    most, _ = _cut(count, stages, own, max)
    if room and most == NEVER:
        return _cut(count, stages, lambda stage, span: room.needs(stage, (span,)), max)[1]
    return _cut(count, stages, lambda stage, span: x if (x := own(stage, span)) <= most else NEVER, lambda rest, own: rest + own * own)[1]


def _cut(
    count: int, stages: int, cost: Callable[[int, Span], float], join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The least that `join` makes of the stages' costs, one after the other, none of which is less with more layers; and their sizes."""
    best = [NEVER, *(join(0.0, cost(0, (0, end))) for end in range(1, count + 1))]
    cuts: list[list[int]] = []
    for stage in range(1, stages):
        row = [NEVER] * (count + 1)
        cut = [0] * (count + 1)
        for end in range(stage + 1, count + 1):
            for start in range(end - 1, stage - 1, -1):
                own = cost(stage, (start, end))
                if own == NEVER or join(0.0, own) > row[end]:
                    break  # a stage that begins earlier costs no less
                found = join(best[start], own)
                if found < row[end]:
                    row[end], cut[end] = found, start
        best = row
        cuts.append(cut)
    sizes = []
    end = count
    for cut in reversed(cuts):
        sizes.append(end - cut[end])
        end = cut[end]
    return best[count], (end, *reversed(sizes))
