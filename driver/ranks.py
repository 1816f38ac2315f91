"""Running a sharded program on all ranks of its mesh: each gets its part of the weights and inputs, and the whole results are put together.

`local` runs them in this process, in lockstep; `torchrun` this process's rank alone, the others being processes of their own. A module says
itself which part a rank holds of what (ir/sharding.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np

from ..backends import Observer, RankRunner, Runner
from ..backends.arrays import Data
from ..distributed import local
from ..distributed.world import Program, Receive, Send
from ..ir.core import Module
from ..ir.errors import DscError, require
from ..ir.mesh import Mesh, mesh_of
from ..ir.sharding import Split, input_splits, part, result_splits, weight_splits, whole
from ..ir.types import Bundle, Tensor, Type
from ..ir.walk import weights as weights_of
from ..models.weights import Wanted, Weights, part_of
from .measure import same_bits

Ranks = Literal["local", "torchrun"]
TIMEOUT = 600.0
"""Seconds that a rank waits for the others in one collective."""


def started_by_torchrun() -> bool:
    """Whether this process is one of several ranks."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def is_first() -> bool:
    """Whether this process speaks for all ranks."""
    return int(os.environ.get("RANK", "0")) == 0


def run_ranks(
    module: Module,
    weights: Weights,
    inputs: Sequence[Data],
    runner: Runner,
    ranks: Ranks,
    observe: Observer | None,
    timeout: float = TIMEOUT,
) -> tuple[Data, ...]:
    """The whole results of `module`, for whole `inputs`, on every rank of its mesh. Under torchrun only rank 0 has them, the others ().

    `DscError` where the module has no mesh, the backend cannot run on many ranks, or a rank fails.
    """
    mesh = mesh_of(module)
    if not hasattr(runner, "program"):
        raise DscError("this backend does not run on many ranks; numpy and numpy-f64 do")
    given = RankWeights(weights, module, keep=ranks == "local")
    on_ranks = cast(RankRunner, runner)

    def program(rank: int) -> Program[tuple[Data, ...]]:
        mine = tuple(cut(x, split, mesh, rank) for x, split in zip(inputs, input_splits(module), strict=True))
        return on_ranks.program(module, lambda name, _: given.get(rank, name), mine, observe)

    if ranks == "local":
        return assembled(module, local.run(mesh, program))
    from ..distributed.torch_world import TorchWorld

    with TorchWorld(mesh, timeout) as world:
        found = world.run(_to_first(program(world.rank), module, world.rank))
    return assembled(module, found) if found else ()


def _to_first(program: Program[tuple[Data, ...]], module: Module, rank: int) -> Program[list[tuple[Data, ...]]]:
    """The results of every rank on rank 0, and nothing on the others."""
    mine = yield from program
    ranks = mesh_of(module).world
    if rank:
        for x in _leaves(mine):
            yield Send("world", ranks, x, 0, op="results")
        return []
    found = [mine]
    for source in range(1, ranks):
        arrays = []
        for x in _leaves(mine):
            arrays.append((yield Receive("world", ranks, x, source, op="results")))
        found.append(_like(mine, iter(arrays)))
    return found


def _leaves(data: Data) -> list[np.ndarray]:
    return [x for field in data for x in _leaves(field)] if isinstance(data, tuple) else [data]


def _like(data: Data, arrays: Any) -> Data:
    return tuple(_like(field, arrays) for field in data) if isinstance(data, tuple) else next(arrays)


class RankWeights:
    """The part of each weight that a rank holds. With `keep` a weight is read once for all ranks, which share its memory."""

    def __init__(self, source: Weights, module: Module, keep: bool) -> None:
        self.source = source
        self.mesh = mesh_of(module)
        self.splits = weight_splits(module)
        self.kept: dict[str, np.ndarray] | None = {} if keep else None
        self.wanted = {name: _wanted(name, whole(tensor, self.splits[name], self.mesh)) for name, tensor in weights_of(module).items()}
        source.check(list(self.wanted.values()))

    def get(self, rank: int, name: str) -> np.ndarray:
        """The part of `rank`; of a checkpoint no more is read."""
        wanted = self.wanted[name]
        index = part(self.splits[name], wanted.shape, self.mesh, rank)
        if self.kept is not None:
            if name not in self.kept:
                self.kept[name] = self.source.get(wanted)
            return self.kept[name][index]
        return part_of(self.source, wanted, index)


def _wanted(name: str, tensor: Type) -> Wanted:
    if not isinstance(tensor, Tensor) or not tensor.is_static:
        raise DscError(f"weight {name} is {tensor}, expected a static shape")
    return Wanted(name, tensor.dtype.name, tuple(d for d in tensor.shape if isinstance(d, int)))


def cut(x: Data, split: Split, mesh: Mesh, rank: int) -> Data:
    """The part of `rank` of a whole value."""
    if isinstance(x, tuple):
        return tuple(cut(field, inner, mesh, rank) for field, inner in zip(x, split, strict=True))
    return x[(*part(split, x.shape, mesh, rank), ...)]


def assembled(module: Module, results: Sequence[tuple[Data, ...]]) -> tuple[Data, ...]:
    """The whole results, from those of every rank. `DscError` where two ranks that should hold the same part do not."""
    mesh = mesh_of(module)
    values = zip(module.main.results, result_splits(module), zip(*results, strict=True), strict=True)
    return tuple(_assembled(value.name, value.type, split, mesh, found) for value, split, found in values)


def _assembled(name: str, type: Type, split: Split, mesh: Mesh, found: Sequence[Data]) -> Data:
    if isinstance(type, Bundle):
        fields = zip(type.fields, split, zip(*found, strict=True), strict=True)
        return tuple(_assembled(f"{name}.{i}", t, inner, mesh, given) for i, (t, inner, given) in enumerate(fields))
    made = whole(type, split, mesh)
    assert isinstance(made, Tensor)
    require(made.is_static, f"result %{name} is {type} on each rank, which does not make one whole")
    shape = tuple(d for d in made.shape if isinstance(d, int))
    result = np.empty(shape, found[0].dtype)
    holders: dict[tuple[int, ...], int] = {}
    for rank, x in enumerate(found):
        index = part(split, shape, mesh, rank)
        first = holders.setdefault(tuple(s.start for s in index), rank)
        if first == rank:
            result[index] = x
        else:
            require(same_bits(x, found[first]), f"result %{name}: ranks {first} and {rank} should hold the same, and do not")
    return result
