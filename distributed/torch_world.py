"""One process per rank, started by torchrun: torch.distributed carries the bytes, over NCCL on GPUs and gloo on CPUs.

Everything goes as bytes, for gloo refuses FP8. What is only started is carried by gloo's threads while a rank computes. Over NCCL the host
waits for nothing that stays on the GPU: an answer is there for what the stream that was current runs afterwards, and `Settle`, or an array
that comes to the host, waits for all before. A group is made when an axis is first used, by its members alone. Where a rank dies or hangs,
every other one ends within the time-out: each that waits says so in the store which torchrun keeps, and the lowest of them names the ranks
that did not.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..ir.errors import DscError
from ..ir.mesh import Mesh
from .world import (
    Abreast,
    Array,
    Asked,
    Exchange,
    Gather,
    Index,
    Program,
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

CONNECT = 300.0
"""Seconds within which all ranks have to be there: on a busy machine one may import for long. A longer `timeout` holds here, too."""

POLL = 50e-6
"""Seconds between two looks at whether NCCL has brought something."""

GRACE = 2.0
"""Seconds within which ranks that lost a partner hear of one another."""


ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name since torch 2.13, and before."""


class _Ended(BaseException):
    """torchrun ends this rank, which is in the middle of a computation: another one has failed, and says so."""


