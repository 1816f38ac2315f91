"""RMSNorm backward: with r = rsqrt(mean(x^2) + eps), n = x r and g = dy weight, dx = r (g - n mean(g n)) and dweight = sum of dy n.

Formula       rows  each program walks every P-th tile of rows, P being how many programs there are: dx of each, and its own sum of dy n
              sum   dweight, the sums of the programs added up
Layout        x, dy, dx [R, C] row-major, weight and dweight [C]; the workspace holds the sums [P, C] of the programs in float32
Accumulation  float32, sums of a row in the order of the reduction tree, those over rows in an order that shape and target fix: no atomics
Compared to   numpy_ref within the bound of `testing.bounds_backward`; floor: one read of x and dy and one write of dx
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.fused import RmsNormBackwardAdd
from ....ir.ops.norm import RmsNormBackward
from ....ir.types import DType
from ..arithmetic import narrow, plus, widen
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, power_of_two, rows_of, warps

LARGEST = 1 << 14
"""Columns at most: a program holds rows of x, dy, the weight and its sum, 32 registers of each for every one of 512 threads."""
COLUMNS, PROGRAMS = 64, 32
"""Columns that one program of `sum` adds up, and how many programs' sums in one step."""


@triton.jit
def rms_norm_backward_rows_kernel(X, W, DY, ADDED, DX, SUMS, rows, eps, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
                                  FORMAT: tl.constexpr, WEIGHT: tl.constexpr, PLUS: tl.constexpr):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, WIDTH)[None, :]
    weight = widen(tl.load(W + column, mask=column < COLUMNS, other=0.0), WEIGHT)
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(program * ROWS, rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        at = row.to(tl.int64) * COLUMNS + column
        inside = (row < rows) & (column < COLUMNS)
        x = widen(tl.load(X + at, mask=inside, other=0.0), FORMAT)
        dy = widen(tl.load(DY + at, mask=inside, other=0.0), FORMAT)
        mean = tl.div_rn(tl.sum(x * x, axis=1), COLUMNS * 1.0)
        r = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
        n, g = x * r, dy * weight
        along = tl.div_rn(tl.sum(g * n, axis=1), COLUMNS * 1.0)[:, None]
        dx = plus(r * (g - n * along), ADDED, at, inside, FORMAT, PLUS)
        tl.store(DX + at, narrow(dx, FORMAT), mask=inside)
        dweight += tl.where(row < rows, dy * n, 0.0)
    to = SUMS + program.to(tl.int64) * COLUMNS + tl.arange(0, WIDTH)
    tl.store(to, tl.sum(dweight, axis=0), mask=tl.arange(0, WIDTH) < COLUMNS)


@triton.jit
def rms_norm_backward_sum_kernel(SUMS, DW, programs, columns, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((PROGRAMS, COLUMNS), tl.float32)
    for start in range(0, programs, PROGRAMS):
        program = start + tl.arange(0, PROGRAMS)[:, None]
        inside = (program < programs) & (column < columns)[None, :]
        total += tl.load(SUMS + program.to(tl.int64) * columns + column[None, :], mask=inside, other=0.0)
    tl.store(DW + column, tl.sum(total, axis=0), mask=column < columns)


@kernel(RmsNormBackward)
def rms_norm_backward(op: RmsNormBackward, target: Target, x: Slot, weight: Slot, dy: Slot, dx: Slot,
                      dweight: Slot) -> tuple[Launch, ...] | Declined:  # fmt: skip
    return rms_norm_backward_add(op, target, x, weight, dy, None, dx, dweight)


@kernel(RmsNormBackwardAdd)
def rms_norm_backward_add(op: RmsNormBackward, target: Target, x: Slot, weight: Slot, dy: Slot, added: Slot | None, dx: Slot,
                          dweight: Slot) -> tuple[Launch, ...] | Declined:  # fmt: skip
    columns = x.shape[-1]
    if columns > LARGEST:
        return Declined(f"rows of {columns} elements, expected at most {LARGEST}")
    rows, tile = x.size // max(1, columns), rows_of(columns, 2048)
    programs = min(2 * target.units, ceil_div(rows, tile.rows))
    sums = Slot("workspace", 0, DType.f32, (programs, columns), (columns, 1))
    return (
        Launch(
            rms_norm_backward_rows_kernel,
            grid=(programs,),
            arguments={
                **{"X": x, "W": weight, "DY": dy, "ADDED": dx if added is None else added, "DX": dx, "SUMS": sums},
                **{"rows": rows, "eps": op.eps},
            },
            constants={
                **{"COLUMNS": columns, "ROWS": tile.rows, "WIDTH": tile.width, "FORMAT": x.format, "WEIGHT": weight.format},
                "PLUS": added is not None,
            },
            num_warps=2 * warps(tile.rows * tile.width),
        ),
        Launch(
            rms_norm_backward_sum_kernel,
            grid=(ceil_div(columns, COLUMNS),),
            arguments={"SUMS": sums, "DW": dweight, "programs": programs, "columns": columns},
            constants={"COLUMNS": COLUMNS, "PROGRAMS": min(PROGRAMS, power_of_two(programs))},
            workspace=(sums,),  # here, because without rows the other launch is left out
        ),
    )
