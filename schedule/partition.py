"""Placing layers on the stages of a pipeline: consecutive ones together, so that the stage that takes longest takes as little as can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise

from ..ir.errors import require

Span = tuple[int, int]
"""The layers of a stage: the first, and the first after them."""


def balanced(
    costs: Sequence[float],
    ranks: Sequence[Sequence[int]],
    together: Callable[[tuple[Span, ...]], float] | None = None,
    fill: float = 0.0,
) -> tuple[int, ...]:
    """How many of the layers each stage takes, `ranks` saying which stages a rank has: the busiest rank has as little as can be found.

    A rank has the sum of its layers' costs, or what `together` says of the layers of its stages, where these hide one another's costs.
    Begins with `partition`, and lets layers wander from the stages of the busiest rank, or to them, over the stages between, while that
    makes the most that a rank has less, or with it the sum of squares. Where each rank has one stage `partition` is the optimum. The
    largest stage counts `fill` times besides: while a pipeline fills and drains a rank works on one stage, and the others wait for it.
    """
    before = [0.0, *accumulate(costs)]
    of_rank = cache(together or (lambda spans: sum(before[b] - before[a] for a, b in spans)))
    count = 1 + max(stage for stages in ranks for stage in stages)
    cuts = [0, *accumulate(partition(costs, count))]
    if all(len(stages) == 1 for stages in ranks):
        return _sizes(cuts)

    def score(cuts: Sequence[int]) -> tuple[tuple[float, float], int]:
        spans = list(pairwise(cuts))
        own = [before[b] - before[a] for a, b in spans]
        sums = [of_rank(tuple(spans[stage] for stage in stages)) for stages in ranks]
        most = max(sums)
        return (most + fill * max(own), sum(x * x for x in (*sums, *own))), sums.index(most)

    best, busiest = score(cuts)
    improved = True
    while improved:
        improved = False
        for stage, other in ((s, o) for s in ranks[busiest] for o in range(count) if o != s):
            first, last = min(stage, other) + 1, max(stage, other)
            for by in (1, -1):
                moved = [c + by if first <= i <= last else c for i, c in enumerate(cuts)]
                if all(a < b for a, b in pairwise(moved[first - 1 : last + 2])) and (found := score(moved))[0] < best:
                    cuts, (best, busiest), improved = moved, found, True
    return _sizes(cuts)


def _sizes(cuts: Sequence[int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in pairwise(cuts))


def partition(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """How many of the layers each stage takes, in order: the largest sum is the least possible, and of such splits the sum of squares.

    A stage has one layer at least. Exact, by dynamic programming in O(stages x layers^2), first for the largest, then for the squares.
    `DscError` where there are fewer layers than stages.
    """
    require(0 < stages <= len(costs), f"{len(costs)} layers do not make {stages} stages; 1 to {len(costs)} would fit")
    before = [0.0, *accumulate(costs)]
    most, _ = _cut(before, stages, max, float("inf"))
    return _cut(before, stages, lambda rest, own: rest + own * own, most)[1]


def _cut(before: Sequence[float], stages: int, join: Callable[[float, float], float], cap: float) -> tuple[float, tuple[int, ...]]:
    """The least that `join` makes of the stages' costs, one after the other, where none is above `cap`; and the sizes of the stages."""
    count, never = len(before) - 1, float("inf")
    best = [join(0.0, total) if total <= cap else never for total in before]
    cuts: list[list[int]] = []
    for stage in range(1, stages):
        row = [never] * (count + 1)
        cut = [0] * (count + 1)
        for end in range(stage + 1, count + 1):
            for start in range(end - 1, stage - 1, -1):
                own = before[end] - before[start]
                if own > cap or join(0.0, own) > row[end]:
                    break  # costs are not negative: a stage that begins earlier costs more
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
