"""How large values with ragged dimensions are expected to be: of the rows that experts get a program knows the bound alone.

The bound is what comes when every token chooses the same experts: at 64 ranks sixty-four times what comes when it is even. Buffers are
sized by what is expected, times an imbalance. Over nodes a token's row goes once to each node that has one of its experts, and once to
each rank: how many these are the gate's rule says (`routing.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from math import ceil

from .core import Module, Value
from .ops.collective import AllToAllRows
from .ops.internode import meant
from .ops.moe import DispatchGroups
from .ops.quant import Quantize
from .routing import Routing, routing_of
from .types import Bundle, Dim, Ragged, Tensor, Type, bound, landed

IMBALANCE = Fraction(6, 5)
"""Rows that the busiest rank gets, by those of the mean: what PithTrain reserves (arXiv 2605.31463)."""


def mean_rows(module: Module) -> dict[Ragged, int]:
    """How many rows a ragged dimension has on average: as many come as a rank sends.

    To groups of experts a rank sends a row for each of its tokens and each group that the token reaches; it gets as many, to send
    on. Where no gate says how many groups that is, it is all choices of a token, or all groups.
    """
    routing, rows, tokens = routing_of(module), dict[Ragged, int](), dict[Dim, int]()
    for func in module.funcs:
        for op in (hop for each in func.ops for hop in meant(each)):
            match op:
                case AllToAllRows(xs=(x, *_), rows=Ragged() as come):
                    rows[come] = _mean(x.shape[0], rows)
                    tokens[come] = tokens.get(x.shape[0], rows[come])
                case DispatchGroups(xs=(x, *_)):
                    (dim,) = op.results[-1].shape
                    if isinstance(dim, Ragged):
                        tokens[dim] = tokens.get(x.shape[0], _mean(x.shape[0], rows))
                        rows[dim] = min(dim.bound, ceil(tokens[dim] * _copies(op, routing)))
                case Quantize(x=x, counts=Value() as counts, tile=tile):
                    down = op.results[1].shape[0]
                    if isinstance(down, Ragged):
                        rows[down] = min(down.bound, _mean(x.shape[0], rows) // tile[0] + bound(counts.shape[0]))
    return rows


def _copies(op: DispatchGroups, routing: Routing | None) -> float:
    """How often a token of the rank's own is sent: groups are places of equal size among all experts, of which this hop sees some."""
    if routing is None or routing.slots % op.size:
        return bound(op.ids.shape[1])
    return routing.distinct(routing.slots // op.size)


def _mean(dim: Dim, rows: Mapping[Ragged, int]) -> int:
    return rows.get(dim, dim.bound) if isinstance(dim, Ragged) else dim


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
