"""A collective of a prepared program: bound to the memory that it reads and writes, a program that asks the other ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...distributed.world import Program, Request, Settle, Start, Ticket, Wait
from ...ir.core import Trait
from ...ir.ops.collective import Collective
from .program import flat
from .streams import Mark, Streams
from .tensors import Held, plain
from .torch_ops.registry import COLLECTIVES


@dataclass(frozen=True)
class Ask:
    """A part of a run in which other ranks are asked."""

    program: Callable[[], Program[None]]


@dataclass(eq=False)
class Together:
    """A collective that reads `operands` and leaves what it brings in `places`: all of it at once, or from `start` to `done`.

    Where streams run aside, everything that it does is issued at its start, and its `done` is one wait. On one stream the host would have
    to wait for what other ranks send: there only its first request is on the way between the two, and its `done` does the rest.
    """

    op: Collective
    site: str
    operands: tuple[Held, ...]
    places: tuple[torch.Tensor, ...]
    streams: Streams
    mark: Mark = None
    rest: Program[None] | None = None
    ticket: Ticket = None

    def whole(self) -> Program[None]:
        """Begin it, and end it."""
        if Trait.COLLECTIVE in self.op.traits:
            self.streams.join((yield from self._aside()))
        else:  # nothing is sent
            yield from self._run()

    def start(self) -> Program[None]:
        """Let it begin."""
        if self.streams.aside:
            self.mark = yield from self._aside()
            return
        self.rest = self._run()
        asked = next(self.rest)
        while isinstance(asked, Settle):
            asked = self.rest.send((yield asked))
        assert isinstance(asked, Request)
        self.ticket = yield Start(asked)

    def done(self) -> Program[None]:
        """What is issued afterwards finds what it brought."""
        if self.streams.aside:
            self.streams.join(self.mark)
            return
        rest, ticket, self.rest, self.ticket = self.rest, self.ticket, None, None
        assert rest is not None
        answer = yield Wait(ticket)
        while True:
            try:
                asked = rest.send(answer)
            except StopIteration:
                return
            answer = yield asked

    def _aside(self) -> Program[Mark]:
        """All of it, on the stream of its axis."""
        self.streams.begin(self.op.along()[0])
        try:
            yield from self._run()
        finally:
            mark = self.streams.end()
        return mark

    def _run(self) -> Program[None]:
        """The requests, which say what they are of; then what came is put in its place."""
        program, answer = COLLECTIVES[type(self.op)](self.op, *self.operands), None
        while True:
            try:
                asked: Any = program.send(answer)
            except StopIteration as stopped:
                found = stopped.value
                break
            answer = yield replace(asked, op=self.op.signature, site=self.site, lent=True) if isinstance(asked, Request) else asked
        for place, made in zip(self.places, flat(found), strict=True):
            plain(place).copy_(plain(made))
