"""SwiGLU and the quantisation of its result: y = silu(gate) * up * weight, rounded to its dtype; codes and a scale for each tile of a row.

Formula       as in swiglu.py and quantize.py; y is written too where `keep`
Layout        gate, up, y, codes [rows, columns] row-major; weights, where there are, float32 [rows]; scales [rows, tiles] float32; the
              last tile is cut at the edge
Accumulation  none; float32, e^x within 3 ulp; amax is the largest bit pattern of |y|; divisions are IEEE
Compared to   numpy_ref within the bound of its expansion (testing/bounds_fused.py); floor: two reads, one write of codes and scales
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.fused import SwiGLUQuantize
from ..arithmetic import narrow, rounded, silu, widen
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import LARGEST_BLOCK, ceil_div, power_of_two, warps
from .quantize import quantize_rows, rule_constants


@triton.jit
def swiglu_quantize_kernel(G, U, WEIGHTS, Y, CODES, SCALES, rows, columns, tiles,
                           WIDTH: tl.constexpr, BLOCK: tl.constexpr, DOWN: tl.constexpr, KEEP: tl.constexpr, WEIGHTED: tl.constexpr,
                           SOURCE: tl.constexpr, FORMAT: tl.constexpr, CLAMP: tl.constexpr,
                           FLOOR: tl.constexpr, LARGEST: tl.constexpr, SOURCE_MAX: tl.constexpr,
                           SCALE: tl.constexpr, APPLY: tl.constexpr, POW2: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    # One program: one tile of each of DOWN rows; BLOCK is the power of two above WIDTH.
    first, tile = tl.program_id(0).to(tl.int64) * DOWN, tl.program_id(1)
    down, across = tl.arange(0, DOWN)[:, None], tl.arange(0, BLOCK)[None, :]
    column = tile * WIDTH + across
    inside = (first + down < rows) & (across < WIDTH) & (column < columns)
    origin, at = first * columns, down * columns + column
    gate = widen(tl.load(G + origin + at, mask=inside, other=0.0), SOURCE)
    up = widen(tl.load(U + origin + at, mask=inside, other=0.0), SOURCE)
    y = silu(gate) * up
    if WEIGHTED:
        y = y * tl.load(WEIGHTS + first + down, mask=first + down < rows, other=0.0)
    y = rounded(y, SOURCE)
    if KEEP:
        tl.store(Y + origin + at, narrow(y, SOURCE), mask=inside)
    codes, scale = quantize_rows(y, inside, DOWN, BLOCK, BLOCK, SOURCE_MAX, FLOOR, LARGEST, SCALE, APPLY, POW2, UNIT)
    tl.store(CODES + origin + at, narrow(codes, FORMAT, CLAMP), mask=inside)
    tl.store(SCALES + (first + down) * tiles + tile, scale, mask=first + down < rows)


@kernel(SwiGLUQuantize)
def swiglu_quantize(op: SwiGLUQuantize, target: Target, gate: Slot, up: Slot, weight: Slot | None, *results: Slot) -> Launch | Declined:
    gate, up = gate.on(target), up.on(target)
    codes, scales = results[-2].on(target), results[-1]
    width, columns = op.tile[1], gate.shape[-1]
    block = power_of_two(min(width, max(1, columns)))
    if block > LARGEST_BLOCK:
        return Declined(f"tiles of {width} elements, expected at most {LARGEST_BLOCK}")
    rows, down = gate.size // max(1, columns), max(1, 2048 // block)
    return Launch(
        swiglu_quantize_kernel,
        grid=(ceil_div(rows, down), scales.shape[-1]),
        arguments={
            **{"G": gate, "U": up, "WEIGHTS": weight or gate, "Y": results[0].on(target), "CODES": codes, "SCALES": scales},
            **{"rows": rows, "columns": columns, "tiles": scales.shape[-1]},
        },
        constants={
            **{"WIDTH": width, "BLOCK": block, "DOWN": down, "KEEP": op.keep, "WEIGHTED": op.weight is not None},
            **{"SOURCE": gate.format, "FORMAT": codes.format, "CLAMP": op.rule.clamp},
            **rule_constants(op.dtype, gate.dtype, op.rule),
        },
        num_warps=warps(down * block),
    )
