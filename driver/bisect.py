"""Whether a program still computes what it did: the evaluator that bisecting a pipeline needs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..ir.core import Module
from .inputs import seeded
from .measure import measure
from .run import run


def same_results(module: Module, tolerance: float = 0.0) -> Callable[[Module], bool]:
    """A test for later modules: do they give the results of `module`, on weights random:0 and seeded inputs?

    `tolerance` is the relative L2 difference allowed in each result; 0 demands equal values.
    """
    inputs = seeded(module)
    expected = run(module, inputs=inputs)

    def same(other: Module) -> bool:
        found = run(other, inputs=inputs)
        pairs = zip(expected, found, strict=False)
        alike = (x.shape == y.shape and measure(_plain(x), _plain(y)).relative_l2 <= tolerance for x, y in pairs)
        return len(expected) == len(found) and all(alike)

    return same


def _plain(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)
