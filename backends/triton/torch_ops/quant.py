"""Quantisation and products of quantised operands, for the tiles, rules and accumulations that the kernels decline.

Accumulation as a tensor core does it has no torch form: such products are summed in float32, "exact" ones in float64.
"""

from __future__ import annotations

import torch

from ....ir.errors import require
from ....ir.ops import quant as ops
from ....ir.quantization import ScaleRule
from ....ir.types import DType
from ....numerics.formats import FORMATS
from ..tensors import DTYPES, plain, rounded, widen
from .linalg import by_groups_of_rows
from .registry import torch_op

Tensor = torch.Tensor


def expanded(scales: Tensor, shape: torch.Size, tile: tuple[int, int], counts: Tensor | None = None) -> Tensor:
    """Scales [..., tile rows, tile columns] as one number per element of `shape`."""
    columns = torch.arange(shape[-1], device=scales.device) // tile[1]
    return scales.index_select(-2, tile_row(shape[-2], tile[0], counts, scales.device)).index_select(-1, columns)


def tile_row(rows: int, height: int, counts: Tensor | None, device: torch.device) -> Tensor:
    """The row of scales that each of `rows` rows belongs to; tiles of several rows restart at each group."""
    row = torch.arange(rows, device=device)
    if counts is None or height == 1:
        return row // height
    counts = counts.to(torch.int64)
    ends, tiles = torch.cumsum(counts, 0), -(-counts // height)
    group = torch.searchsorted(ends, row, right=True).clamp(max=len(counts) - 1)
    return (torch.cumsum(tiles, 0) - tiles)[group] + (row - (ends - counts)[group]) // height


@torch_op(ops.Quantize)
def quantize(op: ops.Quantize, x: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    wide = rounded(x, DType.f32) if op.x.dtype is DType.f64 else widen(x)
    height, width = op.tile
    rows, columns = x.shape[-2:]
    patterns = (wide.view(torch.int32) & 0x7FFFFFFF).reshape(-1, rows, columns)
    down = tile_row(rows, height, counts, x.device)
    shape = [d if isinstance(d, int) else d.bound for d in op.results[1].shape]
    shape = [*x.shape[:-1], shape[-1]] if height == 1 else shape
    across = torch.arange(columns, device=x.device) // width
    amax = torch.zeros((len(patterns), shape[-2], shape[-1]), dtype=torch.int32, device=x.device)
    slots = (down[:, None] * shape[-1] + across).reshape(1, -1).expand(len(patterns), -1)
    amax = amax.reshape(len(patterns), -1).scatter_reduce(1, slots, patterns.reshape(len(patterns), -1), "amax")
    largest = FORMATS[op.dtype.name].max if op.rule.max is None else op.rule.max
    source = FORMATS[op.x.dtype.name if op.x.dtype in (DType.bf16, DType.f16) else "f32"].max
    scales, factor = (t.reshape(shape) for t in scales_of(amax.view(torch.float32), op.rule, largest, source))
    if counts is not None and height > 1:
        used = (-(-counts.to(torch.int64) // height)).sum()
        scales = torch.where((torch.arange(shape[-2], device=x.device) < used)[:, None], scales, 0.0)
    each = expanded(factor, wide.shape, op.tile, counts)
    scaled = wide / each if op.rule.apply == "divide" else wide * each
    return narrowed(scaled, op.dtype, op.rule.clamp), scales


def narrowed(x: Tensor, dtype: DType, saturate: bool) -> Tensor:
    """Float32 x as codes of `dtype`; without `saturate` an FP8 value that rounds beyond the largest is NaN (E4M3) or infinite (E5M2)."""
    codes = rounded(x, dtype)
    if saturate or dtype is DType.e5m6:
        return codes
    over = x.abs() > 464.0 if dtype is DType.f8e4m3 else x.abs() >= 61440.0
    pattern = codes.view(torch.uint8)
    beyond = torch.full_like(pattern, 0x7F) if dtype is DType.f8e4m3 else (pattern & 0x80) | 0x7C
    return torch.where(over, beyond, pattern).view(codes.dtype)


def scales_of(amax: Tensor, rule: ScaleRule, largest: float, source: float) -> tuple[Tensor, Tensor]:
    """`numerics.scale.scales_of`. Divisions are by tensors: torch multiplies by the reciprocal of a number on a GPU."""
    number, one = torch.full_like(amax, largest), torch.ones_like(amax)
    amax = torch.where(amax < rule.floor, torch.full_like(amax, rule.floor), amax)
    multiplier = number / amax
    if rule.nonfinite == "unit":
        multiplier = torch.where(multiplier > source, torch.full_like(amax, source), multiplier)
    if rule.pow2 == "mantissa-mask":
        multiplier = (multiplier.view(torch.int32) & -8388608).view(torch.float32)
    scale = one / multiplier if rule.scale == "1/(max/amax)" else amax / number if rule.scale == "amax/max" else amax * (one / number)
    if rule.pow2 == "ceil-bits":
        bits = scale.view(torch.int32)
        exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0)
        scale = (exponent.clamp(1, 254) << 23).to(torch.int32).view(torch.float32)
    elif rule.pow2 == "ceil-log2":
        scale = torch.exp2(torch.ceil(torch.log2(scale.to(torch.float64)).to(torch.float32)).to(torch.float64)).to(torch.float32)
    if rule.apply == "divide":
        factor = scale
    elif rule.apply == "multiply" and rule.pow2 not in ("ceil-bits", "ceil-log2"):
        factor = multiplier
    else:
        factor = one / scale
    if rule.nonfinite == "unit":
        special = (amax == 0) | ~amax.isfinite()
        scale, factor = torch.where(special, one, scale), torch.where(special, one, factor)
    return scale, factor


def _times_scales(codes: Tensor, scales: Tensor, tile: tuple[int, int], wide: torch.dtype, counts: Tensor | None = None) -> Tensor:
    return widen(codes, wide) * expanded(scales, codes.shape, tile, counts).to(wide)


@torch_op(ops.Dequantize)
def dequantize(op: ops.Dequantize, codes: Tensor, scales: Tensor, counts: Tensor | None = None) -> Tensor:
    wide = torch.float64 if op.dtype is DType.f64 else torch.float32
    return rounded(_times_scales(codes, scales, op.tile, wide, counts), op.dtype)


@torch_op(ops.ScaledMatmul)
def scaled_matmul(op: ops.ScaledMatmul, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    wide = torch.float64 if op.accumulation.arithmetic == "exact" else torch.float32
    product = _times_scales(a, a_scales, op.a_tile, wide) @ _times_scales(b, b_scales, op.b_tile, wide).T
    return rounded(product, op.out)


@torch_op(ops.GroupedScaledMatmul, waits=True)
def grouped_scaled_matmul(op: ops.GroupedScaledMatmul, x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, counts: Tensor) -> Tensor:
    """One product per group that has rows. Waits for the counts."""
    if x.dim() == 3:
        kept = torch.arange(x.shape[1], device=x.device) < counts[:, None]
        result = torch.zeros((*x.shape[:2], w.shape[1]), dtype=DTYPES[op.out], device=x.device)
        plain(result)[kept] = plain(grouped_scaled_matmul(op, x[kept], x_scales[kept], w, w_scales, counts))
        return result
    wide = torch.float64 if op.accumulation.arithmetic == "exact" else torch.float32
    rows = _times_scales(x, x_scales, op.x_tile, wide)
    result = torch.zeros((len(x), w.shape[1]), dtype=DTYPES[DType.f64 if wide == torch.float64 else DType.f32], device=x.device)
    start = 0
    for group, count in enumerate(counts.tolist()):
        require(count >= 0 and start + count <= len(x), f"counts are {counts.tolist()}, but there are {len(x)} rows")
        if count:
            result[start : start + count] = rows[start : start + count] @ _times_scales(w[group], w_scales[group], op.w_tile, wide).T
        start += count
    return rounded(result, op.out)


@torch_op(ops.GroupedScaledMatmulWgrad, waits=True)
def grouped_scaled_matmul_wgrad(
    op: ops.GroupedScaledMatmulWgrad, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, counts: Tensor
) -> Tensor:
    """One product per group that has rows. Waits for the counts. Rows past their sum have no scale and are not read."""
    wide = torch.float64 if op.accumulation.arithmetic == "exact" else torch.float32
    used = int(counts.sum())
    left = _times_scales(a[:used], a_scales, op.a_tile, wide, counts)
    right = _times_scales(b[:used], b_scales, op.b_tile, wide, counts)
    return rounded(by_groups_of_rows(left, right, counts), op.out)
