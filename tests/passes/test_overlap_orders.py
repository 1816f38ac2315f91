"""Orders on two streams, against every order there is: random small graphs, whose optimum is found by trying all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsc.ir.core import Op
from dsc.ir.ops.control import Iota
from dsc.ir.types import DType
from dsc.passes.overlapping.order import candidates, exhausted, listed
from dsc.passes.overlapping.tasks import Task, length

OP: Op = Iota(1, DType.i32)


def graph(random: Random, count: int, chance: float) -> list[Task]:
    """Tasks of whole seconds, about every second a collective on either link, some of no length."""
    tasks: list[Task] = []
    for i in range(count):
        after = tuple(j for j in range(i) if random.random() < chance)
        stream = random.choice(("compute", "compute", "inter", "intra"))
        seconds = float(random.choice((0, 1, 2, 3, 5, 8, 13)))
        tasks.append(Task(OP, stream, seconds, after, barrier=stream == "compute" and random.random() < 0.1))  # type: ignore[arg-type]
    return tasks


def every_order(tasks: Sequence[Task], taken: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    if len(taken) == len(tasks):
        yield taken
    for i, task in enumerate(tasks):
        if i not in taken and set(task.after) <= set(taken):
            yield from every_order(tasks, (*taken, i))


def seconds(tasks: Sequence[Task], order: Sequence[int]) -> float:
    """The model said once more, event by event: a thread with a list of what it has to do, and a queue of collectives for each link."""
    thread, free = 0.0, {"inter": 0.0, "intra": 0.0}
    over: dict[int, float] = {}
    for i in order:
        for j in tasks[i].after:
            thread = max(thread, over[j])
        if tasks[i].stream != "compute":
            begins = max(thread, free[tasks[i].stream])
            over[i] = free[tasks[i].stream] = begins + tasks[i].seconds
        else:
            if tasks[i].barrier:
                thread = max(thread, *free.values())
            thread += tasks[i].seconds
            over[i] = thread
    return max([thread, *free.values(), *over.values()])


@given(random=st.randoms(use_true_random=False), count=st.integers(1, 7), chance=st.sampled_from((0.1, 0.25, 0.5)))
@settings(max_examples=150, deadline=None)
def test_the_best_candidate_is_within_three_percent_of_the_optimum(random: Random, count: int, chance: float) -> None:
    tasks = graph(random, count, chance)
    found = list(candidates(tasks))
    assert all(sorted(order) == list(range(count)) for order in found)
    assert all(set(tasks[i].after) <= set(order[:at]) for order in found for at, i in enumerate(order))
    assert [length(tasks, order) for order in found] == [seconds(tasks, order) for order in found]
    best = min(length(tasks, order) for order in found)
    assert best <= seconds(tasks, range(count))
    optimum = min(seconds(tasks, order) for order in every_order(tasks))
    assert optimum <= best <= 1.03 * optimum


@given(random=st.randoms(use_true_random=False), count=st.integers(20, 60))
@settings(max_examples=30, deadline=None)
def test_many_tasks(random: Random, count: int) -> None:
    """Never worse than program order, never better than either stream or the longest way."""
    tasks = graph(random, count, 3 / count)
    found = {order: length(tasks, order) for order in candidates(tasks)}
    assert all(set(tasks[i].after) <= set(order[:at]) for order in found for at, i in enumerate(order))
    assert min(found.values()) <= length(tasks, range(count))
    busy = [sum(t.seconds for t in tasks if t.stream == stream) for stream in ("compute", "inter", "intra")]
    assert min(found.values()) >= max(busy)


def test_a_window_keeps_tasks_near_their_turn() -> None:
    tasks = graph(Random(1), 40, 0.05)
    for window in (0, 3, 10):
        order = listed(tasks, [float(i) for i in range(40)], window)
        for at, i in enumerate(order):
            assert i <= min(set(range(40)) - set(order[:at])) + window


def test_the_search_finds_what_list_scheduling_does_not() -> None:
    """Two ways to the end of one length: the long computation must not come before the short one that a collective waits for."""
    tasks = [Task(OP, "compute", 5, ()), Task(OP, "compute", 1, ()), Task(OP, "inter", 5, (1,)), Task(OP, "compute", 1, (0,))]
    assert length(tasks, exhausted(tasks, (0, 1, 2, 3))) == 7 < length(tasks, (0, 1, 2, 3)) == 11


@pytest.mark.parametrize("started", [True, False])
def test_a_collective_that_is_not_started_keeps_the_thread_waiting(started: bool) -> None:
    tasks = [Task(OP, "inter", 5, ()), Task(OP, "compute", 4, ()), Task(OP, "compute", 1, (0,))]
    assert length(tasks, (0, 1, 2), started=started) == (6 if started else 10)
