"""Placement of experts: EPLB's published example, what every placement must hold, optima of all placements, and scores."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, combinations_with_replacement, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc.ir.errors import DscError
from dsc.passes.placement import (
    GOOD_ENOUGH,
    Placement,
    _spread,
    balanced,
    balancedness,
    best_balancedness,
    cross_node_copies,
    eplb_global,
    hierarchical,
    moved,
)

# The example of EPLB's README: 12 experts in 4 groups, 16 replicas, 8 GPUs, 2 nodes.
EPLB_LOADS = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
EPLB_SLOTS = ((5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1), (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1))

LAYERS, EXPERTS = 58, 256


def lognormal(sigma: float) -> list[list[float]]:
    draw = random.Random(1)
    return [[draw.lognormvariate(0, sigma) for _ in range(EXPERTS)] for _ in range(LAYERS)]


def zipf() -> list[list[float]]:
    draw = random.Random(1)
    return [draw.sample([1 / (i + 1) for i in range(EXPERTS)], EXPERTS) for _ in range(LAYERS)]


LOADS = {"lognormal 0.5": lognormal(0.5), "lognormal 1": lognormal(1.0), "zipf 1": zipf()}


def test_the_published_example_slot_for_slot() -> None:
    assert hierarchical(EPLB_LOADS, 16, 8, 2, 4).slots == EPLB_SLOTS


@pytest.mark.parametrize("name", LOADS)
def test_32_gpus_with_288_replicas(name: str) -> None:
    """The prefill unit of the DeepSeek-V3 report, section 3.4.1: EP32 with 32 redundant experts, on three synthetic loads."""
    found = balanced(LOADS[name], 288, 32, 4)
    scores = balancedness(LOADS[name], found)
    assert sum(scores) / LAYERS >= 0.99
    assert found.wasted == 0
    published = hierarchical(LOADS[name], 288, 32, 4, 8)
    assert sum(scores) > sum(balancedness(LOADS[name], published)), "EPLB's hierarchical policy is the lower"
    copies = cross_node_copies(LOADS[name], published, 8, 8, 4)
    assert sum(copies) < sum(cross_node_copies(LOADS[name], found, 8, 8, 4)), "what that policy is for: fewer copies cross nodes"


@pytest.mark.parametrize("name", LOADS)
def test_320_gpus_with_320_replicas(name: str) -> None:
    """The decode unit: one expert per GPU, so the bound is that of the largest replica."""
    found = balanced(LOADS[name], 320, 320, 40)
    bounds = best_balancedness(LOADS[name], 320, 320)
    assert all(score >= 0.99 * bound for score, bound in zip(balancedness(LOADS[name], found), bounds, strict=True))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], int, int, int, int]:
    """(loads, replicas, GPUs, nodes, groups) that every policy can place."""
    nodes, per_node, slots = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    gpus = nodes * per_node
    replicas = gpus * slots
    groups = nodes * draw(st.integers(1, 2))
    most = replicas // groups
    if most == 0:
        groups, most = nodes, replicas // nodes
    experts = groups * draw(st.integers(max(1, -(-slots // groups)), max(1, most, -(-slots // groups))))
    if not slots <= experts <= replicas:
        experts, groups, nodes = replicas, 1, 1
    load = st.lists(st.one_of(st.integers(0, 50), st.floats(0, 1e6)), min_size=experts, max_size=experts)
    return draw(st.lists(load, min_size=1, max_size=3)), replicas, gpus, nodes, groups


@given(cases())
def test_every_expert_has_a_slot_and_every_slot_an_expert(case: tuple[list[list[float]], int, int, int, int]) -> None:
    loads, replicas, gpus, nodes, groups = case
    experts = len(loads[0])
    for found in (
        balanced(loads, replicas, gpus, nodes),
        eplb_global(loads, replicas, gpus, nodes),
        hierarchical(loads, replicas, gpus, nodes, groups),
    ):
        for layer, slots in enumerate(found.slots):
            assert len(slots) == replicas
            assert set(slots) == set(range(experts))
            assert found.replicas(layer) == [slots.count(e) for e in range(experts)]
    own = balanced(loads, replicas, gpus, nodes)
    assert all(len(set(gpu)) == len(gpu) for layer in range(len(loads)) for gpu in own.on_gpus(layer))


def test_replicas_that_fit_nowhere_are_exchanged_in() -> None:
    """GPU 0 takes the heavy expert 1; 2, 3 and 4 fill GPU 1; then both replicas of 0 would have to go to GPU 0."""
    held = _spread([(1, 100.0), (2, 2.0), (3, 2.0), (4, 2.0), (0, 1.0), (0, 1.0)], 2, 3)
    assert [len(gpu) for gpu in held] == [3, 3]
    assert held[0] | held[1] == {0, 1, 2, 3, 4}
    assert held[0] & held[1] == {0}


@given(cases())
def test_groups_stay_on_one_node(case: tuple[list[list[float]], int, int, int, int]) -> None:
    loads, replicas, gpus, nodes, groups = case
    found = hierarchical(loads, replicas, gpus, nodes, groups)
    size = len(loads[0]) // groups
    for layer in range(len(loads)):
        on = [{expert // size for expert in held} for held in found.on_nodes(layer)]
        assert sum(map(len, on)) == groups == len(set().union(*on))


@given(cases())
def test_the_score_is_what_counting_tokens_gives(case: tuple[list[list[float]], int, int, int, int]) -> None:
    loads, replicas, gpus, nodes, _ = case
    found = balanced(loads, replicas, gpus, nodes)
    for layer, score in enumerate(balancedness(loads, found)):
        counts = Counter(found.slots[layer])
        received = [0.0] * gpus
        for slot, expert in enumerate(found.slots[layer]):
            received[slot * gpus // replicas] += loads[layer][expert] / counts[expert]
        assert math.isclose(score * max(received) * gpus, sum(received), rel_tol=1e-12, abs_tol=1e-300)
        assert score <= best_balancedness(loads, replicas, gpus)[layer] * (1 + 1e-12)


@given(cases())
def test_no_exchange_with_the_fullest_gpu_helps(case: tuple[list[list[float]], int, int, int, int]) -> None:
    loads, replicas, gpus, nodes, _ = case
    found = balanced(loads, replicas, gpus, nodes)
    for layer, load in enumerate(loads):
        counts, held = found.replicas(layer), found.on_gpus(layer)
        total = [sum(load[e] / counts[e] for e in gpu) for gpu in held]
        if max(total, default=0) * best_balancedness(loads, replicas, gpus)[layer] <= sum(total) / gpus * (1 + 2 * GOOD_ENOUGH):
            continue
        g = total.index(max(total))
        for h in range(gpus):
            for a in set(held[g]) - set(held[h]):
                for b in set(held[h]) - set(held[g]):
                    difference = load[a] / counts[a] - load[b] / counts[b]
                    assert max(total[g] - difference, total[h] + difference) >= total[g] * (1 - 1e-8)


def every_placement(experts: int, gpus: int, slots: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every way to fill GPUs with different experts, up to the order of GPUs, that leaves no expert out."""
    for held in combinations_with_replacement(tuple(combinations(range(experts), slots)), gpus):
        if len(set().union(*held)) == experts:
            yield held


