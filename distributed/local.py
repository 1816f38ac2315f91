"""All ranks of a mesh in one process, in lockstep: a rank runs until it needs others, and goes on when they have come to the same op.

Nothing is copied, and the order is the same in every run. Where ranks wait for each other for ever, or meet with different ops, the error
is a table of who waits for what.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from ..ir.errors import DscError, require
from ..ir.mesh import Mesh
from .world import Exchange, Gather, Index, Placed, Receive, Request, Send, T, ranks_text, where


def run(mesh: Mesh, program: Placed[T]) -> list[T]:
    """The results of `program(rank)` on every rank of `mesh`. `DscError` names the rank where one fails, or says who waits for what."""
    programs = [program(rank) for rank in range(mesh.world)]
    results: dict[int, T] = {}
    waiting: dict[int, Request] = {}
    ready: deque[tuple[int, Any]] = deque((rank, None) for rank in range(mesh.world))
    try:
        while ready:
            rank, answer = ready.popleft()
            try:
                request = programs[rank].send(answer)
                size = mesh.size(request.axis)
                require(request.size == size, f"{where(request)}: the mesh {mesh} has {size} ranks along {request.axis}")
            except StopIteration as done:
                results[rank] = done.value
                continue
            except DscError as error:
                raise DscError("\n".join(f"rank {rank}: {line}" for line in str(error).split("\n"))) from None
            if isinstance(request, Index):
                ready.append((rank, mesh.index(request.axis, rank)))
                continue
            waiting[rank] = request
            if partners := _partners(mesh, rank, waiting):
                answers = _answers(partners, waiting)
                for partner in partners:
                    del waiting[partner]
                ready.extend(zip(partners, answers, strict=True))
        if waiting:
            raise DscError(f"{len(waiting)} of {mesh.world} ranks wait for ever:\n{_table(mesh, waiting)}")
    finally:
        for one in programs:
            one.close()
    return [results[rank] for rank in range(mesh.world)]


def _partners(mesh: Mesh, rank: int, waiting: dict[int, Request]) -> tuple[int, ...]:
    """The ranks, in their order, whose requests make one exchange with that of `rank`; empty while somebody is missing."""
    request = waiting[rank]
    group = mesh.group(request.axis, rank)
    if isinstance(request, Send | Receive):
        other = group[request.to if isinstance(request, Send) else request.source]
        found = waiting.get(other)
        sender, receiver = (rank, other) if isinstance(request, Send) else (other, rank)
        given, taken = waiting.get(sender), waiting.get(receiver)
        meet = isinstance(given, Send) and isinstance(taken, Receive) and found is not None and found.axis == request.axis
        meant = meet and group[given.to] == receiver and group[taken.source] == sender  # type: ignore[union-attr]
        return (sender, receiver) if meant else ()
    met = (waiting.get(other) for other in reversed(group))  # ranks mostly come in order: the last is the one to ask for first
    return group if all(isinstance(r, Exchange | Gather) and r.axis == request.axis for r in met) else ()


def _answers(partners: tuple[int, ...], waiting: dict[int, Request]) -> list[Any]:
    """What each of them gets. `DscError` where they do not mean the same."""
    requests = [waiting[rank] for rank in partners]
    given = requests[0]
    match requests:
        case [Send(x=x), Receive(like=like)]:
            if _type(x) != _type(like):
                raise DscError(f"rank {partners[0]} sends {_type(x)}, but rank {partners[1]} expects {_type(like)}: {where(given)}")
            return [None, x]
    if len({(type(r), r.op) for r in requests}) > 1:
        raise DscError(f"ranks meet along {given.axis} with different ops:\n{_rows((rank, where(waiting[rank])) for rank in partners)}")
    if isinstance(given, Gather):
        found = [r.x for r in requests if isinstance(r, Gather)]
        if len({_type(x) for x in found}) > 1:
            rows = _rows((rank, _type(x)) for rank, x in zip(partners, found, strict=True))
            raise DscError(f"ranks gather arrays of different types along {given.axis}, {where(given)}:\n{rows}")
        return [tuple(found)] * len(partners)
    exchanges = [r for r in requests if isinstance(r, Exchange)]
    answers = [tuple(r.messages[j] for r in exchanges) for j in range(len(partners))]
    for receiver, request, answer in zip(partners, exchanges, answers, strict=True):
        for sender, message, expected in zip(partners, answer, request.shapes, strict=True):
            shapes = tuple(tuple(x.shape) for x in message)
            if shapes != expected:
                raise DscError(f"rank {sender} sends {_shapes(shapes)}, but rank {receiver} expects {_shapes(expected)}: {where(request)}")
    return answers


def _type(x: Any) -> str:
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]"


def _shapes(shapes: Iterable[tuple[int, ...]]) -> str:
    return " and ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)


def _table(mesh: Mesh, waiting: dict[int, Request]) -> str:
    """One line for all ranks that wait in the same place for the same ranks."""
    rows = []
    for rank in range(mesh.world):
        request = waiting.get(rank)
        if request is None:
            rows.append((rank, "finished"))
            continue
        group = mesh.group(request.axis, rank)
        if isinstance(request, Send | Receive):
            group = (group[request.to if isinstance(request, Send) else request.source],)
        missing = [r for r in group if r != rank and not _answers_to(waiting.get(r), request)]
        rows.append((rank, f"{where(request)}, for {ranks_text(missing)}" if missing else where(request)))
    return _rows(rows)


def _answers_to(other: Request | None, request: Request) -> bool:
    """Whether `other` waits in the same collective, as far as it can be told."""
    same = isinstance(other, Exchange | Gather) and isinstance(request, Exchange | Gather)
    return same and other is not None and other.axis == request.axis


def _rows(rows: Iterable[tuple[int, str]]) -> str:
    by_text: dict[str, list[int]] = {}
    for rank, text in rows:
        by_text.setdefault(text, []).append(rank)
    names = {text: ranks_text(ranks) for text, ranks in by_text.items()}
    width = max(map(len, names.values()))
    return "\n".join(f"  {names[text]:{width}}  {text}" for text in by_text)
