"""Quantisation of one matrix in tiles along its rows and, for the product that sums over rows, in tiles down its columns, from one read.

Formula       as in quantize.py, twice: tiles [1, TILE] and [TILE, 1], one rule
Layout        x and the first codes [rows, columns] row-major, their scales [rows, tiles]; the second codes and scales [columns, rows] and
              [columns, tiles] where transposed, else [rows, columns] and [tiles, columns], all row-major. With `counts` tiles of the second
              copy restart at each group; unused scales are 0.
Accumulation  none: amax is the largest bit pattern of |x|; divisions are IEEE
Compared to   numpy_ref, bit for bit; floor: one read of x, one write of both codes and scales. Rows that are no multiple of 16 elements
              spill where they are in groups (832 bytes on sm_90): no model has such
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.fused import QuantizeTwice
from ..arithmetic import bits_of, from_bits, narrow, widen
from ..groups import extents, rows_of_tile
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, power_of_two, warps
from .quantize import quantize_rows, rule_constants, scale_of

LARGEST_TILE = 128
"""A program holds a square of TILE x TILE: above this it does not fit in registers."""


@triton.jit
def quantize_twice_kernel(X, ALONG, ALONG_SCALES, DOWN, DOWN_SCALES, COUNTS, rows, columns, groups, along_tiles, down_tiles,
                          TILE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, TRANSPOSED: tl.constexpr,
                          SOURCE: tl.constexpr, FORMAT: tl.constexpr, CLAMP: tl.constexpr,
                          FLOOR: tl.constexpr, LARGEST: tl.constexpr, SOURCE_MAX: tl.constexpr,
                          SCALE: tl.constexpr, APPLY: tl.constexpr, POW2: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    # One program: TILE rows by TILE columns, which is a tile along each row and one down each column; BLOCK is the power of two above.
    nth, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    if GROUPS > 0:
        starts, ends = extents(COUNTS, rows, groups, GROUPS, False)
        _, start, stop = rows_of_tile(nth, starts, ends, TILE, GROUPS)
    else:
        start, stop = nth * TILE, rows
    column = tile * TILE + j
    there, across = (i < TILE) & (start + i < stop), (j < TILE) & (column < columns)
    inside = there[:, None] & across[None, :]
    origin, at = start * columns, i[:, None] * columns + column[None, :]
    x = widen(tl.load(X + origin + at, mask=inside, other=0.0), SOURCE)

    codes, scale = quantize_rows(x, inside, BLOCK, BLOCK, BLOCK, SOURCE_MAX, FLOOR, LARGEST, SCALE, APPLY, POW2, UNIT)
    tl.store(ALONG + origin + at, narrow(codes, FORMAT, CLAMP), mask=inside)
    tl.store(ALONG_SCALES + (start + i[:, None]) * along_tiles + tile, scale, mask=there[:, None])

    amax = from_bits(tl.max(bits_of(x) & 0x7FFFFFFF, axis=0))
    scale, factor = scale_of(amax, FLOOR, LARGEST, SOURCE_MAX, SCALE, APPLY, POW2, UNIT)
    factor = tl.broadcast_to(factor[None, :], (BLOCK, BLOCK))
    codes = narrow(tl.div_rn(x, factor) if APPLY == "divide" else x * factor, FORMAT, CLAMP)
    if TRANSPOSED:
        place = column.to(tl.int64)[:, None] * rows + start + i[None, :]
        tl.store(DOWN + place, tl.trans(codes), mask=across[:, None] & there[None, :])
        tl.store(DOWN_SCALES + column * down_tiles + nth, scale, mask=across)
    else:
        tl.store(DOWN + origin + at, codes, mask=inside)
        if GROUPS > 0:
            scale = tl.where(start < stop, scale, 0.0)
        tl.store(DOWN_SCALES + nth * columns + column, scale, mask=across)


@kernel(QuantizeTwice)
def quantize_twice(
    op: QuantizeTwice, target: Target, x: Slot, counts: Slot | None, along: Slot, along_scales: Slot, down: Slot, down_scales: Slot
) -> Launch | Declined:
    if op.tile > LARGEST_TILE:
        return Declined(f"tiles of {op.tile} elements, expected at most {LARGEST_TILE}")
    x, along, down = x.on(target), along.on(target), down.on(target)
    columns, block = x.shape[-1], power_of_two(op.tile)
    tiles = down_scales.shape[-1 if op.transposed else 0]
    return Launch(
        quantize_twice_kernel,
        grid=(tiles, ceil_div(columns, op.tile)),
        arguments={
            **{"X": x, "ALONG": along, "ALONG_SCALES": along_scales, "DOWN": down, "DOWN_SCALES": down_scales},
            **{"COUNTS": along_scales if counts is None else counts, "rows": x.size // max(1, columns), "columns": columns},
            **{"groups": counts.size if counts else 0, "along_tiles": along_scales.shape[-1], "down_tiles": tiles},
        },
        constants={
            **{"TILE": op.tile, "BLOCK": block, "GROUPS": power_of_two(counts.size) if counts else 0, "TRANSPOSED": op.transposed},
            **{"SOURCE": x.format, "FORMAT": along.format, "CLAMP": op.rule.clamp},
            **rule_constants(op.dtype, x.dtype, op.rule),
        },
        num_warps=warps(block * block),
    )
