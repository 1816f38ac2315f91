"""Work on the streams of one rank: computation and communication run side by side, each in an order, and wait for what they read.

A task belongs to a stream and depends on earlier tasks. `run` executes the tasks of a stream in a given order; `listed` chooses the order:
whenever a stream is free it takes, of the tasks that are ready, the one with the longest way to the end (list scheduling by critical path;
Kohler, IEEE Trans. Comput. C-24(12), 1975).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from typing import Any

COMPUTE, COMM = "compute", "comm"


@dataclass(frozen=True, slots=True)
class Task:
    """Work of `seconds` on `stream`, after the tasks that `after` numbers, all of them earlier in the sequence. `what` is anything."""

    what: Any
    stream: str
    seconds: float
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """When each task ran, from 0."""

    tasks: tuple[Task, ...]
    starts: tuple[float, ...]

    @cached_property
    def time(self) -> float:
        """Until the last task ends."""
        return max((s + t.seconds for s, t in zip(self.starts, self.tasks, strict=True)), default=0.0)

    def busy(self, stream: str) -> float:
        """How long a stream works."""
        return sum(t.seconds for t in self.tasks if t.stream == stream)

    @cached_property
    def exposed(self) -> float:
        """How long communication runs while nothing computes."""
        computing = merged([(s, s + t.seconds) for s, t in zip(self.starts, self.tasks, strict=True) if t.stream == COMPUTE])
        sending = merged([(s, s + t.seconds) for s, t in zip(self.starts, self.tasks, strict=True) if t.stream == COMM])
        return sum(end - start for start, end in sending) - _common(computing, sending)

    @property
    def hidden(self) -> float:
        """The share of communication during which something computes; 1 where nothing is sent."""
        sending = self.busy(COMM)
        return 1 - self.exposed / sending if sending else 1.0


def run(tasks: Sequence[Task]) -> Run:
    """Each stream takes its tasks in the order of the sequence."""
    free: dict[str, float] = {}
    ends: list[float] = []
    starts = []
    for task in tasks:
        start = max([free.get(task.stream, 0.0), *(ends[i] for i in task.after)])
        starts.append(start)
        ends.append(start + task.seconds)
        free[task.stream] = ends[-1]
    return Run(tuple(tasks), tuple(starts))


def listed(tasks: Sequence[Task]) -> Run:
    """Each stream takes the ready task with the longest way to the end, the earlier of two equal ones; never worse than `run`."""
    way = [0.0] * len(tasks)
    readers: list[list[int]] = [[] for _ in tasks]
    for i in range(len(tasks) - 1, -1, -1):
        way[i] += tasks[i].seconds
        for j in tasks[i].after:
            way[j] = max(way[j], way[i])
            readers[j].append(i)
    missing = [len(set(t.after)) for t in tasks]
    starts = [0.0] * len(tasks)
    ready: dict[str, list[tuple[float, int]]] = {t.stream: [] for t in tasks}
    for i, count in enumerate(missing):
        if not count:
            heappush(ready[tasks[i].stream], (-way[i], i))
    running: list[tuple[float, int]] = []
    idle = set(ready)
    now = 0.0
    while True:
        for stream in sorted(idle):
            if ready[stream]:
                _, i = heappop(ready[stream])
                starts[i] = now
                heappush(running, (now + tasks[i].seconds, i))
                idle.discard(stream)
        if not running:
            break
        now = running[0][0]
        while running and running[0][0] <= now:
            _, i = heappop(running)
            idle.add(tasks[i].stream)
            for j in dict.fromkeys(readers[i]):
                missing[j] -= 1
                if not missing[j]:
                    heappush(ready[tasks[j].stream], (-way[j], j))
    found, plain = Run(tuple(tasks), tuple(starts)), run(tasks)
    return found if found.time <= plain.time else plain


def joined(*sequences: Sequence[Task]) -> tuple[Task, ...]:
    """Independent sequences as one, interleaved by the share of each that has gone before, so that program order mixes them."""
    places = sorted(((i + 1) / (len(tasks) + 1), n, i) for n, tasks in enumerate(sequences) for i in range(len(tasks)))
    number = {(n, i): at for at, (_, n, i) in enumerate(places)}
    return tuple(Task(t.what, t.stream, t.seconds, tuple(number[n, j] for j in t.after)) for _, n, i in places for t in (sequences[n][i],))


def merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of some spans of time, in order."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(s for s in spans if s[1] > s[0]):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def _common(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    i = j = 0
    total = 0.0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total
