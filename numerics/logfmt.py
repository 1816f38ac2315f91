"""LogFMT-nBit: tiles whose values are rounded to levels equally spaced in the logarithm.

"Insights into DeepSeek-V3" (arXiv 2505.09343), section 3.2, proposes it for the combine of expert parallelism; it was not deployed. One bit
is the sign, the other n - 1 hold K. K = 0 is zero, K = 1 .. 2^(n-1) - 1 is exp(low + step * (K - 1)). low and
low + step * (2^(n-1) - 2) are the logarithms of the tile's smallest and largest magnitude other than zero, but low is no less than the
largest minus log(2^32), a range like that of five exponent bits. A value goes to the level nearest to it in linear space, not in the
logarithm, so that rounding is unbiased; halfway between two levels to the lower.

| tile holds        | low, step        | codes                                                                  |
|-------------------|------------------|------------------------------------------------------------------------|
| only zeros        | 0, 0             | zero, signs kept                                                       |
| one magnitude     | its logarithm, 0 | K = 1, and zeros                                                       |
| values under low  | as above         | K = 1, or zero where that is nearer                                    |
| an infinity       | as with the largest finite float32 in its place |                                         |
| a NaN             | NaN, NaN         | K = 1: the whole tile decodes to NaN                                   |
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import require
from .formats import F32, Array, to_float32

RANGE = 32 * np.log(2.0)
"""The largest distance between the logarithms of the largest and the smallest level."""


def encode_logfmt(x: Array, bits: int, tile: int = 128) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]:
    """Codes of `x` [..., columns] in tiles of `tile` along the last dimension (the last one may be shorter), and each tile's low and step.

    Returns codes [..., columns] (uint8 up to 8 bits, uint16 up to 16) and low, step float32 [..., tiles].
    """
    _check(bits, tile)
    require(x.ndim > 0, "a scalar, expected at least one dimension to lay tiles over")
    columns = x.shape[-1]
    codes = np.empty(x.shape, np.uint8 if bits <= 8 else np.uint16)
    low, step = (np.empty((*x.shape[:-1], -(-columns // tile)), np.float32) for _ in range(2))
    wide = to_float32(np.asarray(x))
    for i, start in enumerate(range(0, columns, tile)):
        part = slice(start, min(start + tile, columns))
        codes[..., part], low[..., i], step[..., i] = _encode_tile(wide[..., part], bits)
    return codes, low, step


def decode_logfmt(
    codes: NDArray[Any], low: NDArray[np.float32], step: NDArray[np.float32], bits: int, tile: int = 128
) -> NDArray[np.float32]:
    """float32 values of what `encode_logfmt` returned, rounded once and never beyond the largest finite one."""
    _check(bits, tile)
    columns = codes.shape[-1]
    expected = (*codes.shape[:-1], -(-columns // tile))
    require(
        low.shape == expected and step.shape == expected,
        f"low {list(low.shape)} and step {list(step.shape)} for codes {list(codes.shape)} in tiles of {tile}, expected {list(expected)}",
    )
    level = (codes & ((1 << (bits - 1)) - 1)).astype(np.float64)
    low_of, step_of = (np.repeat(each.astype(np.float64), tile, axis=-1)[..., :columns] for each in (low, step))
    magnitude = np.minimum(np.exp(low_of + step_of * (level - 1)), F32.max)
    magnitude[level == 0] = 0
    return np.copysign(magnitude, np.where(codes >> (bits - 1), -1.0, 1.0)).astype(np.float32)


def _check(bits: int, tile: int) -> None:
    require(3 <= bits <= 16, f"LogFMT of {bits} bits, expected 3 to 16")
    require(tile >= 1, f"tile of {tile}, expected at least 1")


def _encode_tile(x: NDArray[np.float32], bits: int) -> tuple[Array, Array, Array]:
    """Codes, low and step of one tile per row of `x` [..., columns]."""
    last = (1 << (bits - 1)) - 2  # K - 1 of the largest level
    magnitude = np.minimum(np.abs(x.astype(np.float64)), F32.max)
    zero = magnitude == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithm = np.log(magnitude)
        high = logarithm.max(axis=-1, keepdims=True)
        least = np.maximum(np.where(zero, np.inf, logarithm).min(axis=-1, keepdims=True), high - RANGE)
        low = np.where(high == -np.inf, 0.0, least).astype(np.float32)
        step = np.where(high == -np.inf, 0.0, (high - least) / last).astype(np.float32)
        # Linear rounding: the middle of levels i and i + 1 lies at i + middle on the scale of the logarithm.
        spacing = step.astype(np.float64)
        middle = np.log1p(np.expm1(spacing) / 2) / spacing
        index = np.clip(np.ceil((logarithm - low) / spacing - middle), 0, last)
    # Without a spacing (one magnitude, or NaN) there is one level.
    level = np.where(spacing > 0, index, 0).astype(np.int64) + 1
    level[zero | (magnitude <= np.exp(low.astype(np.float64)) / 2)] = 0
    codes = level | (np.signbit(x).astype(np.int64) << (bits - 1))
    return codes, low[..., 0], step[..., 0]
