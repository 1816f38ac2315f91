"""Combine backward, row by row: drows[r] = weight of its slot * sent[r], and the slot's dweight = sum over H of rows[r] * sent[r].

Layout        rows, sent, drows [T*k, H], order [T*k], weights and dweights [T, k], all row-major
Accumulation  float32, in the order of the reduction tree within a block of columns, then block by block; results are rounded once
Compared to   numpy_ref: drows bit for bit, dweights within the bound of `testing.bounds_backward`; floor: two reads and one write of rows
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.moe import CombineBackward
from ..arithmetic import narrow, widen
from ..registry import Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, warps
from .permutation import token_tile


@triton.jit
def combine_backward_kernel(ROWS_OF, SENT, ORDER, WEIGHTS, DROWS, DWEIGHTS, rows, columns, FORMAT: tl.constexpr, WEIGHT: tl.constexpr,
                            ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(ORDER + row, mask=row < rows, other=-1)
    known = (slot >= 0) & (slot < rows)  # a broken handle names others
    weight = widen(tl.load(WEIGHTS + slot, mask=known, other=0.0), WEIGHT)[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column
        inside = (row < rows)[:, None] & (column < columns)
        sent = widen(tl.load(SENT + at, mask=inside, other=0.0), FORMAT)
        total += widen(tl.load(ROWS_OF + at, mask=inside, other=0.0), FORMAT) * sent
        tl.store(DROWS + at, narrow(sent * weight, FORMAT), mask=inside)
    tl.store(DWEIGHTS + slot, narrow(tl.sum(total, axis=1), WEIGHT), mask=known)


@kernel(CombineBackward)
def combine_backward(op: CombineBackward, target: Target, rows: Slot, sent: Slot, handle: tuple[Slot], weights: Slot, drows: Slot,
                     dweights: Slot) -> Launch:  # fmt: skip
    rows, sent, drows = (x.on(target) for x in (rows, sent, drows))
    (count, columns), (height, width) = rows.shape, token_tile(rows.shape[1])
    return Launch(
        combine_backward_kernel,
        grid=(ceil_div(count, height),),
        arguments={
            **{"ROWS_OF": rows, "SENT": sent, "ORDER": handle[0], "WEIGHTS": weights, "DROWS": drows, "DWEIGHTS": dweights},
            **{"rows": count, "columns": columns},
        },
        constants={"FORMAT": rows.format, "WEIGHT": weights.format, "ROWS": height, "COLUMNS": width},
        num_warps=warps(height * width),
    )
