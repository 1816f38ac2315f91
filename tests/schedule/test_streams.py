"""Tasks on streams: what runs when, held to the rules that any execution obeys, and to executions of small graphs in every order."""

from itertools import pairwise, permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from dsc.schedule.streams import COMM, COMPUTE, Run, Task, joined, listed, run


@st.composite
def graphs(draw: st.DrawFn, most: int = 12) -> tuple[Task, ...]:
    """Tasks of whole seconds with edges to earlier ones."""
    tasks = []
    for i in range(draw(st.integers(1, most))):
        after = tuple(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else ()
        tasks.append(Task(i, draw(st.sampled_from([COMPUTE, COMM])), draw(st.integers(0, 5)), after))
    return tuple(tasks)


def check(found: Run) -> None:
    """No task begins before what it waits for has ended, and a stream does one thing at a time."""
    ends = [s + t.seconds for s, t in zip(found.starts, found.tasks, strict=True)]
    for start, task in zip(found.starts, found.tasks, strict=True):
        assert all(start >= ends[i] for i in task.after)
    for stream in (COMPUTE, COMM):
        own = sorted((s, e) for s, e, t in zip(found.starts, ends, found.tasks, strict=True) if t.stream == stream and t.seconds)
        assert all(a[1] <= b[0] for a, b in pairwise(own))


@given(graphs())
def test_both_orders_can_run(tasks: tuple[Task, ...]) -> None:
    check(run(tasks))
    check(listed(tasks))


@given(graphs())
def test_listing_is_never_worse_than_program_order_nor_better_than_the_bounds(tasks: tuple[Task, ...]) -> None:
    found = listed(tasks)
    assert max(found.busy(COMPUTE), found.busy(COMM)) <= found.time <= run(tasks).time


@settings(max_examples=30)
@given(graphs(6))
def test_no_order_is_better_than_the_best_of_all(tasks: tuple[Task, ...]) -> None:
    """By trying every order: the list schedule lies between the best and twice it (Graham's bound for two streams)."""
    best = float("inf")
    for order in permutations(range(len(tasks))):
        place = {old: new for new, old in enumerate(order)}
        if all(place[j] < place[i] for i in order for j in tasks[i].after):
            moved = tuple(Task(i, tasks[i].stream, tasks[i].seconds, tuple(place[j] for j in tasks[i].after)) for i in order)
            best = min(best, run(moved).time)
    assert best <= listed(tasks).time <= 2 * best


@given(graphs())
def test_exposed_is_what_a_count_of_seconds_gives(tasks: tuple[Task, ...]) -> None:
    """Times are whole, so a second is computed in, sent in, or both."""
    found = listed(tasks)

    def busy(stream: str, second: int) -> bool:
        return any(t.stream == stream and s <= second < s + t.seconds for s, t in zip(found.starts, found.tasks, strict=True))

    alone = sum(busy(COMM, second) and not busy(COMPUTE, second) for second in range(int(found.time)))
    assert found.exposed == alone
    assert found.hidden == (1 - alone / found.busy(COMM) if found.busy(COMM) else 1)


@given(graphs(), graphs())
def test_joined_sequences_keep_their_order_and_edges(a: tuple[Task, ...], b: tuple[Task, ...]) -> None:
    both = joined(a, b)
    check(run(both))
    assert sorted(t.seconds for t in both) == sorted(t.seconds for t in (*a, *b))
    assert sum(len(t.after) for t in both) == sum(len(t.after) for t in (*a, *b))
    assert listed(both).time >= max(max(sum(t.seconds for t in (*a, *b) if t.stream == s) for s in (COMPUTE, COMM)), 0)


def test_a_pair_hides_what_a_chunk_alone_cannot() -> None:
    """Compute 2, send 3, compute 2: alone the sending shows; two micro-batches hide each other's all but where only one is left."""
    chunk = (Task("a", COMPUTE, 2), Task("b", COMM, 3, (0,)), Task("c", COMPUTE, 2, (1,)))
    assert listed(chunk).time == 7
    assert listed(chunk).exposed == 3
    pair = listed(joined(chunk, chunk))
    assert pair.time == 10  # 2, then 3 and 3 in a row beside 2 + 2, then the last 2
    assert pair.exposed == 2
