"""Tile quantisation and scaled products in standard ops.

ONNX knows blocks along one axis only: rows of scales are repeated for the rows of their tile, and DequantizeLinear takes blocks of columns
(or blocks of rows, where a tile is one column wide). FP8 enters nothing else than casts and DequantizeLinear.
"""

from __future__ import annotations

import numpy as np

from ...ir.core import Value as DscValue
from ...ir.errors import require
from ...ir.ops import quant as ops
from ...ir.ops.rules import static
from ...ir.quantization import Accumulation, ScaleRule
from ...ir.types import DType, Tensor
from ...numerics.formats import F32, FORMATS
from .emit import FP8, Emitter, Stack, Value
from .ops_linalg import matrices_of, multiply_groups, multiply_groups_of_rows, where_rows
from .registry import Unmapped, onnx

Tile = tuple[int, int]


@onnx(ops.Quantize, "stored")
def quantize(g: Emitter, op: ops.Quantize, x: Value, counts: Value | None = None) -> tuple[Value, Value]:
    *lead, rows, columns = static(op.x, "quantize")
    down, across = op.results[1].shape[-2:]
    assert isinstance(down, int)
    assert isinstance(across, int)
    x = g.widened(x, op.x.dtype)
    grouped = counts if op.tile[0] > 1 else None
    tall = 1 if grouped is not None else op.tile[0]
    amax = _largest(g, g.Abs(x), [*lead, rows, columns], (tall, op.tile[1]))
    row_of = None
    if grouped is not None:
        row_of, used = _tile_rows(g, grouped, rows, down, op.tile[0])
        amax = g.ScatterND(np.zeros((down, across), np.float32), g.Unsqueeze(row_of, [1]), amax, reduction="max")
    scales, factor = scales_of(g, amax, op.rule, op.dtype, op.x.dtype)
    if grouped is not None:
        scales = g.Where(used, scales, np.float32(0))
    every = _columns(g, _rows(g, factor, op.tile, rows, row_of), op.tile, columns)
    scaled = g.Div(x, every) if op.rule.apply == "divide" else g.Mul(x, every)
    if op.dtype in FP8:
        return g.cast(scaled, op.dtype, saturate=op.rule.clamp), scales
    return g.rounded(scaled, DType.f32, op.dtype), scales


