"""Layers on stages, against every way of cutting."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc.ir.errors import DscError
from dsc.schedule.partition import Room, balanced, partition

COSTS = st.lists(st.integers(0, 9), min_size=1, max_size=9)


def largest(costs: list[int], sizes: tuple[int, ...], ranks: list[list[int]]) -> int:
    """What the busiest rank has."""
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    own = [sum(costs[a:b]) for a, b in pairwise(starts)]
    return max(sum(own[stage] for stage in stages) for stages in ranks)


def squares(costs: list[int], sizes: tuple[int, ...]) -> int:
    """The sum of squares of what stages have."""
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return sum(sum(costs[a:b]) ** 2 for a, b in pairwise(starts))


def every(count: int, stages: int) -> list[tuple[int, ...]]:
    """All ways to cut."""
    cuts = (((0, *inner, count)) for inner in combinations(range(1, count), stages - 1))
    return [tuple(b - a for a, b in pairwise(c)) for c in cuts]


@given(COSTS, st.integers(1, 9))
def test_the_largest_stage_is_the_least_possible(costs: list[int], stages: int) -> None:
    if stages > len(costs):
        with pytest.raises(DscError, match=f"{len(costs)} layers do not make {stages} stages"):
            partition(costs, stages)
        return
    ranks = [[s] for s in range(stages)]
    found = partition(costs, stages)
    assert len(found) == stages
    assert sum(found) == len(costs)
    assert min(found) >= 1
    ways = every(len(costs), stages)
    assert largest(costs, found, ranks) == min(largest(costs, sizes, ranks) for sizes in ways)
    assert squares(costs, found) == min(squares(costs, w) for w in ways if largest(costs, w, ranks) == largest(costs, found, ranks))


@given(st.lists(st.integers(1, 9), min_size=4, max_size=9))
def test_folded_stages_are_balanced_by_rank(costs: list[int]) -> None:
    """Ranks of opposite stages, as DualPipe has them: no worse than stages balanced for themselves, nor better than the best."""
    ranks = [[0, 3], [1, 2]]
    found = balanced(costs, ranks)
    assert sum(found) == len(costs)
    best = min(largest(costs, sizes, ranks) for sizes in every(len(costs), 4))
    assert best <= largest(costs, found, ranks) <= largest(costs, partition(costs, 4), ranks)


def test_a_heavy_last_layer_is_made_up_for_by_a_light_first_stage() -> None:
    """12 layers of 1 and a head of 5: alone the head's stage is the largest; its rank takes less of the other end."""
    costs = [1] * 12 + [5]
    ranks = [[0, 3], [1, 2]]
    assert largest(costs, balanced(costs, ranks), ranks) == 9  # half of 17, rounded up


@given(st.lists(st.integers(1, 9), min_size=4, max_size=9))
def test_stages_are_as_even_as_they_can_be_where_that_is_all_that_counts(costs: list[int]) -> None:
    """A pipeline that does nothing but fill waits for its largest stage."""
    alone = [[stage] for stage in range(4)]
    found = balanced(costs, [[0, 3], [1, 2]], fill=1e6)
    assert largest(costs, found, alone) == largest(costs, partition(costs, 4), alone)


@given(st.lists(st.integers(1, 9), min_size=4, max_size=9))
def test_what_a_ranks_stages_take_together_may_be_anything(costs: list[int]) -> None:
    """Such as the larger of the two, where they hide one another: no worse than at the start, nor better than the best."""
    ranks = [[0, 3], [1, 2]]

    def most(sizes: tuple[int, ...]) -> int:
        starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        own = [sum(costs[a:b]) for a, b in pairwise(starts)]
        return max(max(own[stage] for stage in stages) for stages in ranks)

    found = balanced(costs, ranks, lambda spans: max(sum(costs[a:b]) for a, b in spans))
    assert min(map(most, every(len(costs), 4))) <= most(found) <= most(partition(costs, 4))


WEIGHED = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=4, max_size=9)
"""What each layer costs, and what it needs."""


def needed(layers: list[tuple[int, int]], factors: list[int], ranks: list[list[int]], sizes: tuple[int, ...]) -> list[int]:
    """What each rank needs: its stages hold as many times what their layers need as the schedule says, more than one of them."""
    cuts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [sum(factors[s] * need for s in stages for _, need in layers[cuts[s] : cuts[s + 1]]) for stages in ranks]


def room(layers: list[tuple[int, int]], factors: list[int], ranks: list[list[int]], limit: int) -> Room:
    """The same as the placer is told it."""

    def needs(rank: int, spans: tuple[tuple[int, int], ...]) -> float:
        return sum(factors[s] * need for s, (a, b) in zip(ranks[rank], spans, strict=True) for _, need in layers[a:b])

    return Room(limit, needs)


@given(WEIGHED, st.permutations([1, 2, 3]), st.integers(0, 60))
def test_the_quickest_of_all_placements_that_fit_is_found(layers: list[tuple[int, int]], factors: list[int], limit: int) -> None:
    """As 1F1B has it: a rank has one stage, and holds more micro-batches the earlier that is. The ranks stand in any order."""
    costs, ranks = [cost for cost, _ in layers], [[1], [2], [0]]
    found = balanced(costs, ranks, room=room(layers, factors, ranks, limit))
    ways = {sizes: max(needed(layers, factors, ranks, sizes)) for sizes in every(len(costs), 3)}
    fitting = [sizes for sizes, most in ways.items() if most <= limit]
    if fitting:
        best = min(fitting, key=lambda sizes: (largest(costs, sizes, ranks), squares(costs, sizes)))
        assert found in fitting
        assert (largest(costs, found, ranks), squares(costs, found)) == (largest(costs, best, ranks), squares(costs, best))
    else:
        assert ways[found] == min(ways.values()), "what lacks least"


@given(
    WEIGHED, st.lists(st.integers(1, 3), min_size=4, max_size=4), st.integers(0, 60), st.sampled_from(([[0, 3], [1, 2]], [[0, 2], [1, 3]]))
)
def test_several_stages_on_a_rank_fit_where_that_is_found(
    layers: list[tuple[int, int]], factors: list[int], limit: int, ranks: list[list[int]]
) -> None:
    """A search near by, no proof: what it finds fits no worse than the placement without a bound, and is that one where that fits."""
    costs = [cost for cost, _ in layers]
    found, free = balanced(costs, ranks, room=room(layers, factors, ranks, limit)), balanced(costs, ranks)

    def lacking(sizes: tuple[int, ...]) -> int:
        return max(max(0, need - limit) for need in needed(layers, factors, ranks, sizes))

    assert sum(found) == len(costs)
    assert lacking(found) <= lacking(free)
    assert lacking(free) or found == free