@pytest.mark.parametrize(("experts", "gpus", "slots"), [(4, 3, 2), (5, 3, 2), (4, 2, 3), (6, 3, 2), (5, 4, 2)])
def test_against_the_optimum_of_all_placements(experts: int, gpus: int, slots: int) -> None:
    """With the same replicas of each expert no placement of these sizes is better; with any replicas none is above the bound."""
    draw = random.Random(experts * 100 + gpus)
    placements = [(Counter(e for gpu in held for e in gpu), held) for held in every_placement(experts, gpus, slots)]
    ratios = []
    for _ in range(25):
        load = [draw.lognormvariate(0, 1) for _ in range(experts)]
        found = balanced([load], gpus * slots, gpus)
        (own,), (bound,) = balancedness([load], found), best_balancedness([load], gpus * slots, gpus)
        scores = [(sum(load) / gpus / max(sum(load[e] / counts[e] for e in gpu) for gpu in held), counts) for counts, held in placements]
        best = max(score for score, _ in scores)
        assert best <= bound * (1 + 1e-12)
        same = max(score for score, counts in scores if [counts[e] for e in range(experts)] == found.replicas(0))
        assert own == pytest.approx(same, rel=GOOD_ENOUGH)
        ratios.append(own / best)
    print(f"{experts} experts, {gpus} GPUs: mean {sum(ratios) / len(ratios):.4f}, least {min(ratios):.4f} of the optimum with any replicas")


