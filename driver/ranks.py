"""Running a sharded program on all ranks of its mesh: each gets its part of the weights and inputs, and the whole results are put together.

`local` runs them in this process, in lockstep; `torchrun` this process's rank alone, the others being processes of their own. A module says
itself which part a rank holds of what (ir/sharding.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import numpy as np

from ..backends import Observer, RankRunner, ResidentRunner, Runner
from ..backends.arrays import STORAGE, Data
from ..distributed import local
from ..distributed.pipeline import Pipeline, leaves, pipeline, rebuilt
from ..distributed.pipeline import program as along_pp
from ..distributed.world import Placed, Program, Receive, Send, Settle
from ..ir.core import Module
from ..ir.errors import DscError, require
from ..ir.mesh import Mesh, mesh_of
from ..ir.sharding import Split, input_splits, part, result_splits, weight_splits, whole
from ..ir.stages import cut_inputs, is_staged
from ..ir.types import Bundle, Tensor, Type, bound, landed
from ..ir.walk import weights as weights_of
from ..models.placed import placed
from ..models.weights import Wanted, Weights
from ..models.weights import part_of as read_part
from ..schedule.actions import Schedule
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
    schedule: Schedule | None = None,
) -> tuple[Data, ...]:
    """The whole results of `module`, for whole `inputs`, on every rank of its mesh. Under torchrun only rank 0 has them, the others ().

    A program that is cut into stages runs for each micro-batch of the `inputs`, in the order of `schedule`. `DscError` where the module
    has no mesh, the schedule does not fit it, the backend cannot run on many ranks, or a rank fails.
    """
    program, plan = rank_program(module, weights, inputs, runner, observe, schedule, keep=ranks == "local")
    if ranks == "local":
        return whole_results(module, dict(enumerate(local.run(mesh_of(module), program))))
    from ..distributed.torch_world import TorchWorld

    with TorchWorld(mesh_of(module), timeout) as world:
        found = world.run(to_first(program(world.rank), module, plan, world.rank))
    return whole_results(module, found) if found else ()


Held = Mapping[tuple[int, int], Data]
"""What a rank has of the results of main: by their number, and by micro-batch where each has its own; else that is 0."""


def rank_program(
    module: Module,
    weights: Weights,
    inputs: Sequence[Data],
    runner: Runner,
    observe: Observer | None = None,
    schedule: Schedule | None = None,
    keep: bool = True,
) -> tuple[Placed[Held], Pipeline | None]:
    """The program of each rank, and the pipeline that ranks form, if they do. With `keep` they share the memory of weights."""
    mesh = mesh_of(module)
    if not hasattr(runner, "program"):
        raise DscError("this backend does not run on many ranks; numpy, numpy-f64 and triton do")
    plan = pipeline(module, schedule) if schedule else None
    given = RankWeights(weights, module, "all" if keep else "own" if plan else "none")
    on_ranks = cast(RankRunner, runner)
    on_device = cast(ResidentRunner, runner) if hasattr(runner, "resident") else None
    enter, room = (on_device.resident, on_device.empty) if on_device else (on_ranks.program, empty)

    def program(rank: int) -> Program[Held]:
        def own(name: str, type: Tensor) -> np.ndarray:  # one function, since a backend keeps for it what it has prepared
            return given.get(rank, name)

        if plan is None:
            return _plain(on_ranks.program(module, own, inputs_of(module, inputs, rank), observe))

        def run(name: str, arguments: Sequence[Data]) -> Program[tuple[Data, ...]]:
            return enter(plan.entered[name], own, arguments, observe)

        found = along_pp(plan, mesh.index("pp", rank), run, lambda m: inputs_of(module, inputs, rank, m), room)
        return _fetched(found, module, on_device) if on_device else found

    return program, plan


def _fetched(program: Program[Held], module: Module, runner: ResidentRunner) -> Program[Held]:
    """The results of a rank of a pipeline, on the host."""
    found = yield from program
    yield Settle()
    return {(index, m): runner.fetched(data, module.main.results[index].type) for (index, m), data in found.items()}


def _plain(program: Program[tuple[Data, ...]]) -> Program[Held]:
    """The results of a program that is not cut into stages."""
    return {(index, 0): data for index, data in enumerate((yield from program))}


def inputs_of(module: Module, inputs: Sequence[Data], rank: int, microbatch: int = 0) -> tuple[Data, ...]:
    """What a rank takes of the inputs of all micro-batches."""
    mesh = mesh_of(module)
    found = []
    for x, param, split, has_part in zip(inputs, module.main.params, input_splits(module), cut_inputs(module), strict=True):
        if has_part and is_staged(module):
            made = whole(param.type, split, mesh)
            assert isinstance(made, Tensor)
            count = bound(made.shape[0])
            x = x[microbatch * count : (microbatch + 1) * count]
        found.append(cut(x, split, mesh, rank))
    return tuple(found)


def to_first(program: Program[Held], module: Module, plan: Pipeline | None, rank: int) -> Program[dict[int, Held]]:
    """The results of every rank on rank 0, and nothing on the others."""
    mine = yield from program
    mesh = mesh_of(module)
    if rank:
        if mine:
            yield Send("world", mesh.world, tuple(leaves(tuple(mine.values()))), 0, op="results")
        return {}
    found = {0: mine}
    for source in range(1, mesh.world):
        keys = plan.returned(mesh.index("pp", source)) if plan else tuple(mine)
        like = tuple(empty(module.main.results[index].type) for index, _ in keys)
        arrays = (yield Receive("world", mesh.world, tuple(leaves(like)), source, op="results")) if keys else ()
        found[source] = dict(zip(keys, rebuilt(like, iter(arrays)), strict=True))
    return found


def empty(type: Type) -> Data:
    """An array to be written, or for a bundle a tuple of such."""
    there = landed(type)
    if isinstance(there, Bundle):
        return tuple(map(empty, there.fields))
    require(there.is_static, f"{there} has no size that another rank would know")
    return np.empty(there.shape, STORAGE[there.dtype])


class RankWeights:
    """The part of each weight that a rank holds.

    With `keep="all"` a weight is read once for all ranks, which share its memory; with "own" a rank that reads its part more than once, as
    the stages of a pipeline do for each micro-batch, reads it from the source but once.
    """

    def __init__(self, source: Weights, module: Module, keep: Literal["all", "own", "none"]) -> None:
        self.source = source = placed(source, module)
        self.mesh = mesh_of(module)
        self.splits = weight_splits(module)
        self.keep = keep
        self.whole: dict[str, np.ndarray] = {}
        self.parts: dict[tuple[int, str], np.ndarray] = {}
        self.cuts: dict[tuple[str | int, ...], np.ndarray] = {}
        """Parts of wholes by where they begin: ranks that hold the same one hold one array."""
        self.wanted = {name: Wanted.of(name, whole(tensor, self.splits[name], self.mesh)) for name, tensor in weights_of(module).items()}
        source.check(list(self.wanted.values()))

    def get(self, rank: int, name: str) -> np.ndarray:
        """The part of `rank`; of a checkpoint no more is read."""
        found = self.parts.get((rank, name))
        if found is None:
            found = self.read(name, part(self.splits[name], self.wanted[name].shape, self.mesh, rank))
            if self.keep != "none":
                self.parts[rank, name] = found
        return found

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a weight, from the source or from the whole that has been read."""
        if self.keep != "all":
            return read_part(self.source, self.wanted[name], index)
        if name not in self.whole:
            self.whole[name] = self.source.get(self.wanted[name])
        return self.cuts.setdefault((name, *(s.start for s in index)), self.whole[name][index])


