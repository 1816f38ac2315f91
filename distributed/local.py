"""All ranks of a mesh in one process, in lockstep: who needs others goes on when they have come to the same op.

Where all of them are about to run the same program they run it abreast: an op on every rank, then the next one, so that its code is at hand
for all ranks but the first. Else a rank runs until it has to wait. Nothing is copied but what is only lent, and the order is the same in
every run. A request that was only started is answered when everybody has come to it; until somebody waits for it ranks go on. Where ranks
wait for each other for ever, or meet with different ops, the error is a table of who waits for what.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ..ir.errors import DscError, require
from ..ir.mesh import Mesh
from .world import (
    Abreast,
    Asked,
    Exchange,
    Gather,
    Index,
    Placed,
    Receive,
    Request,
    Send,
    Settle,
    Start,
    T,
    Wait,
    of_rank,
    ranks_text,
    where,
)


@dataclass(eq=False)
class _Posted:
    """A request of a rank, and its answer once it has one."""

    rank: int
    request: Request
    group: tuple[int, ...]
    """Who takes part: the ranks of the axis, or sender and receiver."""
    answered: bool = False
    answer: Any = None

    @property
    def line(self) -> tuple[Any, ...]:
        """Requests of one line are met in the order in which each rank makes them."""
        return (self.request.axis, isinstance(self.request, Send | Receive), self.group)


def run(mesh: Mesh, program: Placed[T]) -> list[T]:
    """The results of `program(rank)` on every rank of `mesh`. `DscError` names the rank where one fails, or says who waits for what."""
    programs = [program(rank) for rank in range(mesh.world)]
    results: dict[int, T] = {}
    waiting: dict[int, _Posted] = {}
    abreast: dict[int, Abreast] = {}
    board = _Board()
    ready: deque[tuple[int, Any]] = deque((rank, None) for rank in range(mesh.world))
    try:
        while ready or abreast:
            if not ready:
                ready.extend(_run_abreast(mesh, board, abreast))
                abreast.clear()
            rank, answer = ready.popleft()
            try:
                asked = programs[rank].send(answer)
                while isinstance(asked, Settle):
                    asked = programs[rank].send(None)
                if isinstance(asked, Abreast):
                    abreast[rank] = asked
                    continue
                posted = _posted(mesh, rank, asked)
            except StopIteration as done:
                results[rank] = done.value
                continue
            except DscError as error:
                raise of_rank(rank, error) from None
            if isinstance(posted.request, Index):
                ready.append((rank, mesh.index(posted.request.axis, rank)))
                continue
            met = () if isinstance(asked, Wait) else board.post(posted)
            if isinstance(asked, Start):
                ready.append((rank, posted))
            else:
                waiting[rank] = posted
            for one in (*met, posted):
                if one.answered and waiting.get(one.rank) is one:
                    del waiting[one.rank]
                    ready.append((one.rank, one.answer))
        _require_none(mesh, board, waiting)
    finally:
        for each in programs:
            each.close()
    return [results[rank] for rank in range(mesh.world)]


def _run_abreast(mesh: Mesh, board: _Board, asked: dict[int, Abreast]) -> Iterable[tuple[int, Any]]:
    """The answer to each rank that would run with others: they do if these are all ranks, and run the same. Nobody is waited for."""
    if mesh.world == 1 or len(asked) < mesh.world or len({one.what for one in asked.values()}) > 1:
        return [(rank, None) for rank in asked]
    program, answers = asked[0].together([asked[rank].mine for rank in range(mesh.world)]), None
    with closing(program):
        while True:
            try:
                answers = _answered(mesh, board, program.send(answers))
            except StopIteration as done:
                return enumerate(done.value)


def _answered(mesh: Mesh, board: _Board, asked: Sequence[Asked]) -> tuple[Any, ...]:
    """What every rank gets of what it asks at the same time as all others."""
    if isinstance(asked[0], Settle):
        return (None,) * len(asked)
    posted = [_posted(mesh, rank, one) for rank, one in enumerate(asked)]  # type: ignore[arg-type]
    if isinstance(posted[0].request, Index):
        return tuple([mesh.index(one.request.axis, one.rank) for one in posted])
    if not isinstance(asked[0], Wait):
        for one in posted:
            board.post(one)
    if isinstance(asked[0], Start):
        return tuple(posted)
    _require_none(mesh, board, {one.rank: one for one in posted if not one.answered})
    return tuple([one.answer for one in posted])


def _require_none(mesh: Mesh, board: _Board, waiting: dict[int, _Posted]) -> None:
    """`DscError` with a table of who waits for what, if anybody does."""
    if waiting:
        raise DscError(f"{len(waiting)} of {mesh.world} ranks wait for ever:\n{_table(mesh, board, waiting)}")


def _posted(mesh: Mesh, rank: int, asked: Request | Start | Wait) -> _Posted:
    """What a rank asks, with those who take part; what it waits for as it was posted."""
    if isinstance(asked, Wait):
        ticket: _Posted = asked.ticket
        return ticket
    request = asked.request if isinstance(asked, Start) else asked
    size = mesh.size(request.axis)
    if request.size != size:
        raise DscError(f"{where(request)}: the mesh {mesh} has {size} ranks along {request.axis}")
    group = mesh.group(request.axis, rank)
    if isinstance(request, Send | Receive):
        group = (rank, group[request.to]) if isinstance(request, Send) else (group[request.source], rank)
        require(group[0] != group[1], f"{where(request)}: a rank does not send to itself")
    return _Posted(rank, request, group)


@dataclass
class _Board:
    """What has been asked and not yet answered, line by line and rank by rank."""

    lines: dict[tuple[Any, ...], dict[int, deque[_Posted]]] = field(default_factory=dict)

    def post(self, posted: _Posted) -> tuple[_Posted, ...]:
        """Put it up. The requests that are answered by that: its own and its partners', in the order of the ranks."""
        line = self.lines.setdefault(posted.line, {})
        line.setdefault(posted.rank, deque()).append(posted)
        if not all(line.get(rank) for rank in reversed(posted.group)):  # ranks mostly come in order: the last is the one to ask for first
            return ()
        met = tuple(line[rank].popleft() for rank in posted.group)
        for one, answer in zip(met, _answers(met), strict=True):
            one.answered, one.answer = True, answer
        return met

    def missing(self, posted: _Posted) -> list[int]:
        """The ranks of its group that have not yet come to a request."""
        line = self.lines[posted.line]
        before = line[posted.rank].index(posted)
        return [rank for rank in posted.group if rank != posted.rank and len(line.get(rank, ())) <= before]


