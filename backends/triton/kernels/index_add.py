"""Index add, the gradient of an embedding: row r of updates added to row indices[r] of x, in the order of r and without atomics.

Formula       copy   x as it is
              link   for every r the next row with the same index, and whether there is one before: all pairs compared
              add    from the first row of each index along the links: x and then one update after the other
Layout        x, y [N, ...], updates [R, ...] row-major, indices [R]; the workspace holds the links. An index outside x is left out
Accumulation  float32, in the order of r; each row is rounded once
Compared to   numpy_ref, bit for bit; floor: one read of x and updates and one write of y
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.shape import IndexAdd
from ....ir.types import DType
from ..arithmetic import narrow, widen
from ..registry import Argument, Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, power_of_two, warps

BLOCK, LINKED, COMPARED = 4096, 32, 64
"""Elements that a program copies; rows that one links; others that they are compared with at a time."""
DTYPES = (DType.f32, DType.bf16, DType.f16)


@triton.jit
def index_add_copy_kernel(X, Y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=at < size), mask=at < size)


@triton.jit
def index_add_link_kernel(INDICES, NEXT, FIRST, rows, size, LINKED: tl.constexpr, COMPARED: tl.constexpr):
    row = tl.program_id(0) * LINKED + tl.arange(0, LINKED)
    index = tl.load(INDICES + row, mask=row < rows, other=-1)
    following = tl.zeros((LINKED,), tl.int32) + rows
    before = tl.zeros((LINKED,), tl.int32)
    for start in range(0, rows, COMPARED):
        other = start + tl.arange(0, COMPARED)[None, :]
        same = (tl.load(INDICES + other, mask=other < rows, other=-1) == index[:, None]) & (other < rows)
        following = tl.minimum(following, tl.min(tl.where(same & (other > row[:, None]), other, rows), axis=1))
        before += tl.sum((same & (other < row[:, None])).to(tl.int32), axis=1)
    tl.store(NEXT + row, following, mask=row < rows)
    tl.store(FIRST + row, ((before == 0) & (index >= 0) & (index < size)).to(tl.int32), mask=row < rows)


@triton.jit
def index_add_kernel(X, INDICES, UPDATES, NEXT, FIRST, Y, rows, columns, FORMAT: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    if tl.load(FIRST + row) == 0:
        return
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.load(INDICES + row).to(tl.int64) * columns + column
    total = widen(tl.load(X + at, mask=column < columns, other=0.0), FORMAT)
    while row < rows:
        total += widen(tl.load(UPDATES + row.to(tl.int64) * columns + column, mask=column < columns, other=0.0), FORMAT)
        row = tl.load(NEXT + row)
    tl.store(Y + at, narrow(total, FORMAT), mask=column < columns)


@kernel(IndexAdd)
def index_add(op: IndexAdd, target: Target, x: Slot, indices: Slot, updates: Slot, y: Slot) -> tuple[Launch, ...] | Declined:
    if x.dtype not in DTYPES:
        return Declined(f"elements of {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    rows, columns = indices.size, x.size // max(1, x.shape[0])
    following, first = (Slot("workspace", i, DType.i32, (rows,), (1,)) for i in (0, 1))
    links: dict[str, Argument] = {"INDICES": indices, "NEXT": following, "FIRST": first, "rows": rows}
    width = min(2048, power_of_two(columns))
    return (
        Launch(
            index_add_copy_kernel,
            grid=(ceil_div(x.size, BLOCK),),
            arguments={"X": x, "Y": y, "size": x.size},
            constants={"BLOCK": BLOCK},
            num_warps=warps(BLOCK),
        ),
        Launch(
            index_add_link_kernel,
            grid=(ceil_div(rows, LINKED),),
            arguments={**links, "size": x.shape[0]},
            constants={"LINKED": LINKED, "COMPARED": COMPARED},
            workspace=(following, first),
        ),
        Launch(
            index_add_kernel,
            grid=(rows, ceil_div(columns, width)),
            arguments={**links, "X": x, "UPDATES": updates, "Y": y, "columns": columns},
            constants={"FORMAT": x.format, "COLUMNS": width},
            num_warps=warps(width),
        ),
    )
