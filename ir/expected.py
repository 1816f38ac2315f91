"""How large values with ragged dimensions are expected to be: of the rows that experts get a program knows the bound alone.

The bound is what comes when every token chooses the same experts: at 64 ranks sixty-four times what comes when it is even. Buffers are
sized by what is expected, times an imbalance.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil

from .core import Module
from .ops.collective import AllToAllRows
from .types import Bundle, Dim, Ragged, Tensor, Type, bound, landed

IMBALANCE = Fraction(6, 5)
"""Rows that the busiest rank gets, by those of the mean: what PithTrain reserves (arXiv 2605.31463)."""


def mean_rows(module: Module) -> dict[Ragged, int]:
    """How many rows a ragged dimension has on average: as many come as a rank sends; in a second hop as many as in the first."""
    rows: dict[Ragged, int] = {}
    for func in module.funcs:
        for op in func.ops:
            if isinstance(op, AllToAllRows) and isinstance(op.rows, Ragged):
                sent = op.xs[0].shape[0]
                rows[op.rows] = rows.get(sent, sent.bound) if isinstance(sent, Ragged) else sent
    return rows


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
