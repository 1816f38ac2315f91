"""Device code that permuting kernels share: the inverse of an order, and tokens' vectors spread over the rows that order gives them.

A dispatch's order names for each row the slot (token * k + which of its experts) that fills it. Kernels that work token by token want the
inverse, the row of each slot: then a token's vector is read or written once, whatever k is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.types import DType
from ..registry import Launch, Slot
from ..targets import Target
from ..tiles import ceil_div, power_of_two, warps

BLOCK = 1024


@triton.jit
def invert_kernel(ORDER, ROW_OF, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(ORDER + row, mask=row < rows, other=-1)
    tl.store(ROW_OF + slot, row, mask=(slot >= 0) & (slot < rows))


@triton.jit
def spread_kernel(X, ROW_OF, Y, tokens, columns, rows, SLOTS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (token < tokens) & (column < columns)
    x = tl.load(X + token.to(tl.int64) * columns + column, mask=inside)
    for slot in range(SLOTS):
        row = tl.load(ROW_OF + token * SLOTS + slot, mask=token < tokens, other=-1)
        known = (row >= 0) & (row < rows)
        tl.store(Y + row.to(tl.int64) * columns + column, x, mask=inside & known)


def row_of(rows: int) -> Slot:
    """The workspace that holds the row of each slot."""
    return Slot("workspace", 0, DType.i32, (rows,), (1,))


def invert(order: Slot, inverse: Slot) -> Launch:
    """inverse[order[r]] = r. The inverse is the launch's workspace."""
    return Launch(
        invert_kernel,
        grid=(ceil_div(order.size, BLOCK),),
        arguments={"ORDER": order, "ROW_OF": inverse, "rows": order.size},
        constants={"BLOCK": BLOCK},
        workspace=(inverse,),
    )


def token_tile(columns: int) -> tuple[int, int]:
    """Tokens and columns that a program moves: up to 2048 columns, about 4096 elements."""
    width = min(2048, power_of_two(columns))
    return 4096 // width, width


def spread(x: Slot, inverse: Slot, y: Slot, target: Target) -> Launch:
    """Each token's vector of x [T, H] to the rows of y [T*k, H] that `inverse` gives its slots."""
    (tokens, columns), rows = x.shape, y.shape[0]
    height, width = token_tile(columns)
    return Launch(
        spread_kernel,
        grid=(ceil_div(tokens, height), ceil_div(columns, width)),
        arguments={
            **{"X": x.on(target), "ROW_OF": inverse, "Y": y.on(target)},
            **{"tokens": tokens, "columns": columns, "rows": rows},
        },
        constants={"SLOTS": rows // max(1, tokens), "TOKENS": height, "COLUMNS": width},
        num_warps=warps(height * width),
    )
