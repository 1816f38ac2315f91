"""Take, of which an embedding is the case axis 0: y[o, i] = x[o, indices[i]], vectors of the elements behind the axis.

Layout        x [outer, N, inner], indices [I], y [outer, I, inner], all row-major
Accumulation  none
Compared to   numpy_ref, bit for bit; floor: one read and one write of y. An index outside 0 .. N - 1 gives zeros
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import triton
import triton.language as tl

from ....ir.ops.shape import Take
from ....ir.types import DType
from ..registry import Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, warps
from .permutation import token_tile


@triton.jit
def take_kernel(X, INDICES, Y, rows, taken, extent, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    index = tl.load(INDICES + row % taken, mask=row < rows, other=0).to(tl.int64)
    known = (index >= 0) & (index < extent)
    x = tl.load(X + (row // taken * extent + index) * columns + column, mask=inside & known, other=0)
    tl.store(Y + row * columns + column, x, mask=inside)


@kernel(Take)
def take(op: Take, target: Target, x: Slot, indices: Slot, y: Slot) -> Launch:
    axis = op.axis % len(x.shape)
    columns = prod(x.shape[axis + 1 :])
    rows, (height, width) = prod(x.shape[:axis]) * indices.size, token_tile(columns)
    return Launch(
        take_kernel,
        grid=(ceil_div(rows, height), ceil_div(columns, width)),
        arguments={
            **{"X": _codes(x), "INDICES": indices, "Y": _codes(y)},
            **{"rows": rows, "taken": indices.size, "extent": x.shape[axis], "columns": columns},
        },
        constants={"ROWS": height, "COLUMNS": width},
        num_warps=warps(height * width),
    )


def _codes(slot: Slot) -> Slot:
    """FP8 as bytes everywhere: an absent element is the code 0, which Triton's interpreter cannot cast to FP8."""
    return replace(slot, as_bytes=slot.dtype in (DType.f8e4m3, DType.f8e5m2))