@dataclass
class TorchWorld:
    """This process's place among the ranks of `mesh`, which torchrun started. Use it in a `with`: leaving it closes the connections.

    `timeout` is how many seconds a rank waits for the others in one op; then all end with an error.
    """

    mesh: Mesh
    timeout: float = 600.0
    rank: int = field(init=False)
    _groups: dict[tuple[int, ...], Any] = field(init=False, default_factory=dict)
    _waiting: bool = field(init=False, default=True)
    _told: bool = field(init=False, default=False)
    """Whether torchrun wants this rank to end."""
    _promised: deque[_Promise] = field(init=False, default_factory=deque)
    """What NCCL has been given and may not have brought yet."""

    def __post_init__(self) -> None:
        ranks = int(os.environ.get("WORLD_SIZE", "0"))
        self.rank = int(os.environ.get("RANK", "0"))
        if ranks != self.mesh.world:
            found = f"torchrun started {ranks}" if ranks else "there is no torchrun"
            raise DscError("" if self.rank else f"the mesh {self.mesh} is {self.mesh.world} ranks, but {found}")
        gpus = torch.cuda.is_available()
        self._device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpus else torch.device("cpu")
        if gpus:
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # a time-out is found here, and does not end the process
            os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")  # groups of several axes at once, in the order in which the host asks
            torch.cuda.set_device(self._device)
        seconds = max(self.timeout, CONNECT)
        limit = timedelta(seconds=seconds)
        try:
            store, _, _ = next(rendezvous("env://", timeout=limit))
            self._store = PrefixStore("dsc", store)
            backend = "nccl" if gpus else "gloo"
            dist.init_process_group(backend, store=PrefixStore("torch", store), rank=self.rank, world_size=ranks, timeout=limit)
        except (RuntimeError, ValueError) as error:
            raise DscError(f"rank {self.rank} found no connection to the others within {seconds:g} s: {_first(error)}") from None
        self._before = signal.signal(signal.SIGTERM, self._terminated)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if kind is None:
            dist.destroy_process_group()  # after a failure it would wait for those that are gone
        elif isinstance(error, DscError) and str(error):
            with suppress(RuntimeError):  # the store may be gone as well
                self._say("failed")  # the others need not say what they waited for

    def run(self, program: Program[T]) -> T:
        """The result of this rank's program. `DscError` where another rank fails, dies or does not answer in time.

        Where several ranks fail of one cause the error of all but one is empty: who prints them prints it once.
        """
        try:
            return self._driven(program)
        except _Lost as lost:
            raise self._diagnosed(lost) from None
        except DscError as error:
            self._waiting = True
            self._say("failed")
            raise of_rank(self.rank, error) from None
        except _Ended:
            raise DscError("") from None

    def _driven(self, program: Program[T]) -> T:
        answer: Any = None
        while True:
            self._waiting = False
            try:
                asked = program.send(answer)
            except StopIteration as done:
                self._waiting = True
                self._settle()  # what was sent last has left
                result: T = done.value
                return result
            self._waiting = True
            answer = self._served(asked)

    def _served(self, asked: Asked) -> Any:
        if isinstance(asked, Settle):
            return self._settle()
        if isinstance(asked, Wait):
            return self._ended(asked.ticket)
        if isinstance(asked, Abreast):
            return None
        request = asked.request if isinstance(asked, Start) else asked
        size = self.mesh.size(request.axis)
        if request.size != size:
            raise DscError(f"{where(request)}: the mesh {self.mesh} has {size} ranks along {request.axis}")
        members = self.mesh.group(request.axis, self.rank)
        if isinstance(request, Index):
            return members.index(self.rank)
        flight = self._begun(request, members)
        return flight if isinstance(asked, Start) else self._ended(flight)

    def _begun(self, request: Request, members: tuple[int, ...]) -> _Flight:
        start = time.monotonic()
        try:
            return _Flight(request, members, start, *self._carried(request, members))
        except RuntimeError as error:
            raise _Lost(request, members, time.monotonic() - start, _first(error)) from None

    def _ended(self, flight: _Flight) -> Any:
        try:
            flight.work.wait()
        except RuntimeError as error:
            raise _Lost(flight.request, flight.members, time.monotonic() - flight.start, _first(error)) from None
        if self._device.type == "cuda":  # what `wait` made wait is the stream
            self._promised.append(_Promise(flight.request, flight.members, flight.work))
            self._drop_what_came()
            if any(map(_is_on_host, _expected(flight.request))):
                self._settle()
        return flight.answer()

    def _drop_what_came(self) -> None:
        while self._promised and self._promised[0].came():
            self._promised.popleft()

    def _settle(self) -> None:
        """Wait until NCCL has brought everything that it was given."""
        start = time.monotonic()
        self._drop_what_came()
        while self._promised:
            seconds, late = time.monotonic() - start, self._promised[0]
            if self._told or seconds > self.timeout:
                raise _Lost(late.request, late.members, seconds, "torchrun ends this rank" if self._told else "no answer")
            time.sleep(POLL)
            self._drop_what_came()

    def _carried(self, request: Request, members: tuple[int, ...]) -> tuple[Any, Callable[[], Any], tuple[torch.Tensor, ...]]:
        """What torch.distributed has begun, what the answer is made of when it has ended, and the bytes that are sent until then."""
        match request:
            case Gather(x=x):
                given = self._bytes(x)
                found = given.new_empty(len(members) * len(given))
                work = ALL_GATHER(found, given, group=self._group(members), async_op=True)
                return work, lambda: tuple(_like(part, x, tuple(x.shape)) for part in found.view(len(members), -1)), (given,)
            case Exchange(messages=messages, shapes=shapes):
                return self._exchanged(messages, shapes, members)
            case Send(xs=xs, to=to):
                given = torch.cat([self._bytes(x) for x in xs])
                return dist.isend(given, members[to]), lambda: None, (given,)
            case Receive(likes=likes, source=source):
                sizes = [_size(like, tuple(like.shape)) for like in likes]
                found = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
                work = dist.irecv(found, members[source])
                return work, lambda: tuple(_like(x, like, tuple(like.shape)) for x, like in zip(found.split(sizes), likes, strict=True)), ()
        raise TypeError(f"no world serves {type(request).__name__}")

    def _exchanged(
        self, messages: Sequence[Sequence[Array]], shapes: Sequence[Sequence[tuple[int, ...]]], members: tuple[int, ...]
    ) -> tuple[Any, Callable[[], Any], tuple[torch.Tensor, ...]]:
        sent = [[self._bytes(x) for x in message] for message in messages]
        kinds = messages[0]
        sizes = [[_size(x, shape) for x, shape in zip(kinds, one, strict=True)] for one in shapes]
        found = torch.empty(sum(map(sum, sizes)), dtype=torch.uint8, device=self._device)
        out, into = [sum(map(len, one)) for one in sent], [sum(one) for one in sizes]
        given = torch.cat([x for one in sent for x in one])
        work = dist.all_to_all_single(found, given, into, out, group=self._group(members), async_op=True)

        def answer() -> Any:
            parts = iter(found.split([n for one in sizes for n in one]))
            return tuple(tuple(_like(next(parts), x, shape) for x, shape in zip(kinds, one, strict=True)) for one in shapes)

        return work, answer, (given,)

    def _group(self, members: tuple[int, ...]) -> Any:
        if members not in self._groups:
            limit = timedelta(seconds=self.timeout)
            self._groups[members] = dist.new_group(list(members), timeout=limit, use_local_synchronization=True)
        return self._groups[members]

    def _bytes(self, x: Array) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            return x.reshape(-1).view(torch.uint8).to(self._device)
        flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        return torch.from_numpy(flat if flat.flags.writeable else flat.copy()).to(self._device)

    # ---- when somebody is gone

    def _terminated(self, number: int, frame: object) -> None:
        """SIGTERM. A rank that waits will hear of the loss by itself, and say what it waited for; one that computes just ends."""
        self._told = True
        if not self._waiting:
            raise _Ended

    def _say(self, what: str) -> None:
        self._store.set(f"stopped/{self.rank}", what)

    def _diagnosed(self, lost: _Lost) -> DscError:
        """What became of the others, by what they say within `GRACE`; empty where another rank says it."""
        try:
            self._say("waits")
            end = time.monotonic() + GRACE
            others = [rank for rank in range(self.mesh.world) if rank != self.rank]
            while (silent := [r for r in others if not self._store.check([f"stopped/{r}"])]) and time.monotonic() < end:
                time.sleep(0.05)
            said = {rank: self._store.get(f"stopped/{rank}").decode() for rank in others if rank not in silent}
        except RuntimeError:  # the store went with the rank that kept it
            silent, said = [], {}
        if "failed" in said.values() or any(rank < self.rank for rank in said):
            return DscError("")
        missing = [rank for rank in lost.members if rank in silent] or silent
        slow = lost.seconds >= 0.9 * self.timeout
        fate = f"no answer from {ranks_text(missing)} within {self.timeout:g} s" if slow else f"{ranks_text(missing)} ended"
        return DscError(f"{fate if missing else lost.reason}; rank {self.rank} waited in {where(lost.request)}")


