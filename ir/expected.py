"""How large values with ragged dimensions are expected to be: of the rows that experts get a program knows the bound alone.

The bound is what comes when every token chooses the same experts: at 64 ranks sixty-four times what comes when it is even. Buffers are
sized by what is expected, times an imbalance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from math import ceil

from .core import Module
from .ops.collective import AllToAllRows
from .ops.moe import DispatchGroups
from .types import Bundle, Dim, Ragged, Tensor, Type, bound, landed

IMBALANCE = Fraction(6, 5)
"""Rows that the busiest rank gets, by those of the mean: what PithTrain reserves (arXiv 2605.31463)."""


def mean_rows(module: Module) -> dict[Ragged, int]:
    """How many rows a ragged dimension has on average: as many come as a rank sends.

    To groups of experts go at most as many as there are choices, of a rank's own tokens that is: others send it what it sends away.
    """
    rows: dict[Ragged, int] = {}
    for func in module.funcs:
        for op in func.ops:
            match op:
                case AllToAllRows(xs=(x, *_), rows=Ragged() as dim):
                    rows[dim] = _mean(x.shape[0], 1, rows)
                case DispatchGroups(xs=(x, *_), ids=ids):
                    (groups,) = op.results[-1].shape
                    if isinstance(groups, Ragged):
                        rows[groups] = min(groups.bound, _mean(x.shape[0], bound(ids.shape[1]), rows))
    return rows


def _mean(dim: Dim, choices: int, rows: Mapping[Ragged, int]) -> int:
    return rows.get(dim, dim.bound) if isinstance(dim, Ragged) else dim * choices


def expected_bytes(module: Module) -> Callable[[Type], int]:
    """Bytes of a value. Of rows that ranks exchange as many count as come on average, times `IMBALANCE`; of other ragged ones the bound."""
    rows = {dim: mean * IMBALANCE for dim, mean in mean_rows(module).items()}

    def extent(dim: Dim) -> int:
        return min(dim.bound, ceil(rows[dim])) if isinstance(dim, Ragged) and dim in rows else bound(dim)

    def size(type: Type) -> int:
        there = landed(type)
        if isinstance(there, Bundle):
            return sum(map(size, there.fields))
        return there.bytes if there.is_static else Tensor(there.dtype, tuple(map(extent, there.shape))).bytes

    return size
