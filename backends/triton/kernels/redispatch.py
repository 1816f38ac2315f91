"""Redispatch: tokens' vectors to expert rows by a known order: y[r] = x[order[r] / k].

Layout        each x [T, H] to [T*k, H], order [T*k]; the workspace holds its inverse
Accumulation  none
Compared to   numpy_ref, bit for bit; floor: one read of x and one write of the rows
"""

from __future__ import annotations

from ....ir.ops.moe import Redispatch
from ..registry import Launch, Slot, kernel
from ..targets import Target
from .permutation import invert, row_of, spread


@kernel(Redispatch)
def redispatch(op: Redispatch, target: Target, xs: tuple[Slot, ...], handle: tuple[Slot], *sent: Slot) -> tuple[Launch, ...]:
    inverse = row_of(handle[0].size)
    return invert(handle[0], inverse), *(spread(x, inverse, y, target) for x, y in zip(xs, sent, strict=True))
