"""Quantisation and products of quantised operands: `numerics/` says what each bit is."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...ir.errors import require
from ...ir.ops import quant as ops
from ...numerics import scale, tensorcore
from ...numerics.formats import FORMATS
from ..arrays import STORAGE, Array
from .linalg import multiply_groups, multiply_groups_of_rows, rows_of_groups
from .registry import reference


@reference(ops.Quantize, operands="stored")
def quantize(op: ops.Quantize, x: Array, counts: Array | None = None) -> tuple[Array, Array]:
    groups = None if counts is None else counts.tolist()
    codes, scales = scale.quantize(x, op.tile, FORMATS[op.dtype.name], op.rule, groups)
    return codes, _padded(scales, op.results[1].shape)


@reference(ops.Dequantize, operands="stored")
def dequantize(op: ops.Dequantize, codes: Array, scales: Array, counts: Array | None = None) -> Array:
    groups = None if counts is None else counts.tolist()
    used = scales if groups is None or op.tile[0] == 1 else scales[: scale.scale_shape(codes.shape, op.tile, groups)[0]]
    return scale.dequantize(codes, used, op.tile, groups, STORAGE[op.dtype])


@reference(ops.ScaledMatmul, operands="blocks")
def scaled_matmul(op: ops.ScaledMatmul, wide: np.dtype[Any], a: Array, a_scales: Array, b: Array, b_scales: Array) -> Array:
    if wide == np.float64 and op.accumulation.arithmetic == "float32":
        return np.matmul(scale.dequantize(a, a_scales, op.a_tile, dtype=wide), scale.dequantize(b, b_scales, op.b_tile, dtype=wide).T)
    rows = a.reshape(-1, a.shape[-1])
    found = tensorcore.scaled_matmul(
        rows, a_scales.reshape(-1, a_scales.shape[-1]), b, b_scales, op.a_tile, op.b_tile, op.accumulation, STORAGE[op.out]
    )
    return found.reshape(*a.shape[:-1], len(b))


@reference(ops.GroupedScaledMatmul, operands="blocks")
def grouped_scaled_matmul(
    op: ops.GroupedScaledMatmul, wide: np.dtype[Any], x: Array, x_scales: Array, w: Array, w_scales: Array, counts: Array
) -> Array:
    if x.ndim == 3:
        inside = bool(((counts >= 0) & (counts <= x.shape[1])).all())
        require(inside, f"counts are {counts.tolist()}, but each group has {x.shape[1]} rows")
        kept = np.arange(x.shape[1]) < counts[:, None]
        result = np.zeros((*x.shape[:2], w.shape[1]), wide)
        result[kept] = grouped_scaled_matmul(op, wide, x[kept], x_scales[kept], w, w_scales, counts)
        return result
    used, groups = rows_of_groups(counts, len(x))[-1].stop, counts.tolist()
    rows, factors = _used(x, x_scales, op.x_tile, used, groups)
    if wide == np.float64 and op.accumulation.arithmetic == "float32":
        values, matrices = scale.dequantize(rows, factors, op.x_tile, groups, wide), scale.dequantize(w, w_scales, op.w_tile, dtype=wide)
        found = multiply_groups(values, matrices, counts, True, wide)
    else:
        found = tensorcore.grouped_scaled_matmul(rows, factors, w, w_scales, groups, op.x_tile, op.w_tile, op.accumulation, STORAGE[op.out])
    return found if used == len(x) else np.concatenate([found, np.zeros((len(x) - used, found.shape[1]), found.dtype)])


@reference(ops.GroupedScaledMatmulWgrad, operands="blocks")
def grouped_scaled_matmul_wgrad(
    op: ops.GroupedScaledMatmulWgrad, wide: np.dtype[Any], a: Array, a_scales: Array, b: Array, b_scales: Array, counts: Array
) -> Array:
    used, groups = rows_of_groups(counts, len(a))[-1].stop, counts.tolist()
    a, a_scales = _used(a, a_scales, op.a_tile, used, groups)
    b, b_scales = _used(b, b_scales, op.b_tile, used, groups)
    if wide == np.float64 and op.accumulation.arithmetic == "float32":
        left, right = scale.dequantize(a, a_scales, op.a_tile, groups, wide), scale.dequantize(b, b_scales, op.b_tile, groups, wide)
        return multiply_groups_of_rows(left, right, counts, wide)
    tiles = op.a_tile[::-1], op.b_tile[::-1]
    return tensorcore.grouped_scaled_matmul_k(a.T, a_scales.T, b.T, b_scales.T, groups, *tiles, op.accumulation, STORAGE[op.out])


def _used(x: Array, scales: Array, tile: tuple[int, int], used: int, groups: list[int]) -> tuple[Array, Array]:
    """The rows that belong to a group, and the scales of their tiles: an op keeps room for more of both."""
    rows = x[:used]
    return rows, scales[: scale.scale_shape(rows.shape, tile, groups)[0]]


def _padded(scales: Array, shape: tuple[Any, ...]) -> Array:
    """The scales with rows of zeros behind them, where fewer tiles were used than there is room for; scales of rows are as many as rows."""
    if scales.shape == shape or not all(isinstance(d, int) for d in shape):
        return scales
    room = np.zeros(shape, scales.dtype)
    room[: len(scales)] = scales
    return room
