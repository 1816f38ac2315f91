"""Tile and block quantisation: codes of x and one scale for each tile, by any scale rule.

Formula       amax of a tile -> scale s and factor by `ScaleRule` (ir/quantization.py); code = cast(x / s) or cast(x * factor)
Layout        x, codes [..., rows, columns] row-major; scales [..., tile rows, tile columns] row-major float32. A tile that reaches over the
              edge of its matrix is cut there. With `counts`, tiles that span rows restart at each group; unused scales are 0.
Accumulation  none: amax is the largest bit pattern of |x|, so that NaN counts as the largest and no order matters; divisions are IEEE
Compared to   numpy_ref, bit for bit; floor: one read of x, one write of codes and scales
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ....ir.ops.quant import Quantize
from ....ir.quantization import ScaleRule
from ....ir.types import DType
from ....numerics.formats import FORMATS
from ..arithmetic import bits_of, from_bits, narrow, widen
from ..groups import extents, rows_of_tile
from ..jit import device
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import LARGEST_BLOCK, ceil_div, power_of_two, warps


@device
def power_of_two_above(scale):
    """Float32 scale up to a power of two by its bits, the exponent within 1..254."""
    bits = bits_of(scale)
    exponent = ((bits >> 23) & 0xFF) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
    return from_bits(tl.minimum(tl.maximum(exponent, 1), 254) << 23)


@device
def power_of_two_log2(scale):
    """2^ceil(log2 scale), the logarithm rounded to float32; infinity and NaN stay."""
    finite = (scale < float("inf")) & (scale > 0)
    exponent = tl.ceil(tl.log2(tl.where(finite, scale, 1.0).to(tl.float64)).to(tl.float32)).to(tl.int32)
    half = exponent >> 1
    power = from_bits((half + 127) << 23) * from_bits((exponent - half + 127) << 23)
    return tl.where(finite, power, scale)


@device
def scale_of(amax, FLOOR: tl.constexpr, LARGEST: tl.constexpr, SOURCE: tl.constexpr, SCALE: tl.constexpr,
             APPLY: tl.constexpr, POW2: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """The stored scale of a tile and the factor that x is divided (APPLY "divide") or multiplied by: `numerics.scale.scales_of`."""
    amax = tl.where(amax < FLOOR, FLOOR, amax)
    largest = tl.full(amax.shape, LARGEST, tl.float32)
    one = tl.full(amax.shape, 1.0, tl.float32)
    multiplier = tl.div_rn(largest, amax)
    if UNIT:
        multiplier = tl.where(multiplier > SOURCE, SOURCE, multiplier)
    if POW2 == "mantissa-mask":
        multiplier = from_bits(bits_of(multiplier) & -8388608)
    if SCALE == "1/(max/amax)":
        scale = tl.div_rn(one, multiplier)
    elif SCALE == "amax/max":
        scale = tl.div_rn(amax, largest)
    else:
        scale = amax * tl.div_rn(one, largest)
    if POW2 == "ceil-bits":
        scale = power_of_two_above(scale)
    elif POW2 == "ceil-log2":
        scale = power_of_two_log2(scale)
    if APPLY == "divide":
        factor = scale
    elif APPLY == "multiply" and POW2 != "ceil-bits" and POW2 != "ceil-log2":
        factor = multiplier
    else:
        factor = tl.div_rn(one, scale)
    if UNIT:
        special = (amax == 0.0) | ~(amax < float("inf"))
        scale = tl.where(special, 1.0, scale)
        factor = tl.where(special, 1.0, factor)
    return scale, factor


@device
def quantize_rows(x, inside, ROWS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
                  SOURCE_MAX: tl.constexpr, FLOOR: tl.constexpr, LARGEST: tl.constexpr,
                  SCALE: tl.constexpr, APPLY: tl.constexpr, POW2: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Rows [ROWS, WIDTH] over or times the factor of their tile, still to be narrowed, and scales [ROWS, tiles], TILE a power of two."""
    BLOCK: tl.constexpr = min(TILE, WIDTH)
    tiled = tl.reshape(tl.where(inside, x, 0.0), (ROWS, WIDTH // BLOCK, BLOCK))
    amax = from_bits(tl.max(bits_of(tiled) & 0x7FFFFFFF, axis=2))
    scale, factor = scale_of(amax, FLOOR, LARGEST, SOURCE_MAX, SCALE, APPLY, POW2, UNIT)
    factor = tl.broadcast_to(factor[:, :, None], (ROWS, WIDTH // BLOCK, BLOCK))
    scaled = tl.div_rn(tiled, factor) if APPLY == "divide" else tiled * factor
    return tl.reshape(scaled, (ROWS, WIDTH)), scale


@device
def quantize_columns(x, SOURCE_MAX: tl.constexpr, FLOOR: tl.constexpr, LARGEST: tl.constexpr,
                     SCALE: tl.constexpr, APPLY: tl.constexpr, POW2: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Columns of x, each a tile, over or times their factor, still to be narrowed, and scales [1, columns]."""
    amax = from_bits(tl.max(bits_of(x) & 0x7FFFFFFF, axis=0))
    scale, factor = scale_of(amax, FLOOR, LARGEST, SOURCE_MAX, SCALE, APPLY, POW2, UNIT)
    factor = tl.broadcast_to(factor[None, :], x.shape)
    return (tl.div_rn(x, factor) if APPLY == "divide" else x * factor), scale[None, :]


@device
def place_of(COUNTS, rows, columns, groups, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
             BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """The first row of a program's DOWN x ACROSS tiles of HEIGHT x WIDTH, and the row behind the last; where its first element lies, how
    far behind that each of the [DOWN * BLOCK_H, ACROSS * BLOCK_W] does, and whether it is of a tile. Blocks are the powers of two above.
    """
    first, matrix = tl.program_id(0).to(tl.int64) * DOWN, tl.program_id(2).to(tl.int64)
    i = tl.arange(0, DOWN * BLOCK_H)
    j = tl.arange(0, ACROSS * BLOCK_W)
    column = (tl.program_id(1) * ACROSS + j // BLOCK_W) * WIDTH + j % BLOCK_W
    down = i // BLOCK_H * HEIGHT + i % BLOCK_H
    if GROUPS > 0:
        starts, ends = extents(COUNTS, rows, groups, GROUPS, False)
        _, start, stop = rows_of_tile(first, starts, ends, HEIGHT, GROUPS)
    else:
        start, stop = first * HEIGHT, rows
    inside = ((i % BLOCK_H < HEIGHT) & (start + down < stop))[:, None] & ((j % BLOCK_W < WIDTH) & (column < columns))[None, :]
    # 64-bit arithmetic once per program, 32-bit per element: an address takes one register instead of two.
    return start, stop, (matrix * rows + start) * columns, down[:, None] * columns + column[None, :], inside


@triton.jit
def quantize_kernel(X, CODES, SCALES, COUNTS, rows, columns, groups, tile_rows, tile_columns,
                    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
                    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, GROUPS: tl.constexpr,
                    SOURCE: tl.constexpr, FORMAT: tl.constexpr, CLAMP: tl.constexpr,
                    FLOOR: tl.constexpr, LARGEST: tl.constexpr, SOURCE_MAX: tl.constexpr,
                    SCALE: tl.constexpr, APPLY: tl.constexpr, POW2: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    start, stop, origin, at, inside = place_of(COUNTS, rows, columns, groups, HEIGHT, WIDTH, DOWN, ACROSS, BLOCK_H, BLOCK_W, GROUPS)
    x = widen(tl.load(X + origin + at, mask=inside, other=0.0), SOURCE)
    tiled = tl.reshape(x, (DOWN, BLOCK_H, ACROSS, BLOCK_W))
    magnitude = bits_of(tiled) & 0x7FFFFFFF
    amax = from_bits(tl.max(tl.max(magnitude, axis=3), axis=1))
    scale, factor = scale_of(amax, FLOOR, LARGEST, SOURCE_MAX, SCALE, APPLY, POW2, UNIT)
    factor = tl.broadcast_to(factor[:, None, :, None], (DOWN, BLOCK_H, ACROSS, BLOCK_W))
    scaled = tl.div_rn(tiled, factor) if APPLY == "divide" else tiled * factor
    codes = narrow(tl.reshape(scaled, (DOWN * BLOCK_H, ACROSS * BLOCK_W)), FORMAT, CLAMP)
    tl.store(CODES + origin + at, codes, mask=inside)
    if GROUPS > 0:
        scale = tl.where(start < stop, scale, 0.0)
    tile_row = tl.program_id(0).to(tl.int64) * DOWN + tl.arange(0, DOWN)[:, None]
    tile_column = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)[None, :]
    there = (tile_row < tile_rows) & (tile_column < tile_columns)
    tl.store(SCALES + (tl.program_id(2).to(tl.int64) * tile_rows + tile_row) * tile_columns + tile_column, scale, mask=there)


def tiling(height: int, width: int, grouped: bool) -> tuple[int, int, int, int]:
    """Tiles per program down and across, and the powers of two over their height and width: about 4096 elements together."""
    block_h, block_w = power_of_two(height), power_of_two(width)
    more = max(1, 4096 // (block_h * block_w))
    if grouped or height > 1:
        return 1, more, block_h, block_w
    return more, 1, block_h, block_w


def rule_constants(dtype: DType, source: DType, rule: ScaleRule) -> dict[str, Any]:
    """What `scale_of` is told of a rule that scales numbers of dtype `source` to codes of `dtype`."""
    return {
        "FLOOR": rule.floor,
        "LARGEST": FORMATS[dtype.name].max if rule.max is None else rule.max,
        "SOURCE_MAX": FORMATS[source.name if source in (DType.bf16, DType.f16) else "f32"].max,
        **{"SCALE": rule.scale, "APPLY": rule.apply, "POW2": rule.pow2, "UNIT": rule.nonfinite == "unit"},
    }


def launch(
    kernel: Any, tile: tuple[int, int], x: Slot, counts: Slot | None, arguments: dict[str, Slot], constants: dict[str, Any]
) -> Launch | Declined:
    """A kernel that goes over the tiles of x; SCALES is among its `arguments`."""
    height, width = tile
    if power_of_two(height) * power_of_two(width) > LARGEST_BLOCK:
        return Declined(f"tiles of {height} x {width} elements, expected at most {LARGEST_BLOCK} in a tile")
    scales, groups = arguments["SCALES"], counts if counts is not None and height > 1 else None
    matrices = 1 if height == 1 else x.size // max(1, x.shape[-2] * x.shape[-1])
    rows, columns = x.size // max(1, x.shape[-1] * matrices), x.shape[-1]
    tile_rows, tile_columns = scales.size // max(1, scales.shape[-1] * matrices), scales.shape[-1]
    down, across, block_h, block_w = tiling(height, width, groups is not None)
    return Launch(
        kernel,
        grid=(ceil_div(tile_rows, down), ceil_div(tile_columns, across), matrices),
        arguments={
            **arguments,
            "COUNTS": groups or scales,
            **{"rows": rows, "columns": columns, "tile_rows": tile_rows, "tile_columns": tile_columns},
            "groups": groups.size if groups else 0,
        },
        constants={
            **{"HEIGHT": height, "WIDTH": width, "DOWN": down, "ACROSS": across, "BLOCK_H": block_h, "BLOCK_W": block_w},
            "GROUPS": power_of_two(groups.size) if groups else 0,
            **constants,
        },
        num_warps=warps(down * across * block_h * block_w),
    )


@kernel(Quantize)
def quantize(op: Quantize, target: Target, x: Slot, counts: Slot | None, codes: Slot, scales: Slot) -> Launch | Declined:
    x, codes = x.on(target), codes.on(target)
    formats = {"SOURCE": x.format, "FORMAT": codes.format, "CLAMP": op.rule.clamp, **rule_constants(op.dtype, x.dtype, op.rule)}
    return launch(quantize_kernel, op.tile, x, counts, {"X": x, "CODES": codes, "SCALES": scales}, formats)
