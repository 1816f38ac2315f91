"""Dequantisation: y = codes * scale of their tile.

Layout        codes, y [..., rows, columns], scales [..., tile rows, tile columns], as in quantize.py
Accumulation  none: the product is rounded to float32 and then to y's dtype, as the reference does
Compared to   numpy_ref, bit for bit; floor: one read of codes and scales, one write of y
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.quant import Dequantize
from ....ir.types import DType
from ..arithmetic import narrow, widen
from ..groups import extents, rows_of_tile
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import LARGEST_BLOCK, ceil_div, power_of_two, warps
from .quantize import tiling


@triton.jit
def dequantize_kernel(CODES, SCALES, COUNTS, Y, rows, columns, groups, tile_rows, tile_columns,
                      HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
                      BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, GROUPS: tl.constexpr,
                      SOURCE: tl.constexpr, FORMAT: tl.constexpr):  # fmt: skip
    first, matrix = tl.program_id(0).to(tl.int64) * DOWN, tl.program_id(2).to(tl.int64)
    i = tl.arange(0, DOWN * BLOCK_H)
    j = tl.arange(0, ACROSS * BLOCK_W)
    tile_column = tl.program_id(1) * ACROSS + j // BLOCK_W
    column = tile_column * WIDTH + j % BLOCK_W
    down = i // BLOCK_H * HEIGHT + i % BLOCK_H
    if GROUPS > 0:
        starts, ends = extents(COUNTS, rows, groups, GROUPS, False)
        _, start, stop = rows_of_tile(first, starts, ends, HEIGHT, GROUPS)
    else:
        start, stop = first * HEIGHT, rows
    inside = ((i % BLOCK_H < HEIGHT) & (start + down < stop))[:, None] & ((j % BLOCK_W < WIDTH) & (column < columns))[None, :]
    # 64-bit arithmetic once per program, 32-bit per element: an address takes one register instead of two.
    origin = (matrix * rows + start) * columns
    at = down[:, None] * columns + column[None, :]
    codes = widen(tl.load(CODES + origin + at, mask=inside, other=0.0), SOURCE)
    scales = SCALES + (matrix * tile_rows + first) * tile_columns
    scale = tl.load(scales + (i // BLOCK_H)[:, None] * tile_columns + tile_column[None, :], mask=inside, other=0.0)
    tl.store(Y + origin + at, narrow(codes * scale, FORMAT), mask=inside)


@kernel(Dequantize)
def dequantize(op: Dequantize, target: Target, codes: Slot, scales: Slot, counts: Slot | None, y: Slot) -> Launch | Declined:
    codes = codes.on(target)
    height, width = op.tile
    if power_of_two(height) * power_of_two(width) > LARGEST_BLOCK:
        return Declined(f"tiles of {height} x {width} elements, expected at most {LARGEST_BLOCK} in a tile")
    if y.dtype not in (DType.f32, DType.bf16, DType.f16):
        return Declined(f"a result of {y.dtype}, expected f32, bf16 or f16")
    grouped = counts is not None and height > 1
    matrices = 1 if height == 1 else codes.size // max(1, codes.shape[-2] * codes.shape[-1])
    rows, columns = codes.size // max(1, codes.shape[-1] * matrices), codes.shape[-1]
    tile_rows, tile_columns = scales.size // max(1, scales.shape[-1] * matrices), scales.shape[-1]
    down, across, block_h, block_w = tiling(height, width, grouped)
    return Launch(
        dequantize_kernel,
        grid=(ceil_div(tile_rows, down), ceil_div(tile_columns, across), matrices),
        arguments={
            **{"CODES": codes, "SCALES": scales, "COUNTS": counts if counts is not None and grouped else scales, "Y": y},
            **{"rows": rows, "columns": columns, "tile_rows": tile_rows, "tile_columns": tile_columns},
            "groups": counts.size if counts is not None and grouped else 0,
        },
        constants={
            **{"HEIGHT": height, "WIDTH": width, "DOWN": down, "ACROSS": across, "BLOCK_H": block_h, "BLOCK_W": block_w},
            "GROUPS": power_of_two(counts.size) if counts is not None and grouped else 0,
            **{"SOURCE": codes.format, "FORMAT": y.format},
        },
        num_warps=warps(down * across * block_h * block_w),
    )
