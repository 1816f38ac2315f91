"""Tile and block quantisation: which scale a tile gets, and how values are divided by it.

A reader finds `quantize`, `dequantize`, `scale_shape`, and `scales_of`, which carries out a `ScaleRule` (ir/quantization.py).

A tile is `(rows, columns)`: (1, 128) for activations, (128, 1) for their transposed use in the weight gradient, (128, 128) for weights, or
any other size. A tile that reaches over the edge of its matrix is cut there; nothing is padded. Blocks restart at every matrix of a stack
and, with `groups`, at the first row of every group (the rows of one expert). Scales are dequantisation factors: codes are *multiplied* by
them, as by `weight_scale_inv` of the released DeepSeek-V3 weights.

What a tile with special values becomes, by the rule's `nonfinite`:

| tile holds      | "propagate": scale         | codes                         | "unit": scale | codes                               |
|-----------------|----------------------------|-------------------------------|---------------|-------------------------------------|
| only zeros      | that of amax = floor       | 0, signs kept                 | 1             | 0, signs kept                       |
| values < floor  | that of amax = floor       | subnormals or 0, signs kept   | by the rule   | by the rule                         |
| an infinity (a) | infinity                   | finite: 0; infinite: NaN      | 1             | as the cast has it: saturated       |
| a NaN (a)       | NaN                        | all NaN                       | 1             | as the cast has it: NaN stays NaN   |
| both            | as for a NaN               |                               | 1             | as the cast has it                  |

(a) pow2 = "ceil-bits" keeps its exponent within 1..254, so there the scale is 2^127: finite values are divided by it, an infinity becomes
what the cast makes of it (saturated, or with clamp=False the format's own), and NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..ir.errors import require
from ..ir.quantization import RULES, ScaleRule
from .formats import BF16, BLOCK, F8E4M3, F16, F32, Array, Format, round_block, round_to, to_float32, widen

Tile = tuple[int, int]
Floats = NDArray[np.float32]

DEEPSEEK_V3 = RULES["deepseek-v3"]


def scales_of(amax: Floats, rule: ScaleRule, fmt: Format, source: Format = F32) -> tuple[Floats, Floats]:
    """For each amax (any shape) the stored scale, and the factor: what x is divided by where `rule.apply` is "divide", else multiplied by.

    `source` is the type of the values that amax was taken from.
    """
    largest = np.float32(fmt.max if rule.max is None else rule.max)
    one = np.float32(1)
    with np.errstate(all="ignore"):
        amax = np.maximum(amax, np.float32(rule.floor))
        multiplier = largest / amax
        if rule.nonfinite == "unit":
            multiplier = np.minimum(multiplier, np.float32(source.max))
        if rule.pow2 == "mantissa-mask":
            multiplier = _power_of_two_below(multiplier)
        if rule.scale == "1/(max/amax)":
            scale = one / multiplier
        elif rule.scale == "amax/max":
            scale = amax / largest
        else:
            scale = amax * (one / largest)
        if rule.pow2 == "ceil-bits":
            scale = _power_of_two_above(scale)
        elif rule.pow2 == "ceil-log2":
            exponent = np.ceil(np.log2(scale.astype(np.float64)).astype(np.float32))
            scale = np.exp2(exponent.astype(np.float64)).astype(np.float32)
        if rule.apply == "divide":
            factor = scale
        elif rule.apply == "multiply" and rule.pow2 not in ("ceil-bits", "ceil-log2"):
            factor = multiplier
        else:
            factor = one / scale
        if rule.nonfinite == "unit":
            special = (amax == 0) | ~np.isfinite(amax)
            scale, factor = np.where(special, one, scale), np.where(special, one, factor)
    return scale, factor


def _power_of_two_above(x: Floats) -> Floats:
    bits = np.ascontiguousarray(x).view(np.uint32)
    exponent = (bits >> np.uint32(23)) + ((bits & np.uint32(0x7FFFFF)) != 0)
    powers: Floats = (np.clip(exponent, 1, 254).astype(np.uint32) << np.uint32(23)).view(np.float32)
    return powers


def _power_of_two_below(x: Floats) -> Floats:
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFF800000)).view(np.float32)


def scale_shape(shape: Sequence[int], tile: Tile, groups: Sequence[int] | None = None) -> tuple[int, ...]:
    """Shape of the scales of a tensor of `shape` [..., rows, columns]; with `groups`, tile rows restart at each group of rows."""
    require(len(shape) >= 2, f"shape {list(shape)}, expected two dimensions or more to lay tiles over")
    require(len(tile) == 2 and min(tile) >= 1, f"tile {list(tile)}, expected two sizes of at least 1")
    *batch, rows, columns = shape
    if groups is None:
        return *batch, -(-rows // tile[0]), -(-columns // tile[1])
    require(not batch, f"groups with shape {list(shape)}, expected two dimensions: the rows of all groups, and columns")
    require(
        min(groups, default=0) >= 0 and sum(groups) == rows,
        f"groups of {list(groups)} rows, {sum(groups)} in all, expected counts that add up to the {rows} rows of shape {list(shape)}",
    )
    return sum(-(-count // tile[0]) for count in groups), -(-columns // tile[1])


def quantize(
    x: Array, tile: Tile, fmt: Format = F8E4M3, rule: ScaleRule = DEEPSEEK_V3, groups: Sequence[int] | None = None
) -> tuple[Array, Floats]:
    """Codes and scales of `x` [..., rows, columns] (float32, bfloat16, float16; float64 is rounded to float32 first).

    Returns codes of `fmt.dtype` and x's shape, and float32 scales of shape `scale_shape(x.shape, tile, groups)`. DeepSeek-V3 report,
    section 3.3.2 (fine-grained quantisation); s and the cast by `rule`, special values by the table at the head of this module.
    """
    codes = np.empty(x.shape, fmt.dtype)
    scales = np.empty(scale_shape(x.shape, tile, groups), np.float32)
    for matrix, scales_of_matrix in _matrices(x.shape, tile, groups):
        for block in _blocks(x[matrix].shape, tile):
            _quantize_block(x[matrix], block, fmt, rule, codes[matrix], scales[scales_of_matrix])
    return codes, scales


def _quantize_block(x: Array, block: _Block, fmt: Format, rule: ScaleRule, codes: Array, scales: Floats) -> None:
    def load(rows: slice) -> Floats:
        return np.ascontiguousarray(to_float32(x[rows, block.columns]))

    pieces = block.pieces()
    whole = load(block.rows) if len(pieces) == 1 else None  # else a tile larger than a block, which is read twice
    patterns = (_largest_magnitude(load(rows) if whole is None else whole, block.tile_in(rows)) for rows in pieces)
    amax = reduce(np.maximum, patterns).view(np.float32)
    source = {BF16.dtype: BF16, F16.dtype: F16}.get(x.dtype, F32)
    scales[block.scale_rows, block.scale_columns], factor = scales_of(amax, rule, fmt, source)
    apply = np.divide if rule.apply == "divide" else np.multiply
    for rows in pieces:
        wide = load(rows) if whole is None else whole
        with np.errstate(all="ignore"):
            scaled = apply(_tiled(wide, block.tile_in(rows)), factor[:, None, :, None]).reshape(-1)
        narrow = np.empty(scaled.shape, fmt.dtype)
        round_block(scaled, fmt, narrow, saturate=rule.clamp)
        codes[rows, block.columns] = narrow.reshape(wide.shape)


def dequantize(codes: Array, scales: Floats, tile: Tile, groups: Sequence[int] | None = None, dtype: DTypeLike = np.float32) -> Array:
    """`codes` [..., rows, columns] times their tile's scale, as `dtype` (float32, float64, bfloat16 or float16).

    The product is rounded to float32 and from there to `dtype`, as the released conversion of DeepSeek-V3 does; in float64 it is exact.
    """
    expected = scale_shape(codes.shape, tile, groups)
    require(
        scales.shape == expected,
        f"scales of shape {list(scales.shape)} for codes of shape {list(codes.shape)} in tiles of {list(tile)}, expected {list(expected)}",
    )
    target = np.dtype(dtype)
    compute = np.float64 if target == np.float64 else np.float32
    out = np.empty(codes.shape, target)
    narrow = {BF16.dtype: BF16, F16.dtype: F16}.get(target)
    for matrix, scales_of_matrix in _matrices(codes.shape, tile, groups):
        for block in _blocks(codes[matrix].shape, tile):
            factor = scales[scales_of_matrix][block.scale_rows, block.scale_columns].astype(compute)[:, None, :, None]
            for rows in block.pieces():
                wide = np.ascontiguousarray(widen(codes[matrix][rows, block.columns], compute))
                with np.errstate(all="ignore"):
                    product = (_tiled(wide, block.tile_in(rows)) * factor).reshape(wide.shape)
                out[matrix][rows, block.columns] = product if narrow is None else round_to(product, narrow)
    return out


def _largest_magnitude(x: Floats, tile: Tile) -> NDArray[np.uint32]:
    """Bit pattern of the largest |x| of each tile. Patterns of magnitudes order like the magnitudes, with NaN above infinity."""
    patterns = _tiled(np.ascontiguousarray(x).view(np.uint32) & np.uint32(0x7FFFFFFF), tile)
    over_rows = patterns.max(axis=1) if tile[0] > 1 else patterns[:, 0]
    return over_rows.max(axis=-1) if tile[1] > 1 else over_rows[..., 0]


def _tiled(x: Array, tile: Tile) -> Array:
    """[rows, columns] as [tile rows, rows of a tile, tile columns, columns of a tile]; the sizes are multiples of the tile's."""
    rows, columns = x.shape
    return x.reshape(rows // tile[0], tile[0], columns // tile[1], tile[1])


def _matrices(shape: Sequence[int], tile: Tile, groups: Sequence[int] | None) -> Iterator[tuple[Any, Any]]:
    """Index of each matrix over which tiles are laid afresh, and index of its scales."""
    if groups is None or tile[0] == 1:
        for index in np.ndindex(*shape[:-2]):
            yield index, index
        return
    row = scale_row = 0
    for count in groups:
        scale_rows = -(-count // tile[0])
        yield slice(row, row + count), slice(scale_row, scale_row + scale_rows)
        row, scale_row = row + count, scale_row + scale_rows


class _Block(NamedTuple):
    """Part of a matrix that is a grid of equal tiles, at most `BLOCK` elements or else a single tile."""

    rows: slice
    columns: slice
    scale_rows: slice
    scale_columns: slice
    tile: Tile

    def pieces(self) -> list[slice]:
        """The rows in one piece, or, for a tile larger than a block, in several."""
        height, width = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        step = height if height * width <= BLOCK else max(1, BLOCK // width)
        return [slice(start, min(start + step, self.rows.stop)) for start in range(self.rows.start, self.rows.stop, step)]

    def tile_in(self, rows: slice) -> Tile:
        """The tile, or what of it lies in `rows`."""
        return self.tile if rows == self.rows else (rows.stop - rows.start, self.tile[1])


def _blocks(shape: Sequence[int], tile: Tile) -> Iterator[_Block]:
    rows, columns = shape
    for height, row_start, row_stop, scale_row in _runs(rows, tile[0]):
        for width, column_start, column_stop, scale_column in _runs(columns, tile[1]):
            across = max(1, min(column_stop - column_start, BLOCK // height) // width)
            down = max(1, BLOCK // (across * width * height))
            for i in range(0, (row_stop - row_start) // height, down):
                row = slice(row_start + i * height, min(row_start + (i + down) * height, row_stop))
                scale_rows = slice(scale_row + i, scale_row + i + (row.stop - row.start) // height)
                for j in range(0, (column_stop - column_start) // width, across):
                    column = slice(column_start + j * width, min(column_start + (j + across) * width, column_stop))
                    scale_columns = slice(scale_column + j, scale_column + j + (column.stop - column.start) // width)
                    yield _Block(row, column, scale_rows, scale_columns, (height, width))


def _runs(size: int, step: int) -> Iterator[tuple[int, int, int, int]]:
    """(tile size, start, stop, index of the first tile) of the whole tiles along one dimension, then of the cut one at its end."""
    whole = size - size % step
    if whole:
        yield step, 0, whole, 0
    if whole < size:
        yield size - whole, whole, size, whole // step
