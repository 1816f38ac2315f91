"""What the reference answers to a sample, and how far another answer may lie from it: what the conformance suite and `dsc golden` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import backends
from ..backends.arrays import Array, Data
from ..ir.core import Module, Op
from ..ir.ops.control import Call, Constant, Param
from ..ir.ops.fused import Fused
from ..ir.types import Tensor
from .bounds import bound
from .sampling import Sample, seeded


@dataclass(frozen=True)
class Answer:
    """One sample with numbers: `op` stands last in `module`, whose inputs are `operands`."""

    module: Module
    op: Op
    operands: tuple[Data, ...]
    results: tuple[Data, ...]
    bounds: tuple[Array, ...]
    """The permitted difference of each element of each result tensor, those in bundles one by one: float64, 0 for equal bits, infinity
    where anything goes."""
    weights: dict[str, Array]
    """The weights that the module reads, by name."""

    @property
    def needs_module(self) -> bool:
        """Whether the op means nothing without the module it stands in."""
        return isinstance(self.op, Param | Constant | Call)


def answer(sample: Sample, seed: int = 0) -> Answer:
    """The reference's answer to the numbers that `seed` draws."""
    module, operands = sample.module(), sample.arrays(seed)
    op, weights = module.main.ops[-1], dict[str, Array]()  # before the op may stand what starts what it waits for

    def fetch(name: str, type: Tensor) -> Array:
        weights[name] = seeded(name, type)
        return weights[name]

    results = backends.get("numpy").run(module, fetch, operands)
    flat = leaves(results)
    if isinstance(op, Param | Constant | Call) and not isinstance(op, Fused):
        limits: tuple[Any, ...] = (0.0,) * len(flat)  # moved, or one addition, which every float32 rounds alike
    else:
        limits = bound(op, operands, results, module=module)
    bounds = tuple(np.broadcast_to(np.asarray(limit, np.float64), x.shape) for limit, x in zip(limits, flat, strict=True))
    return Answer(module, op, operands, results, bounds, weights)


def leaves(values: Any) -> list[Array]:
    """The arrays of values, those in bundles too."""
    return [x for v in values for x in (leaves(v) if isinstance(v, tuple) else [v])]