def cut(x: Data, split: Split, mesh: Mesh, rank: int) -> Data:
    """The part of `rank` of a whole value."""
    if isinstance(x, tuple):
        return tuple(cut(field, inner, mesh, rank) for field, inner in zip(x, split, strict=True))
    return x[(*part(split, x.shape, mesh, rank), ...)]


def assembled(module: Module, results: Sequence[tuple[Data, ...]]) -> tuple[Data, ...]:
    """The whole results, from those of every rank, each of which has a part of all of them."""
    return whole_results(module, {rank: {(i, 0): x for i, x in enumerate(found)} for rank, found in enumerate(results)})


def whole_results(module: Module, results: Mapping[int, Held]) -> tuple[Data, ...]:
    """The whole results, from what each rank has of them. `DscError` where two ranks that should hold the same part do not."""
    mesh = mesh_of(module)
    found = []
    for index, (value, split) in enumerate(zip(module.main.results, result_splits(module), strict=True)):
        of_microbatches = sorted({m for held in results.values() for i, m in held if i == index})
        parts = [{rank: held[index, m] for rank, held in results.items() if (index, m) in held} for m in of_microbatches]
        found.append(_joined([_assembled(value.name, value.type, split, mesh, part) for part in parts]))
    return tuple(found)


def _joined(parts: Sequence[Data]) -> Data:
    """The results of micro-batches as one."""
    if len(parts) == 1:
        return parts[0]
    return tuple(map(_joined, zip(*parts, strict=True))) if isinstance(parts[0], tuple) else np.concatenate(parts)


def _assembled(name: str, type: Type, split: Split, mesh: Mesh, found: Mapping[int, Data]) -> Data:
    """The whole, from the parts of the ranks that have one."""
    if isinstance(type, Bundle):
        inner = [{rank: data[i] for rank, data in found.items()} for i in range(len(type.fields))]
        return tuple(_assembled(f"{name}.{i}", t, split[i], mesh, inner[i]) for i, t in enumerate(type.fields))
    made = whole(type, split, mesh)
    assert isinstance(made, Tensor)
    require(made.is_static, f"result %{name} is {type} on each rank, which does not make one whole")
    shape = tuple(d for d in made.shape if isinstance(d, int))
    result = np.empty(shape, STORAGE[made.dtype])
    holders: dict[tuple[int, ...], int] = {}
    for rank, x in found.items():
        index = part(split, shape, mesh, rank)
        first = holders.setdefault(tuple(s.start for s in index), rank)
        if first == rank:
            result[index] = x
        else:
            require(same_bits(x, found[first]), f"result %{name}: ranks {first} and {rank} should hold the same, and do not")
    return result
