"""RMSNorm: y = x * rsqrt(mean(x^2) + eps) * weight over the last axis.

Layout        x, y [R, C] row-major, weight [C]
Accumulation  the sum of squares of a row in float32, in the order of the reduction tree; 1 / sqrt is IEEE; y is rounded once
Compared to   numpy_ref within the bound of `testing.bounds`; floor: one read and one write of x
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.norm import RmsNorm
from ..arithmetic import narrow, widen
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import LARGEST_BLOCK, ceil_div, rows_of


@triton.jit
def rms_norm_kernel(X, W, Y, rows, eps, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
                    FORMAT: tl.constexpr, WEIGHT: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    at = row * COLUMNS + column
    inside = (row < rows) & (column < COLUMNS)
    x = widen(tl.load(X + at, mask=inside, other=0.0), FORMAT)
    mean = tl.div_rn(tl.sum(x * x, axis=1), COLUMNS * 1.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    weight = widen(tl.load(W + column, mask=column < COLUMNS, other=0.0), WEIGHT)
    tl.store(Y + at, narrow(x * scale[:, None] * weight, FORMAT), mask=inside)


@kernel(RmsNorm)
def rms_norm(op: RmsNorm, target: Target, x: Slot, weight: Slot, y: Slot) -> Launch | Declined:
    columns = x.shape[-1]
    if columns > LARGEST_BLOCK:
        return Declined(f"rows of {columns} elements, expected at most {LARGEST_BLOCK}")
    rows, tile = x.size // max(1, columns), rows_of(columns)
    return Launch(
        rms_norm_kernel,
        grid=(ceil_div(rows, tile.rows),),
        arguments={"X": x, "W": weight, "Y": y, "rows": rows, "eps": op.eps},
        constants={"COLUMNS": columns, "ROWS": tile.rows, "WIDTH": tile.width, "FORMAT": x.format, "WEIGHT": weight.format},
        num_warps=tile.num_warps,
    )
