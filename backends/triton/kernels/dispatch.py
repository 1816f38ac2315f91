"""Dispatch: tokens' vectors to expert rows, sorted by expert, stable: a counting sort on the device, without waiting for it.

Formula       count   how often each block of slots names each expert
              scan    those counts summed over the blocks before; their totals are the result `counts`
              place   row of a slot = rows of lower experts + slots of its expert in blocks before + in its own block before it
              spread  each x, token by token: one read, k writes
Layout        ids [T, k], each x [T, H] to [T*k, H], all row-major; the workspace holds counts [blocks, experts] and the row of each slot
Accumulation  integers only
Compared to   numpy_ref, bit for bit; floor: one read of x and one write of the rows
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ....ir.ops.moe import Dispatch
from ....ir.types import DType
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, power_of_two
from .permutation import row_of, spread

BLOCK = 64
"""Slots whose order among themselves one program finds, by comparing all pairs."""
SCANNED = 64
"""Blocks whose counts are summed in one step."""
LARGEST = 1024
"""Experts that one program counts at most."""


@triton.jit
def dispatch_count_kernel(IDS, BEFORE, slots, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(IDS + slot, mask=slot < slots, other=-1).to(tl.int32)
    expert = tl.arange(0, WIDTH)
    counts = tl.sum((ids[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(BEFORE + block * EXPERTS + expert, counts, mask=expert < EXPERTS)


@triton.jit
def dispatch_scan_kernel(BEFORE, COUNTS, blocks, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, SCANNED: tl.constexpr):
    expert = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, blocks, SCANNED):
        block = start + tl.arange(0, SCANNED)[:, None]
        at = BEFORE + block * EXPERTS + expert[None, :]
        inside = (block < blocks) & (expert < EXPERTS)[None, :]
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        total += tl.sum(counts, axis=0)
    tl.store(COUNTS + expert, total, mask=expert < EXPERTS)


@triton.jit
def dispatch_place_kernel(IDS, BEFORE, COUNTS, ORDER, ROW_OF, slots, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    slot = block * BLOCK + i
    ids = tl.load(IDS + slot, mask=slot < slots, other=-1).to(tl.int32)
    again = tl.load(IDS + slot[None, :], mask=slot[None, :] < slots, other=-1).to(tl.int32)
    known = (ids >= 0) & (ids < EXPERTS)
    in_block = tl.sum(((again == ids[:, None]) & (i[None, :] < i[:, None])).to(tl.int32), axis=1)
    lower = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, EXPERTS, BLOCK):
        expert = start + i[None, :]
        counts = tl.load(COUNTS + expert, mask=expert < EXPERTS, other=0)
        lower += tl.sum(tl.where(expert < ids[:, None], counts, 0), axis=1)
    row = lower + tl.load(BEFORE + block * EXPERTS + ids, mask=known, other=0) + in_block
    tl.store(ORDER + row, slot, mask=known)
    tl.store(ROW_OF + slot, tl.where(known, row, -1), mask=slot < slots)


@kernel(Dispatch)
def dispatch(op: Dispatch, target: Target, xs: tuple[Slot, ...], ids: Slot, *results: Any) -> tuple[Launch, ...] | Declined:
    *sent, counts, (order,) = results
    if op.experts > LARGEST:
        return Declined(f"{op.experts} experts, expected at most {LARGEST}")
    slots, blocks = ids.size, ceil_div(ids.size, BLOCK)
    inverse, before = row_of(slots), Slot("workspace", 1, DType.i32, (blocks, op.experts), (op.experts, 1))
    constants = {"EXPERTS": op.experts, "BLOCK": BLOCK}
    sort = (
        Launch(
            dispatch_count_kernel,
            grid=(blocks,),
            arguments={"IDS": ids, "BEFORE": before, "slots": slots},
            constants={**constants, "WIDTH": power_of_two(op.experts)},
        ),
        Launch(
            dispatch_scan_kernel,
            grid=(ceil_div(op.experts, 32),),
            arguments={"BEFORE": before, "COUNTS": counts, "blocks": blocks},
            constants={"EXPERTS": op.experts, "WIDTH": 32, "SCANNED": SCANNED},
            workspace=(inverse, before),  # here, because without tokens no other launch is left
        ),
        Launch(
            dispatch_place_kernel,
            grid=(blocks,),
            arguments={"IDS": ids, "BEFORE": before, "COUNTS": counts, "ORDER": order, "ROW_OF": inverse, "slots": slots},
            constants=constants,
        ),
    )
    return *sort, *(spread(x, inverse, y, target) for x, y in zip(xs, sent, strict=True))
