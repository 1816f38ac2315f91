"""A number for each slot of a token as one for its expert row, and back.

Formula       rows[r] = weights[order[r]], or slots[order[r]] = rows[r]
Layout        weights [T, k], rows [T*k, 1], order [T*k], contiguous
Accumulation  none: numbers move
Compared to   numpy_ref, bit for bit; floor: latency
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.moe import RowWeights, SlotWeights
from ..registry import Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div
from .permutation import BLOCK


@triton.jit
def row_weights_kernel(X, ORDER, Y, rows, BACK: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(ORDER + row, mask=row < rows, other=-1)
    known = (slot >= 0) & (slot < rows)  # a broken handle names others
    if BACK:
        tl.store(Y + slot, tl.load(X + row, mask=known), mask=known)
    else:
        tl.store(Y + row, tl.load(X + slot, mask=known, other=0.0), mask=row < rows)


@kernel(SlotWeights)
@kernel(RowWeights)
def row_weights(op: RowWeights | SlotWeights, target: Target, x: Slot, handle: tuple[Slot], y: Slot) -> Launch:
    return Launch(
        row_weights_kernel,
        grid=(ceil_div(y.size, BLOCK),),
        arguments={"X": x, "ORDER": handle[0], "Y": y, "rows": y.size},
        constants={"BACK": isinstance(op, SlotWeights), "BLOCK": BLOCK},
    )
