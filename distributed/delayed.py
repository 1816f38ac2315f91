"""Transfers that take as long as bytes over bandwidth say, on any world, and without using the CPU.

`delayed` puts a link between a rank's program and its world: what ranks do together begins when the last of them has come to it, one
transfer after the other along each axis, and its answer is handed on when the link would have brought it. Ranks tell each other when they
began with the messages themselves, so it holds for ranks in one process and for processes on one machine alike.

What time it is says a clock: `WallClock`, which sleeps, for measuring how much a program hides; `SimulatedClock`, which stands still unless
it is told what something took, so that the same is exact and needs no time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from .world import Abreast, Array, Asked, Exchange, Gather, Index, Program, Receive, Request, Send, Settle, Start, T, Ticket, Wait


@dataclass(frozen=True)
class Link:
    """What a rank sends and receives by: bytes a second in each direction, and seconds until the first byte."""

    bandwidth: float
    latency: float = 0.0

    def seconds(self, bytes: int) -> float:
        """How long a transfer takes; nothing takes no time."""
        return self.latency + bytes / self.bandwidth if bytes else 0.0


class Clock(Protocol):
    """A rank's time, in seconds. Clocks of ranks that talk to each other run from the same beginning."""

    def now(self) -> float:
        """What time it is."""
        ...

    def wait_until(self, moment: float) -> None:
        """Come back at `moment`; at once where it is past."""
        ...


class WallClock:
    """The time of this machine."""

    def now(self) -> float:
        return time.monotonic()

    def wait_until(self, moment: float) -> None:
        if (left := moment - time.monotonic()) > 0:
            time.sleep(left)


@dataclass
class SimulatedClock:
    """A time that goes on by what it is told."""

    time: float = 0.0

    def now(self) -> float:
        return self.time

    def advance(self, seconds: float) -> None:
        """Something took so long."""
        self.time += seconds

    def wait_until(self, moment: float) -> None:
        self.time = max(self.time, moment)


def delayed(program: Program[T], link: Link, clock: Clock) -> Program[T]:
    """The same program for the same world, each transfer over `link`."""
    return (yield from _Delayed(link, clock).run(program))


@dataclass(eq=False)
class _Flight:
    """A transfer that has begun here."""

    request: Request
    tickets: tuple[Ticket, ...] = ()
    landed: bool = False
    answer: Any = None
    moment: float = 0.0


@dataclass
class _Delayed:
    link: Link
    clock: Clock
    lines: dict[Any, deque[_Flight]] = field(default_factory=dict)
    """What is in flight along each axis, or to or from each rank, in order."""
    free: dict[Any, float] = field(default_factory=dict)
    """When the last of them ended."""
    index: dict[str, int] = field(default_factory=dict)

    def run(self, program: Program[T]) -> Program[T]:
        answer: Any = None
        while True:
            try:
                asked = program.send(answer)
            except StopIteration as done:
                result: T = done.value
                return result
            answer = yield from self.served(asked)

    def served(self, asked: Asked) -> Program[Any]:
        if isinstance(asked, Index | Settle):
            return (yield asked)
        if isinstance(asked, Wait):
            return (yield from self.landed(asked.ticket))
        if isinstance(asked, Abreast):  # each rank has a clock of its own
            return None
        flight = yield from self.begun(asked.request if isinstance(asked, Start) else asked)
        return flight if isinstance(asked, Start) else (yield from self.landed(flight))

    def begun(self, request: Request) -> Program[_Flight]:
        flight = _Flight(request)
        self.lines.setdefault(_line(request), deque()).append(flight)
        if request.axis not in self.index:
            self.index[request.axis] = yield Index(request.axis, request.size)
        tickets = []
        for part in _stamped(request, np.array([self.clock.now()])):
            tickets.append((yield Start(part)))
        flight.tickets = tuple(tickets)
        return flight

    def landed(self, flight: _Flight) -> Program[Any]:
        line = self.lines[_line(flight.request)]
        while not flight.landed:
            first = line.popleft()
            found = []
            for ticket in first.tickets:
                found.append((yield Wait(ticket)))
            first.answer, began = _unstamped(first.request, found, self.clock.now())
            begin = max(began, self.free.get(_line(first.request), 0.0))
            first.moment = begin + self.link.seconds(_bytes(first.request, first.answer, self.index[first.request.axis]))
            self.free[_line(first.request)] = first.moment
            first.landed = True
        self.clock.wait_until(flight.moment)
        return flight.answer


def _line(request: Request) -> Any:
    match request:
        case Send(to=to):
            return request.axis, "to", to
        case Receive(source=source):
            return request.axis, "from", source
    return request.axis


def _stamped(request: Request, stamp: Array) -> Iterator[Request]:
    """The request with the moment at which it was made, or two that are to be made together."""
    match request:
        case Exchange(messages=messages, shapes=shapes):
            yield replace(
                request, messages=tuple((*message, stamp) for message in messages), shapes=tuple((*one, stamp.shape) for one in shapes)
            )
        case Gather():
            yield request
            yield replace(request, x=stamp)
        case Send(xs=xs):
            yield replace(request, xs=(*xs, stamp))
        case Receive(likes=likes):
            yield replace(request, likes=(*likes, stamp))


def _unstamped(request: Request, found: list[Any], now: float) -> tuple[Any, float]:
    """The answer, and when the last rank had come to it; a sender, who is told nothing, knows when it was let go."""
    match request:
        case Exchange():
            return tuple(message[:-1] for message in found[0]), max(float(message[-1][0]) for message in found[0])
        case Gather():
            return found[0], max(float(stamp[0]) for stamp in found[1])
        case Receive():
            return found[0][:-1], max(now, float(found[0][-1][0]))
    return None, now


def _bytes(request: Request, answer: Any, own: int) -> int:
    """The most that goes over the link in one direction."""
    match request:
        case Exchange(messages=messages):
            ways = (messages, answer)
            return max(sum(x.nbytes for i, message in enumerate(way) if i != own for x in message) for way in ways)
        case Gather(x=x, size=size):
            return int(x.nbytes) * (size - 1)
        case Send(xs=xs):
            return sum(x.nbytes for x in xs)
        case Receive():
            return sum(x.nbytes for x in answer)
    return 0
