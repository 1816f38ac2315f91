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
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from .quantize import launch, place_of


@triton.jit
def dequantize_kernel(CODES, Y, SCALES, COUNTS, rows, columns, groups, tile_rows, tile_columns,
                      HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
                      BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, GROUPS: tl.constexpr,
                      SOURCE: tl.constexpr, FORMAT: tl.constexpr):  # fmt: skip
    _, _, origin, at, inside = place_of(COUNTS, rows, columns, groups, HEIGHT, WIDTH, DOWN, ACROSS, BLOCK_H, BLOCK_W, GROUPS)
    codes = widen(tl.load(CODES + origin + at, mask=inside, other=0.0), SOURCE)
    tile_row = tl.program_id(0).to(tl.int64) * DOWN
    tile_column = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS * BLOCK_W) // BLOCK_W
    scales = SCALES + (tl.program_id(2).to(tl.int64) * tile_rows + tile_row) * tile_columns
    row = tl.arange(0, DOWN * BLOCK_H) // BLOCK_H
    scale = tl.load(scales + row[:, None] * tile_columns + tile_column[None, :], mask=inside, other=0.0)
    tl.store(Y + origin + at, narrow(codes * scale, FORMAT), mask=inside)


@kernel(Dequantize)
def dequantize(op: Dequantize, target: Target, codes: Slot, scales: Slot, counts: Slot | None, y: Slot) -> Launch | Declined:
    codes = codes.on(target)
    if y.dtype not in (DType.f32, DType.bf16, DType.f16):
        return Declined(f"a result of {y.dtype}, expected f32, bf16 or f16")
    formats = {"SOURCE": codes.format, "FORMAT": y.format}
    return launch(dequantize_kernel, op.tile, codes, counts, {"CODES": codes, "Y": y, "SCALES": scales}, formats)
