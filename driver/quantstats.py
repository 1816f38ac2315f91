"""What quantisation did to values: how many were cut off, how many vanished, how far the scales reach."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..ir.ops.quant import Quantize
from ..numerics.formats import FORMATS
from .measure import Array, real


@dataclass(frozen=True)
class QuantizationStats:
    """One execution of a `quantize`. Shares are of the values that are not zero."""

    site: str
    format: str
    saturated: float
    """Share whose magnitude is above the largest code times the scale: they were clipped."""
    flushed: float
    """Share that became zero."""
    scale_min: float
    scale_max: float


def stats_of(site: str, op: Quantize, x: Array, codes: Array, scales: Array) -> QuantizationStats:
    """The figures of one quantisation. Tiles of grouped rows restart at each group, so there only zeros are counted."""
    values, code = np.abs(real(x)), np.abs(real(codes))
    present = max(1, int(np.count_nonzero(values)))
    largest = FORMATS[op.dtype.name].max
    saturated = 0
    if op.counts is None or op.tile[0] == 1:
        limit = _spread(real(scales) * largest, op.tile, x.shape)
        saturated = int(np.count_nonzero((code == largest) & (values > limit * (1 + 2.0**-20))))
    used = scales[scales != 0]
    return QuantizationStats(
        site,
        op.dtype.name,
        saturated / present,
        int(np.count_nonzero((code == 0) & (values > 0))) / present,
        float(used.min()) if used.size else 0.0,
        float(used.max()) if used.size else 0.0,
    )


def _spread(scales: Array, tile: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """Each tile's number at each of its elements."""
    rows = np.repeat(scales, tile[0], axis=-2)[..., : shape[-2], :] if tile[0] > 1 else scales
    return np.repeat(rows, tile[1], axis=-1)[..., : shape[-1]]