def test_a_placement_stays_near_the_one_before() -> None:
    """Loads that drift a little: renumbered GPUs keep most of their experts."""
    before = balanced(LOADS["lognormal 0.5"][:4], 288, 32, 4)
    draw = random.Random(2)
    drifted = [[w * draw.uniform(0.95, 1.05) for w in load] for load in LOADS["lognormal 0.5"][:4]]
    fresh, near = balanced(drifted, 288, 32, 4), balanced(drifted, 288, 32, 4, previous=before)
    assert sum(moved(near, before)) < sum(moved(fresh, before))
    assert balancedness(drifted, near) == pytest.approx(balancedness(drifted, fresh), rel=1e-12)
    assert moved(before, before) == [0, 0, 0, 0]


def test_copies_are_those_of_uniform_routing() -> None:
    """Equal loads, 256 experts on 8 nodes, top 8: 3.629 nodes with 4 of 8 groups, 5.295 = N(1 - C(E - E/N, k)/C(E, k)) without."""
    plain = Placement((tuple(range(EXPERTS)),), EXPERTS, 64, 8)
    (grouped,), (free,) = cross_node_copies([[3.0] * EXPERTS], plain, 8, 8, 4), cross_node_copies([[3.0] * EXPERTS], plain, 8)
    assert free / (1 - 1 / 8) == pytest.approx(8 * (1 - math.comb(224, 8) / math.comb(256, 8)), rel=1e-12)
    assert grouped / (1 - 1 / 8) == pytest.approx(3.629, abs=5e-4)


@pytest.mark.parametrize("shared", [(), (6,)])
def test_copies_against_all_choices(shared: tuple[int, ...]) -> None:
    """A small layer: every choice of groups and experts, weighted by its loads, every choice of replicas, counted one by one."""
    load, top_k, groups, top_groups = [3.0, 1.0, 2.0, 5.0, 0.5, 1.5], 2, 3, 2
    slots = (0, 3, 1, 2, 3, 4, 6, 5, 0, 6, 6, 2) if shared else (0, 3, 1, 2, 3, 4, 5, 0)
    placement = Placement((slots,), 6 + len(shared), 4, 2)
    homes = [[node for node, held in enumerate(placement.on_nodes(0)) for e in held if e == expert] for expert in range(7)]
    total = reached = 0.0
    for taken in combinations(range(groups), top_groups):
        for chosen in combinations([e for e in range(6) if e // 2 in taken], top_k):
            weight = math.prod(load[e] for e in chosen)
            served = [set(nodes) for nodes in product(*(homes[e] for e in (*chosen, *shared)))]
            total += weight
            reached += weight * sum(map(len, served)) / len(served)
    every = [*load, *(0.0 for _ in shared)]  # what the shared expert's load is does not matter
    found = cross_node_copies([every], placement, top_k, groups, top_groups, bool(shared))
    assert found[0] == pytest.approx(reached / total / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ((0, 1, 2, 2), "placement, layer 0: expert [3] of 4 has no slot"),
        ((0, 1, 2, 4), "placement, layer 0: there is no expert [4], expected 0 to 3"),
        ((0, 1, 2), "3 replicas do not make equal shares for 2 GPUs: 2 or 4 would"),
    ],
)
def test_faulty_placements_are_refused(slots: tuple[int, ...], message: str) -> None:
    with pytest.raises(DscError) as error:
        Placement((slots,), 4, 2)
    assert str(error.value) == message


def test_what_cannot_be_placed_is_refused() -> None:
    loads = [[1.0] * 8]
    for call, message in (
        (lambda: balanced(loads, 9, 2), "9 replicas do not make equal shares for 2 GPUs: 8 or 10 would"),
        (lambda: balanced(loads, 6, 2), "6 replicas cannot hold 8 experts: 8 or more would"),
        (lambda: balanced(loads, 18, 2), "18 replicas of 8 experts: at most 16 differ on 2 GPUs"),
        (lambda: balanced([[1.0], [1.0, 2.0]], 2, 2), "expected as many experts in every layer, found 1, 2"),
        (lambda: balanced([[1.0, float("nan")]], 2, 2), "layer 0: expected loads of 0 or more, found 1.0 to 1.0"),
        (
            lambda: hierarchical(loads, 8, 4, 2, 3),
            "3 expert groups of 8 experts over 2 nodes: expected equal groups, equally many on each node",
        ),
        (lambda: eplb_global(loads, 8, 4, 3), "4 GPUs do not make equal shares for 3 nodes: 1, 2, 4 would"),
    ):
        with pytest.raises(DscError) as error:
            call()
        assert str(error.value) == message