def _largest(g: Emitter, x: Value, shape: list[int], tile: Tile) -> Value:
    """The largest element of each tile: [..., R, C] -> [..., R / rows, C / columns], padded with zeros where a tile is cut."""
    *lead, rows, columns = shape
    down, across = -(-rows // tile[0]), -(-columns // tile[1])
    high = [down * tile[0] - rows, across * tile[1] - columns]
    if any(high):
        x = g.Pad(x, [0] * (len(shape) + len(lead)) + high)
    n = len(lead)
    return g.ReduceMax(g.reshaped(x, *lead, down, tile[0], across, tile[1]), [n + 1, n + 3], keepdims=0)


def scales_of(g: Emitter, amax: Value, rule: ScaleRule, dtype: DType, source: DType) -> tuple[Value, Value]:
    """The stored scale of each tile, and what its values are divided by, or multiplied by, as `rule.apply` has it."""
    fmt = FORMATS[dtype.name]
    largest = np.float32(fmt.max if rule.max is None else rule.max)
    one = np.float32(1)
    amax = g.Max(amax, np.float32(rule.floor))
    multiplier = g.Div(largest, amax)
    if rule.nonfinite == "unit":
        multiplier = g.Min(multiplier, np.float32(FORMATS.get(source.name, F32).max))
    if rule.pow2 == "mantissa-mask":
        multiplier = g.power_of_two(multiplier, DType.f32)
    if rule.scale == "1/(max/amax)":
        scale = g.Div(one, multiplier)
    else:
        scale = g.Div(amax, largest) if rule.scale == "amax/max" else g.Mul(amax, one / largest)
    if rule.pow2 == "ceil-bits":
        power = g.power_of_two(scale, DType.f32)
        scale = g.Where(g.Greater(scale, power), g.Min(g.Mul(power, np.float32(2)), np.float32(2.0**127)), power)
    elif rule.pow2 == "ceil-log2":
        exponent = g.cast(g.Mul(g.Log(g.cast(scale, DType.f64)), np.float64(1 / np.log(2))), DType.f32)
        scale = g.cast(g.Pow(np.float64(2), g.cast(g.Ceil(exponent), DType.f64)), DType.f32)
    if rule.apply == "divide":
        factor = scale
    elif rule.apply == "multiply" and rule.pow2 not in ("ceil-bits", "ceil-log2"):
        factor = multiplier
    else:
        factor = g.Div(one, scale)
    if rule.nonfinite == "unit":
        special = g.Or(g.Equal(amax, np.float32(0)), g.Or(g.IsInf(amax), g.IsNaN(amax)))
        scale, factor = g.Where(special, one, scale), g.Where(special, one, factor)
    return scale, factor


def _tile_rows(g: Emitter, counts: Value, rows: int, down: int, tall: int) -> tuple[Value, Value]:
    """Tiles of `tall` rows that restart at each group: the row of scales of each row, and which of the `down` rows of scales are used."""
    height = np.int64(tall)
    group, place = where_rows(g, counts, rows)
    tiles = g.Div(g.Add(g.Cast(counts, to=7), height - 1), height)
    ends = g.CumSum(tiles, np.int64(0))
    total = g.sum(tiles, 0)
    first = g.Gather(g.Concat(g.Sub(ends, tiles), total, axis=0), group, axis=0)
    row_of = g.Min(g.Add(first, g.Div(place, height)), np.int64(down - 1))
    return row_of, g.Less(np.arange(down, dtype=np.int64)[:, None], total)


def _rows(g: Emitter, scales: Value, tile: Tile, rows: int, row_of: Value | None) -> Value:
    """A row of scales for each row."""
    if row_of is None and tile[0] == 1:
        return scales
    return g.Gather(scales, np.arange(rows, dtype=np.int64) // tile[0] if row_of is None else row_of, axis=-2)


def _columns(g: Emitter, scales: Value, tile: Tile, columns: int) -> Value:
    """A scale for each column."""
    return scales if tile[1] == 1 else g.Gather(scales, np.arange(columns, dtype=np.int64) // tile[1], axis=-1)


@onnx(ops.Dequantize, "stored")
def dequantize(g: Emitter, op: ops.Dequantize, codes: Value, scales: Value, counts: Value | None = None) -> Value:
    if op.dtype is DType.f64:
        return dequantized(g, op.codes.tensor, op.tile, codes, scales, counts, DType.f64)
    return g.rounded(dequantized(g, op.codes.tensor, op.tile, codes, scales, counts), DType.f32, op.dtype)


def dequantized(
    g: Emitter, type: Tensor, tile: Tile, codes: Value, scales: Value, counts: Value | None = None, wide: DType = DType.f32
) -> Value:
    """codes * scale of their tile."""
    require(type.is_static, f"values with scales need a static shape, found {type}")
    *_, rows, columns = (d for d in type.shape if isinstance(d, int))
    row_of = None if counts is None or tile[0] == 1 else _tile_rows(g, counts, rows, _extent(scales), tile[0])[0]
    linear = type.dtype in FP8 and wide is DType.f32
    if linear and tile[1] == 1 < tile[0] and row_of is None:
        return g.DequantizeLinear(codes, scales, axis=type.rank - 2, block_size=min(tile[0], rows))
    every = _rows(g, scales, tile, rows, row_of)
    if linear and tile[1] > 1:
        return g.DequantizeLinear(codes, every, axis=type.rank - 1, block_size=min(tile[1], columns))
    return g.Mul(g.widened(codes, type.dtype, wide), g.widened(_columns(g, every, tile, columns), DType.f32, wide))


def _extent(scales: Value) -> int:
    """How many rows of scales there are."""
    assert scales.shape is not None
    assert isinstance(scales.shape[0], int)
    return scales.shape[0]


def in_float32(accumulation: Accumulation) -> None:
    """Standard products add in float32, in whatever order."""
    if accumulation.arithmetic != "float32":
        raise Unmapped(f"it accumulates as {accumulation.arithmetic!r} says, bit by bit, which no op of ONNX does")


@onnx(ops.ScaledMatmul, "stored")
def scaled_matmul(g: Emitter, op: ops.ScaledMatmul, a: Value, a_scales: Value, b: Value, b_scales: Value) -> Value:
    in_float32(op.accumulation)
    left, right = dequantized(g, op.a.tensor, op.a_tile, a, a_scales), dequantized(g, op.b.tensor, op.b_tile, b, b_scales)
    return g.rounded(g.MatMul(left, g.swapped(right, 2)), DType.f32, op.out)


@onnx(ops.GroupedScaledMatmul, "stored", stacks=True)
def grouped_scaled_matmul(
    g: Emitter, op: ops.GroupedScaledMatmul, x: Value, x_scales: Value, w: Value | Stack, w_scales: Value | Stack, counts: Value
) -> Value:
    in_float32(op.accumulation)
    rows = dequantized(g, op.x.tensor, op.x_tile, x, x_scales, counts)
    if isinstance(w, Stack):
        one = Tensor(op.w.dtype, op.w.shape[1:])
        scales = matrices_of(g, w_scales, op.w_scales)
        matrices = [dequantized(g, one, op.w_tile, m, s) for m, s in zip(w.parts, scales, strict=True)]
    else:
        values = dequantized(g, op.w.tensor, op.w_tile, w, g.dense(w_scales))
        matrices = matrices_of(g, values, DscValue(op.w.type, "w"))
    if op.x.tensor.rank == 3:
        return g.rounded(_multiply_each(g, op, rows, matrices, counts), DType.f32, op.out)
    found = multiply_groups(g, rows, matrices, counts, True, columns=op.result.shape[1])
    return g.rounded(found, DType.f32, op.out)


def _multiply_each(g: Emitter, op: ops.GroupedScaledMatmul, x: Value, matrices: list[Value], counts: Value) -> Value:
    """The first counts[e] of the rows of group e times its matrix, the others 0."""
    each = matrices_of(g, x, op.x)
    products = [g.Unsqueeze(g.MatMul(r, g.Transpose(m, perm=[1, 0])), [0]) for r, m in zip(each, matrices, strict=True)]
    used = g.Less(np.arange(static(op.x, op.name)[1], dtype=np.int64)[:, None], g.Unsqueeze(g.Cast(counts, to=7), [1, 2]))
    return g.Where(used, g.Concat(*products, axis=0), np.float32(0))


@onnx(ops.GroupedScaledMatmulWgrad, "stored")
def grouped_scaled_matmul_wgrad(
    g: Emitter, op: ops.GroupedScaledMatmulWgrad, a: Value, a_scales: Value, b: Value, b_scales: Value, counts: Value
) -> Value:
    in_float32(op.accumulation)
    left = dequantized(g, op.a.tensor, op.a_tile, a, a_scales, counts)
    right = dequantized(g, op.b.tensor, op.b_tile, b, b_scales, counts)
    return g.rounded(multiply_groups_of_rows(g, op, left, right, counts), DType.f32, op.out)
