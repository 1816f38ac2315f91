"""What a rank asks of the others, and who serves it.

A rank's program is a generator: it computes, yields a `Request` where it needs the other ranks of an axis, and goes on with the answer. Who
drives the generators is a world: `alone` here, for one rank; `local.run`, all ranks of a mesh in one process, in lockstep;
`torch_world.TorchWorld`, one process per rank. The same program runs in each.

A world moves arrays as bytes and computes nothing. There are these requests: `Exchange` and `Gather` among the ranks of an axis, `Send` and
`Receive` between two, and `Index`, which a rank asks of its world alone. Reductions are made of them by the backends, which add up in the
order of the ranks: a library's own reduction would add in the order of its rings, and round BF16 at every hop.

A rank that has something to compute meanwhile yields a request in `Start`, is given a ticket at once, and yields `Wait` with it later. What
the ranks of an axis do together they do in the order in which each of them began it; so it is with what one rank sends to another.

A program that has nothing to ask may say what it is about to run, in `Abreast`: a world that has all ranks in one process then runs it for
all of them at once, op by op.

An answer on a GPU may be a promise: the stream that was current where it was asked for keeps it, and the host goes on. Who reads values on
the host yields `Settle` before, so that a rank whose partner is gone finds out, and does not hang in a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

from ..ir.errors import DscError, require
from ..ir.mesh import Mesh

Array: TypeAlias = Any
"""A NumPy array or a torch tensor; a world may hand on what it was given, and nobody writes to it afterwards, unless it is `lent`."""

Message: TypeAlias = tuple[Array, ...]
"""What goes from one rank to another at once: arrays that travel together, such as codes and their scales."""


@dataclass(frozen=True, eq=False)
class Request:
    """What a rank waits for. `size` is the number of ranks along `axis`."""

    axis: str
    size: int
    op: str = field(default="", kw_only=True)
    """The op with its attributes and types: the same on every rank that takes part."""
    site: str = field(default="", kw_only=True)
    """Where in the program it stands."""
    lent: bool = field(default=False, kw_only=True)
    """Whether the arrays change once the request is over: a world that would hand them on as they are copies them."""


@dataclass(frozen=True, eq=False)
class Exchange(Request):
    """Message j goes to rank j of the axis; the answer holds what each rank sent here, in their order.

    `shapes` says what is expected from each rank, array by array. Dtypes are those of the messages that are sent.
    """

    messages: tuple[Message, ...]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, eq=False)
class Gather(Request):
    """The answer is everyone's `x`, in the order of the ranks. All are of one type."""

    x: Array


@dataclass(frozen=True, eq=False)
class Index(Request):
    """The answer is this rank's index along the axis, at once."""


@dataclass(frozen=True, eq=False)
class Send(Request):
    """`xs` go to rank `to` of the axis, which has to receive them: until then the sender waits. The answer is None."""

    xs: Message
    to: int


@dataclass(frozen=True, eq=False)
class Receive(Request):
    """The answer is what rank `source` of the axis sends: arrays of the types and shapes of `likes`, whose contents do not matter."""

    likes: Message
    source: int


Ticket: TypeAlias = Any
"""A request in flight, as its world knows it."""


@dataclass(frozen=True, eq=False)
class Start:
    """Let `request`, which is no `Index`, begin. The answer, at once, is its ticket; the arrays in it must not change until it is over."""

    request: Request


@dataclass(frozen=True, eq=False)
class Wait:
    """The answer is that of the request with this ticket. Each ticket is waited for once, before the program ends."""

    ticket: Ticket


@dataclass(frozen=True, eq=False)
class Settle:
    """The answer is None, once all that was answered before is there. `DscError` where it does not come in time."""


@dataclass(frozen=True, eq=False)
class Abreast:
    """The answer is what `together` gives this rank, where all ranks of the world are about to run `what`; None where it runs by itself.

    `together` takes everyone's `mine` in the order of the ranks and is a program of all of them: what it yields is a tuple, of what each of
    them asks, and it goes on with the tuple of their answers.
    """

    what: Hashable
    mine: Any
    together: Callable[[Sequence[Any]], Joint[Sequence[Any]]]


Asked: TypeAlias = Request | Start | Wait | Settle | Abreast
"""What a program yields."""

T = TypeVar("T")
Program: TypeAlias = Generator[Asked, Any, T]
"""One rank's part of a computation, with its result."""

Joint: TypeAlias = Generator[Any, Any, T]
"""All ranks' parts of a computation at once: it yields a tuple of what each asks."""

Placed: TypeAlias = Callable[[int], Program[T]]
"""The program of each rank."""


class World(Protocol):
    """Who serves the requests of one rank that has a process of its own."""

    mesh: Mesh
    rank: int

    def run(self, program: Program[T]) -> T:
        """The result of this rank's program. `DscError` where another rank fails, dies or does not answer in time."""
        ...


def alone(program: Program[T]) -> T:
    """The result of a program on one rank, which is its own partner along every axis. `DscError` where it asks for more ranks."""
    answer: Any = None
    while True:
        try:
            asked = program.send(answer)
        except StopIteration as done:
            result: T = done.value
            return result
        match asked:
            case Start(request):
                answer = _answer_of_one(request)
            case Wait(ticket):
                answer = ticket
            case Settle() | Abreast():
                answer = None
            case _:
                answer = _answer_of_one(asked)


def _answer_of_one(request: Request) -> Any:
    alone_here = "and this is one: run it with --ranks local, or under torchrun"
    require(request.size == 1, f"{where(request)} is run by {request.size} ranks together, {alone_here}")
    match request:
        case Exchange(messages=messages):
            return messages
        case Gather(x=x):
            return (x,)
        case Index():
            return 0
    raise DscError(f"{where(request)}: a rank does not send to itself")


def of_rank(rank: int, error: DscError) -> DscError:
    """An error that a rank met: each line says which."""
    return DscError("\n".join(f"rank {rank}: {line}" for line in str(error).split("\n")))


def where(request: Request) -> str:
    """What a rank asks and where, for messages."""
    what = request.op or f"{type(request).__name__.lower()} along {request.axis}"
    direction = f" to {request.to}" if isinstance(request, Send) else f" from {request.source}" if isinstance(request, Receive) else ""
    return f"{what}{direction}{f' at {request.site}' if request.site else ''}"


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0 to 5, 7`: runs of three and more as their ends."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if sum(map(len, runs)) > 1 else ''} {', '.join(parts)}"
