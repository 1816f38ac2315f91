"""RMSNorm and the quantisation of its result: y = x * rsqrt(mean(x^2) + eps) * weight, rounded to its dtype; codes and scales of its tiles.

Formula       as in rms_norm.py and quantize.py; y is written too where `keep`
Layout        x, y, codes [rows, columns] row-major, weight [columns]; scales [rows, tiles] row-major float32; the last tile is cut
Accumulation  the sum of squares of a row in float32, in the order of the reduction tree; amax is the largest bit pattern of |y|
Compared to   numpy_ref within the bound of its expansion (testing/bounds_fused.py); floor: one read, one write of codes and scales
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.fused import RmsNormQuantize
from ..arithmetic import narrow, rms_norm, rounded, widen
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import LARGEST_BLOCK, ceil_div, rows_of
from .quantize import quantize_rows, rule_constants


@triton.jit
def rms_norm_quantize_kernel(X, W, Y, CODES, SCALES, rows, eps,
                             COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
                             KEEP: tl.constexpr, SOURCE: tl.constexpr, WEIGHT: tl.constexpr, FORMAT: tl.constexpr, CLAMP: tl.constexpr,
                             FLOOR: tl.constexpr, LARGEST: tl.constexpr, SOURCE_MAX: tl.constexpr,
                             SCALE: tl.constexpr, APPLY: tl.constexpr, POW2: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (first + row < rows) & (column < COLUMNS)
    origin, at = first * COLUMNS, row * COLUMNS + column
    x = widen(tl.load(X + origin + at, mask=inside, other=0.0), SOURCE)
    weight = widen(tl.load(W + column, mask=column < COLUMNS, other=0.0), WEIGHT)
    y = rounded(rms_norm(x, weight, inside, COLUMNS, eps), SOURCE)
    if KEEP:
        tl.store(Y + origin + at, narrow(y, SOURCE), mask=inside)
    codes, scale = quantize_rows(y, inside, ROWS, WIDTH, TILE, SOURCE_MAX, FLOOR, LARGEST, SCALE, APPLY, POW2, UNIT)
    tl.store(CODES + origin + at, narrow(codes, FORMAT, CLAMP), mask=inside)
    tile = tl.arange(0, WIDTH // min(TILE, WIDTH))[None, :]
    tl.store(SCALES + (first + row) * TILES + tile, scale, mask=(first + row < rows) & (tile < TILES))


@kernel(RmsNormQuantize)
def rms_norm_quantize(op: RmsNormQuantize, target: Target, x: Slot, weight: Slot, *results: Slot) -> Launch | Declined:
    x, weight, codes, scales = x.on(target), weight.on(target), results[-2].on(target), results[-1]
    width, columns = op.tile[1], x.shape[-1]
    if not 0 < columns <= LARGEST_BLOCK:
        return Declined(f"rows of {columns} elements, expected 1 to {LARGEST_BLOCK}")
    if width & (width - 1):
        return Declined(f"tiles of {width} elements, expected a power of two")
    rows, tile = x.size // columns, rows_of(columns)
    return Launch(
        rms_norm_quantize_kernel,
        grid=(ceil_div(rows, tile.rows),),
        arguments={"X": x, "W": weight, "Y": results[0].on(target), "CODES": codes, "SCALES": scales, "rows": rows, "eps": op.eps},
        constants={
            **{"COLUMNS": columns, "ROWS": tile.rows, "WIDTH": tile.width, "TILE": width, "TILES": scales.shape[-1], "KEEP": op.keep},
            **{"SOURCE": x.format, "WEIGHT": weight.format, "FORMAT": codes.format, "CLAMP": op.rule.clamp},
            **rule_constants(op.dtype, x.dtype, op.rule),
        },
        num_warps=tile.num_warps,
    )