@dataclass(frozen=True, eq=False)
class _Flight:
    """A request that torch.distributed carries: what becomes of it, and what has to stay in memory until then."""

    request: Request
    members: tuple[int, ...]
    start: float
    work: Any
    answer: Callable[[], Any]
    held: tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class _Promise:
    """What NCCL has been given: without the memory of it, which whoever waits on a stream keeps no longer than that."""

    request: Request
    members: tuple[int, ...]
    work: Any

    def came(self) -> bool:
        """Whether it is there. `_Lost` where it never will be."""
        if not self.work.is_completed():
            return False
        if (error := self.work.exception()) is not None:
            raise _Lost(self.request, self.members, 0.0, _first(error))
        return True


class _Lost(Exception):
    """A partner did not answer."""

    def __init__(self, request: Request, members: tuple[int, ...], seconds: float, reason: str) -> None:
        super().__init__(reason)
        self.request, self.members, self.seconds, self.reason = request, members, seconds, reason


def _expected(request: Request) -> Sequence[Array]:
    """Arrays of the kind of those that come."""
    match request:
        case Gather(x=x):
            return (x,)
        case Exchange(messages=messages):
            return messages[0]
        case Receive(likes=likes):
            return likes
    return ()


def _is_on_host(x: Array) -> bool:
    return not isinstance(x, torch.Tensor) or x.device.type == "cpu"


def _first(error: Exception) -> str:
    return str(error).split("\n")[0].strip()


def _size(like: Array, shape: tuple[int, ...]) -> int:
    """Bytes of an array of the dtype of `like`."""
    return int(np.prod(shape, dtype=np.int64)) * int(like.dtype.itemsize)


def _like(found: torch.Tensor, like: Array, shape: tuple[int, ...]) -> Array:
    """Bytes as an array of the kind and dtype of `like`; torch wants them to begin at a multiple of an element's size."""
    if isinstance(like, torch.Tensor):
        aligned = found if found.storage_offset() % like.dtype.itemsize == 0 else found.clone()
        return aligned.view(like.dtype).reshape(shape).to(like.device)
    return found.cpu().numpy().view(like.dtype).reshape(shape)