def _answers(met: tuple[_Posted, ...]) -> list[Any]:
    """What each of them gets. `DscError` where they do not mean the same."""
    requests = [one.request for one in met]
    partners = [one.rank for one in met]
    given = requests[0]
    match requests:
        case [Send(xs=xs), Receive(likes=likes)]:
            sent, wanted = (" and ".join(map(_type, arrays)) for arrays in (xs, likes))
            if sent != wanted:
                raise DscError(f"rank {partners[0]} sends {sent}, but rank {partners[1]} expects {wanted}: {where(given)}")
            return [None, _handed(given, xs)]
    if len({(type(r), r.op) for r in requests}) > 1:
        raise DscError(f"ranks meet along {given.axis} with different ops:\n{_rows((one.rank, where(one.request)) for one in met)}")
    if isinstance(given, Gather):
        found = [r.x for r in requests if isinstance(r, Gather)]
        if len({_type(x) for x in found}) > 1:
            rows = _rows((rank, _type(x)) for rank, x in zip(partners, found, strict=True))
            raise DscError(f"ranks gather arrays of different types along {given.axis}, {where(given)}:\n{rows}")
        return [_handed(given, tuple(found))] * len(partners)
    exchanges = [r for r in requests if isinstance(r, Exchange)]
    answers = list(zip(*(r.messages for r in exchanges), strict=True))
    for receiver, request, answer in zip(partners, exchanges, answers, strict=True):
        for sender, message, expected in zip(partners, answer, request.shapes, strict=True):
            shapes = tuple([tuple(x.shape) for x in message])
            if shapes != expected:
                raise DscError(f"rank {sender} sends {_shapes(shapes)}, but rank {receiver} expects {_shapes(expected)}: {where(request)}")
    return [_handed(given, answer) for answer in answers]


def _handed(request: Request, arrays: Any) -> Any:
    """The arrays as whoever gets them may keep them."""
    if not request.lent:
        return arrays
    if isinstance(arrays, tuple):
        return tuple(_handed(request, x) for x in arrays)
    return arrays.clone() if hasattr(arrays, "clone") else arrays.copy()


def _type(x: Any) -> str:
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]"


def _shapes(shapes: Iterable[tuple[int, ...]]) -> str:
    return " and ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)


def _table(mesh: Mesh, board: _Board, waiting: dict[int, _Posted]) -> str:
    """One line for all ranks that wait in the same place for the same ranks."""
    rows = []
    for rank in range(mesh.world):
        posted = waiting.get(rank)
        if posted is None:
            rows.append((rank, "finished"))
            continue
        missing = board.missing(posted)
        rows.append((rank, f"{where(posted.request)}, for {ranks_text(missing)}" if missing else where(posted.request)))
    return _rows(rows)


def _rows(rows: Iterable[tuple[int, str]]) -> str:
    by_text: dict[str, list[int]] = {}
    for rank, text in rows:
        by_text.setdefault(text, []).append(rank)
    names = {text: ranks_text(ranks) for text, ranks in by_text.items()}
    width = max(map(len, names.values()))
    return "\n".join(f"  {names[text]:{width}}  {text}" for text in by_text)
