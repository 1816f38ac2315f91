"""Measuring tiles: for each product of a program the candidates are run on the GPU that is here, and the fastest is written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from ...ir.core import Module, Op
from ...ir.errors import DscError
from ...ir.ops.fused import alone
from ...ir.types import Tensor
from ..arrays import STORAGE
from .program import layout_of, plan_function
from .registry import KERNELS
from .run import Executor, no_weights
from .targets import Target
from .tiles import Gemm
from .timing import median_seconds

Timer = Callable[[Op, Mapping[str, Gemm]], float]
"""Seconds of an op with the tiles that are given; infinite where it does not run with them."""


@dataclass
class Asked:
    """Stands for a table of tiles, has none, and remembers what it was asked for and what was chosen instead."""

    tiles: dict[str, Gemm] = field(default_factory=dict)

    def get(self, key: str, chosen: Gemm) -> Gemm:
        self.tiles[key] = chosen
        return chosen


@dataclass(frozen=True)
class Measured:
    """What was found for one key: seconds of each candidate, the one chosen by shape first."""

    key: str
    op: str
    seconds: Mapping[Gemm, float]

    @property
    def best(self) -> Gemm:
        return min(self.seconds, key=self.seconds.__getitem__)


def products(module: Module, target: Target) -> dict[str, tuple[Op, Gemm]]:
    """For each tile that the program's kernels choose: an op that it is chosen for, and the tile."""
    found: dict[str, tuple[Op, Gemm]] = {}
    for op in (op for func in module.funcs for op in func.ops if type(op) in KERNELS):
        single, asked = alone(op), Asked()
        plan_function(single, single.main, [layout_of(v.type) for v in single.main.params], replace(target, tuned=asked), {})
        for key, tile in asked.tiles.items():
            found.setdefault(key, (op, tile))
    return found


def candidates(key: str, chosen: Gemm) -> Iterator[Gemm]:
    """Tiles worth a measurement, the chosen one first. All have 64 rows or more: below, Hopper computes other bits."""
    yield chosen
    depths = (chosen.k,) if key.startswith("scaled_gemm") else (64, 128)
    others = [Gemm(m, n, k, warps, stages) for m, n, warps, stages in SHAPES for k in depths]
    if "specialize=True" in key and chosen.k == 128:
        others += [Gemm(128, 128, 128, 4, stages, group, specialized=True) for stages in (3, 4, 5) for group in (8, 16)]
    yield from (tile for tile in others if tile != chosen)


SHAPES = ((64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (128, 128, 8, 3), (128, 128, 8, 4), (128, 256, 8, 3), (256, 128, 8, 3))
"""Rows, columns, warps and stages."""


def tune(module: Module, target: Target, timer: Timer, on_done: Callable[[str], None] = lambda key: None) -> list[Measured]:
    """The candidates of every product, measured."""
    found = []
    for key, (op, chosen) in products(module, target).items():
        seconds = {tile: timer(op, {key: tile}) for tile in candidates(key, chosen)}
        found.append(Measured(key, op.name, seconds))
        on_done(key)
    return found


def time_on_gpu(op: Op, tiles: Mapping[str, Gemm]) -> float:
    """The median time of the op's launches, on random operands; infinite where a tile does not compile or fit."""
    single = alone(op)
    try:
        prepared = Executor(graphs=False, tuned=tiles).prepare(single, no_weights, operands(op))
        return median_seconds(prepared.launch)
    except (DscError, RuntimeError):
        return float("inf")


def operands(op: Op) -> list[Any]:
    """Random numbers, FP8 codes of every magnitude; integers are counts, which share the rows of the first operand evenly."""
    rng = np.random.default_rng(0)
    values = list(dict.fromkeys(op.operands))
    rows = prod(layout_of(values[0].type).shape[:-1])

    def make(type: Tensor) -> Any:
        shape, storage = tuple(layout_of(type).shape), STORAGE[type.dtype]
        if not type.dtype.is_float:
            return np.full(shape, rows // max(1, prod(shape)), storage)
        if storage.itemsize == 1:
            return rng.integers(0, 120, shape, np.uint8).view(storage)
        return rng.standard_normal(shape, np.float32).astype(storage)

    return [make(value.tensor) for value in values]
