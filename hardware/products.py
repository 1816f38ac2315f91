"""How long a chip's units work on a matrix product: tiles, waves of tiles, the loop over K, promotion of FP8 sums.

A kernel cuts the result into tiles and deals them out to the units, in as many waves as tiles by units, rounded up. A tile takes

    ramp + k / 128 * max(2 bm bn 128 / (matrix * peak / units) + promotion * bm bn, (bm + bn) 128 bytes / feed)

seconds: its unit multiplies, and promotes FP8 sums every 128 elements (DeepSeek-V3 report, section 3.3.2), while the next blocks come in.
Of the tiles that kernels have the one is taken with the fewest waves, of those the one that fills the last wave best, as DeepGEMM chooses
(deepseek-ai/DeepGEMM, get_best_configs at a6d97a1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .device import Device

BLOCK_K = 128
WIDTHS = tuple(range(16, 129, 8))
"""Columns of a tile where FP8 sums are promoted: more do not fit into the registers of two accumulators."""
WIDE = (64, 128, 192, 256)


@dataclass(frozen=True)
class Product:
    """`groups` products [m, k] x [k, n] of operands of `bits` bits, in one kernel."""

    m: int
    n: int
    k: int
    groups: int = 1
    bits: int = 16
    promoted: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.groups * self.m * self.n * self.k


@cache
def tiling(m: int, n: int, groups: int, units: int, promoted: bool) -> tuple[int, int, int]:
    """Rows and columns of a tile, and how many waves there are."""
    rows = 64 if m <= 64 else 128
    best: tuple[int, int] | None = None
    chosen = (0, 0, 0)
    for columns in WIDTHS if promoted else WIDE:
        tiles = groups * -(-m // rows) * -(-n // columns)
        waves = -(-tiles // units)
        key = (waves, -((tiles - 1) % units + 1))
        if best is None or key <= best:
            best, chosen = key, (rows, columns, waves)
    return chosen


def loop_seconds(product: Product, device: Device, units: int, peak: float) -> float:
    """Seconds that the units compute; `peak` is the FLOP/s of all units of the device for such operands."""
    if not product.flops:
        return 0.0
    rows, columns, waves = tiling(product.m, product.n, product.groups, units, product.promoted)
    kernels = device.kernels
    multiplying = 2 * rows * columns * BLOCK_K / (kernels.matrix.mid * peak / device.units)
    if product.promoted:
        multiplying += kernels.promotion.mid * rows * columns
    block = max(multiplying, (rows + columns) * BLOCK_K * product.bits / 8 / kernels.feed.mid)
    return waves * (kernels.ramp.mid + product.k / BLOCK_K * block)
