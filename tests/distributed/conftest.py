"""Programs on all ranks of a mesh, in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import pytest

import dsc
from dsc.backends.numpy_ref.run import FLOAT64
from dsc.distributed import local
from dsc.distributed.world import Program
from dsc.driver.inputs import prepare
from dsc.driver.ranks import RankWeights, assembled, cut
from dsc.driver.run import array_types, open_weights
from dsc.ir.core import Builder, Module, Op
from dsc.ir.mesh import mesh_of
from dsc.ir.ops.collective import AllGather, AllReduce, AllToAll, ReduceScatter, Transfer
from dsc.ir.ops.elementwise import Add, Mul, Neg
from dsc.ir.ops.linalg import Matmul
from dsc.ir.sharding import input_splits
from dsc.ir.types import DType, Tensor
from dsc.ir.verify import verify
from dsc.models.random_weights import RandomWeights
from dsc.passes.overlapping.emit import emit
from dsc.passes.overlapping.order import listed
from dsc.passes.overlapping.tasks import tasks_of

Run = Callable[..., dict[str, Any]]


@cache
def _source(mode: str, batch: int, seq: int, dtype: str, layers: int) -> Module:
    sizes = {"context": 2 * seq} if mode == "decode" else {"seq": seq}
    changes = (f"dtype={dtype}", f"num_hidden_layers={layers}")
    return dsc.trace("deepseek-v3-tiny", mode=mode, batch=batch, overrides=changes, **sizes)


@pytest.fixture(scope="session")
def program() -> Callable[..., Module]:
    """The tiny model: mode, batch, positions, dtype, and passes before sharding, of which weighted-swiglu comes before differentiation."""

    def make(mode: str = "forward", batch: int = 2, seq: int = 16, dtype: str = "bfloat16", passes: str = "", layers: int = 2) -> Module:
        early, late = (passes[:15], passes[16:]) if passes.startswith("weighted-swiglu") else ("", passes)
        every = ("simplify", early, *(["autodiff", "simplify"] if mode == "train" else []), late)
        return dsc.apply(_source(mode, batch, seq, dtype, layers), ",".join(filter(None, every)))

    return make


@pytest.fixture(scope="session")
def run_whole() -> Run:
    """What the unsharded program gives, by name, its sums in float64."""

    def run(module: Module, observe: Any = None) -> dict[str, Any]:
        return named(module, FLOAT64.run(module, open_weights("random:0", module, None), prepare(module, None), observe))

    return run


@pytest.fixture(scope="session")
def run_ranks() -> Run:
    """What all ranks of the sharded program give together, on the inputs of the unsharded one; they must agree on what they share."""

    def run(unsharded: Module, module: Module, observe: Callable[[int], Any] = lambda rank: None) -> dict[str, Any]:
        mesh, inputs, weights = mesh_of(module), prepare(unsharded, None), RankWeights(RandomWeights(0), module, keep="all")

        def one(rank: int) -> Program[tuple[Any, ...]]:
            own = tuple(cut(x, split, mesh, rank) for x, split in zip(inputs, input_splits(module), strict=True))
            return FLOAT64.program(module, lambda name, _: weights.get(rank, name), own, observe(rank))

        return named(module, assembled(module, local.run(mesh, one)))

    return run


def named(module: Module, results: tuple[Any, ...]) -> dict[str, Any]:
    """Every array of the results by name, those in bundles too."""
    return dict(zip(array_types(module), _flat(results), strict=True))


def _flat(values: Any) -> list[Any]:
    return [leaf for value in values for leaf in _flat(value)] if isinstance(values, tuple) else [values]


# ---- random programs that communicate

SQUARE = Tensor(DType.f32, (4, 4))


def draw(random: Random) -> Module:
    """Matrices that are computed and exchanged along two axes."""
    b = Builder("main", "main")
    values = [b.param(f"x{i}", SQUARE) for i in range(2)]
    for _ in range(random.randint(3, 25)):
        x, y = random.choices(values, k=2)
        axis = random.choice(("ep", "tp"))
        made: Op = random.choice(
            [Neg(x), Add(x, y), Mul(x, y), Matmul(x, y), AllToAll(x, axis, 2), AllReduce(x, axis, 2, "sum"), AllToAll(y, axis, 2)]
        )
        if random.random() < 0.1:
            made = ReduceScatter(b.emit(AllGather(x, axis, 2)).result, axis, 2)
        values.append(b.emit(made).result)
    return verify(Module((b.finish(random.choices(values, k=3)),), "sharded", {"mesh": {"pp": 1, "dp": 2, "ep": 2, "tp": 2, "node": 8}}))


class Drawn:
    """Durations that have nothing to do with the ops."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.known: dict[str, float] = {}

    def seconds(self, op: Op) -> float:
        return self.known.setdefault(op.id, self.random.choice((0.0, 1.0, 3.0, 10.0)))

    def stream(self, op: Op) -> Any:
        return "comm" if isinstance(op, Transfer) else "compute"


@pytest.fixture(scope="session")
def drawn() -> Callable[[Random], tuple[Module, Module]]:
    """A program that is drawn, and the same in an order of list scheduling, its collectives in flight."""

    def make(random: Random) -> tuple[Module, Module]:
        module = draw(random)
        tasks = tasks_of(module, module.main, Drawn(random))
        func = emit(module, module.main, tasks, listed(tasks, [random.random() for _ in tasks]))
        return module, module.replace(funcs=(func,), stage="scheduled")

    return make
