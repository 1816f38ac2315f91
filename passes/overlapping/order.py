"""Orders of tasks: list scheduling by several priorities, and an exhaustive search where there are few tasks.

List scheduling takes, whenever the thread is free, the ready task of highest priority, collectives first: they run beside what follows
(Graham, SIAM J. Appl. Math. 17(2), 1969; by the longest way to the end: Kohler, IEEE Trans. Comput. C-24(12), 1975). No priority is the
best for every graph, so several are tried, each with several limits on how far a task may be brought forward: memory grows with that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from math import inf
from operator import add

from ...hardware.streams import COMPUTE
from .tasks import Task, length

Order = tuple[int, ...]
Times = tuple[float, ...]
"""Of each link."""

EXHAUSTIVE = 12
"""Tasks up to which every order is tried, as far as `STEPS` go."""
STEPS = 30_000

WINDOWS = (inf, 0.5, 0.25, 0.1)
"""How far before its turn a task may come, as shares of all tasks."""


def candidates(tasks: Sequence[Task]) -> Iterator[Order]:
    """Orders worth looking at, each once; program order is the first."""
    program = tuple(range(len(tasks)))
    seen = {program}
    yield program
    for priority in (_way(tasks, 1.0), _way(tasks, 2.0), _to_next(tasks), [-float(i) for i in program]):
        for window in WINDOWS:
            order = listed(tasks, priority, window * len(tasks))
            if order not in seen:
                seen.add(order)
                yield order
    if len(tasks) <= EXHAUSTIVE:
        best = exhausted(tasks, min(seen, key=lambda order: length(tasks, order)))
        if best not in seen:
            yield best


def listed(tasks: Sequence[Task], priority: Sequence[float], window: float = inf) -> Order:
    """The order of list scheduling. No task comes before its `window`-th predecessor in program order."""
    count = len(tasks)
    readers, missing = _readers(tasks)
    ends = [0.0] * count
    comm: list[tuple[float, int]] = []
    compute: list[tuple[float, int]] = []
    waiting: list[tuple[float, int]] = []  # for a collective in flight, by when it ends
    beyond: list[int] = []
    taken = [False] * count
    order: list[int] = []
    free = dict.fromkeys((task.stream for task in tasks), 0.0)
    now = 0.0
    oldest = 0

    def offer(i: int) -> None:
        if i > oldest + window:
            heappush(beyond, i)
            return
        when = max((ends[j] for j in tasks[i].after), default=0.0)
        when = max([when, *free.values()]) if tasks[i].barrier else when
        if when > now:
            heappush(waiting, (when, i))
        else:
            heappush(comm if tasks[i].sends else compute, (-priority[i], i))

    for i in range(count):
        if not missing[i]:
            offer(i)
    while len(order) < count:
        while waiting and waiting[0][0] <= now:
            offer(heappop(waiting)[1])
        if not comm and not compute:
            if not waiting:
                raise AssertionError("tasks that wait for one another")
            now = waiting[0][0]
            continue
        i = heappop(comm or compute)[1]
        if tasks[i].barrier and (last := max(free.values())) > now:
            heappush(waiting, (last, i))  # collectives were issued since it was ready
            continue
        order.append(i)
        taken[i] = True
        if tasks[i].sends:
            free[tasks[i].stream] = ends[i] = max(now, free[tasks[i].stream]) + tasks[i].seconds
        else:
            now = ends[i] = now + tasks[i].seconds
        for j in readers[i]:
            missing[j] -= 1
            if not missing[j]:
                offer(j)
        while oldest < count and taken[oldest]:
            oldest += 1
        while beyond and beyond[0] <= oldest + window:
            offer(heappop(beyond))
    return tuple(order)


def exhausted(tasks: Sequence[Task], known: Order) -> Order:
    """The shortest order, or the shortest found in `STEPS` steps; `known` where none is shorter.

    Branch and bound: an order begun is given up where what is left cannot make it shorter than the best, or where the same tasks have been
    done before in no more time on every stream.
    """
    count = len(tasks)
    readers, missing = _readers(tasks)
    way = _way(tasks, 1.0)
    seconds = [t.seconds for t in tasks]
    links = {stream: at for at, stream in enumerate(sorted({task.stream for task in tasks if task.sends}))}
    best, shortest = known, length(tasks, known)
    seen: dict[int, list[tuple[float, ...]]] = {}
    steps = 0

    def descend(order: list[int], done: int, now: float, free: Times, ends: list[float], computing: float, sending: Times) -> None:
        nonlocal best, shortest, steps
        steps += 1
        if len(order) == count:
            if (last := max([now, *free])) < shortest:
                best, shortest = tuple(order), last
            return
        ready = [i for i in range(count) if not done >> i & 1 and not missing[i]]
        begin = (max([now, *(ends[j] for j in tasks[i].after)]) + way[i] for i in ready)
        bound = max([now + computing, *map(add, free, sending), *begin])
        state = (now, *free, *(max(ends[j], now) if done >> j & 1 else 0.0 for j in range(count) if tasks[j].sends))
        known = seen.setdefault(done, [])
        if bound >= shortest or steps > STEPS or any(all(a <= b for a, b in zip(other, state, strict=True)) for other in known):
            return
        known.append(state)
        for i in sorted(ready, key=lambda i: (not tasks[i].sends, -way[i])):
            task = tasks[i]
            at = max([now, *(ends[j] for j in task.after)])
            if task.sends:
                link = links[task.stream]
                ends[i] = max(at, free[link]) + task.seconds
                after, sent = at, (*free[:link], ends[i], *free[link + 1 :])
                left = computing, (*sending[:link], sending[link] - seconds[i], *sending[link + 1 :])
            else:
                at = max([at, *free]) if task.barrier else at
                after, sent = at + task.seconds, free
                ends[i] = after
                left = computing - seconds[i], sending
            for j in readers[i]:
                missing[j] -= 1
            order.append(i)
            descend(order, done | 1 << i, after, sent, ends, *left)
            order.pop()
            for j in readers[i]:
                missing[j] += 1
            ends[i] = 0.0

    total: Callable[[str], float] = lambda stream: sum(t.seconds for t in tasks if t.stream == stream)  # noqa: E731
    descend([], 0, 0.0, (0.0,) * len(links), [0.0] * count, total(COMPUTE), tuple(map(total, links)))
    return best


def _readers(tasks: Sequence[Task]) -> tuple[list[list[int]], list[int]]:
    """Who waits for each task, and for how many each waits."""
    readers: list[list[int]] = [[] for _ in tasks]
    for i, task in enumerate(tasks):
        for j in task.after:
            readers[j].append(i)
    return readers, [len(task.after) for task in tasks]


def _way(tasks: Sequence[Task], weight: float) -> list[float]:
    """The longest way from the beginning of each task to the end, collectives counted `weight` times."""
    way = [0.0] * len(tasks)
    for i in range(len(tasks) - 1, -1, -1):
        way[i] += tasks[i].seconds * (weight if tasks[i].sends else 1.0)
        for j in tasks[i].after:
            way[j] = max(way[j], way[i])
    return way


def _to_next(tasks: Sequence[Task]) -> list[float]:
    """Higher the less computation stands between a task and a collective; of equals the longer way counts, scaled to be small beside it."""
    way = _way(tasks, 1.0)
    scale = max(way, default=0.0) or 1.0
    near = [inf] * len(tasks)
    for i in range(len(tasks) - 1, -1, -1):
        here = 0.0 if tasks[i].sends else near[i] + tasks[i].seconds
        for j in tasks[i].after:
            near[j] = min(near[j], here)
    return [-min(n, 2 * scale) + way[i] / scale * 1e-3 * scale for i, n in enumerate(near)]
