"""The ranks of a training run: who runs them, and how arrays of which they hold parts become whole.

A run is the same on one rank, on all ranks of a mesh in this process, and on one of them that torchrun started: each step is a program for
every rank of which this process has some, and a team runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import numpy as np

from ..backends import Observer, RankRunner, Runner, Weights
from ..backends.arrays import STORAGE, Array, Data
from ..distributed import local
from ..distributed.world import Gather, Program, Receive, Send, alone
from ..ir.core import Module
from ..ir.errors import DscError, require
from ..ir.mesh import Mesh
from ..ir.sharding import Split, part
from ..ir.types import Tensor, bound
from .ranks import Ranks, is_first

if TYPE_CHECKING:
    from ..distributed.torch_world import TorchWorld

T = TypeVar("T")


class Team(Protocol):
    """Who runs programs on the ranks of a mesh."""

    @property
    def mesh(self) -> Mesh: ...
    @property
    def mine(self) -> Sequence[int]:
        """The ranks that this process runs."""
        ...

    def run(self, program: Callable[[int], Program[T]]) -> list[T]:
        """The results of `program(rank)` for each of `mine`, while the other processes run it for theirs."""
        ...


@dataclass(frozen=True)
class Alone:
    """One rank."""

    mesh: Mesh = field(default_factory=Mesh)
    mine: Sequence[int] = (0,)

    def run(self, program: Callable[[int], Program[T]]) -> list[T]:
        return [alone(program(0))]


@dataclass(frozen=True)
class Lockstep:
    """All ranks in this process."""

    mesh: Mesh

    @property
    def mine(self) -> Sequence[int]:
        return range(self.mesh.world)

    def run(self, program: Callable[[int], Program[T]]) -> list[T]:
        return local.run(self.mesh, program)


@dataclass(frozen=True)
class Apart:
    """One of the ranks that torchrun started."""

    world: TorchWorld

    @property
    def mesh(self) -> Mesh:
        return self.world.mesh

    @property
    def mine(self) -> Sequence[int]:
        return (self.world.rank,)

    def run(self, program: Callable[[int], Program[T]]) -> list[T]:
        return [self.world.run(program(self.world.rank))]


def check_team(mesh: Mesh, ranks: Ranks | None, runner: Runner, backend: str) -> None:
    """Refuse a mesh that nobody would run, before any work."""
    if mesh.world > 1:
        hint = f'give --ranks local (ranks="local"), or start them with torchrun --nproc-per-node {mesh.world}'
        require(ranks is not None, f"mesh {mesh} is {mesh.world} ranks: {hint}")
        require(hasattr(runner, "program"), f"backend {backend} does not run on many ranks; numpy, numpy-f64 and triton do")


@contextmanager
def open_team(mesh: Mesh, ranks: Ranks | None, timeout: float) -> Iterator[Team]:
    """Whoever runs the ranks of `mesh`."""
    if ranks == "torchrun":
        from ..distributed.torch_world import TorchWorld

        with TorchWorld(mesh, timeout) as world:
            yield Apart(world)
        return
    yield Alone() if mesh.world == 1 else Lockstep(mesh)


@contextmanager
def said_once(ranks: Ranks | None) -> Iterator[None]:
    """For what every rank does by itself before they meet, and so finds wrong by itself: the first alone says it."""
    try:
        yield
    except DscError:
        if ranks == "torchrun" and not is_first():
            raise DscError("") from None
        raise


def leads(team: Team) -> bool:
    """Whether this process writes the files of the run and speaks for it."""
    return 0 in team.mine


def agreed(team: Team, value: int) -> int:
    """What the first rank says, on every rank."""

    def ask(rank: int) -> Program[int]:
        found = yield Gather("world", team.mesh.world, np.array([value], np.int64), op="settings")
        return int(found[0][0])

    return team.run(ask)[0]


def as_program(
    runner: Runner, module: Module, weights: Weights, inputs: Sequence[Data], observe: Observer | None = None
) -> Program[tuple[Data, ...]]:
    """A run of `module` as a rank's program. A backend that runs on one rank alone runs at once."""
    if hasattr(runner, "program"):
        return cast(RankRunner, runner).program(module, weights, inputs, observe)

    def run() -> Program[tuple[Data, ...]]:
        return runner.run(module, weights, inputs, observe)
        yield

    return run()


@dataclass(frozen=True)
class Part:
    """An array of which `ranks` hold parts: its whole type, how it is split, and what each rank of this process has, in their order."""

    type: Tensor
    split: Split
    ranks: Sequence[int]
    held: Sequence[Array | None]


class Whole(Mapping[str, np.ndarray]):
    """Whole arrays by name. One is put together on the first rank when it is looked up, and kept by nobody.

    All processes look up the same names in the same order; those that do not lead get an empty array.
    """

    def __init__(self, team: Team, parts: Mapping[str, Part]) -> None:
        self.team, self.parts = team, parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, name: str) -> np.ndarray:
        found, mine = self.parts[name], list(self.team.mine)
        return self.team.run(lambda rank: _collected(found, found.held[mine.index(rank)], self.team.mesh, rank, name))[0]

    def give(self) -> None:
        """The part of a process that does not lead while the first looks up every array, in order."""
        for name in self:
            self[name]


def _collected(whole: Part, own: Array | None, mesh: Mesh, rank: int, name: str) -> Program[Array]:
    """The whole on rank 0, to which the first holder of each part sends it."""
    shape = tuple(map(bound, whole.type.shape))
    holders: dict[tuple[int, ...], tuple[int, tuple[slice, ...]]] = {}
    for other in whole.ranks:
        index = part(whole.split, shape, mesh, other)
        holders.setdefault(tuple(s.start for s in index), (other, index))
    if rank:
        if rank in (holder for holder, _ in holders.values()):
            yield Send("world", mesh.world, (own,), 0, op=f"checkpoint of {name}")
        return np.empty(0, STORAGE[whole.type.dtype])
    if own is not None and len(holders) == 1:
        return own
    found = np.empty(shape, STORAGE[whole.type.dtype])
    for holder, index in holders.values():
        there = found[index] if index else found
        there[...] = own if holder == 0 else (yield Receive("world", mesh.world, (there,), holder, op=f"checkpoint of {name}"))[0]
    return found
