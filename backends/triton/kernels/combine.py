"""Combine: expert rows back to tokens, out[t] = sum over slots s of weights[t, s] * (the row of slot s of token t).

Layout        rows [T*k, H], order [T*k], weights [T, k], out [T, H], all row-major; the workspace holds the order's inverse
Accumulation  float32, from slot 0 up, product and sum each rounded; out is rounded once
Compared to   numpy_ref, bit for bit; floor: one read of the rows and one write of out
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.moe import Combine
from ..arithmetic import narrow, widen
from ..registry import Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, warps
from .permutation import invert, row_of, token_tile


@triton.jit
def combine_kernel(ROWS, ROW_OF, WEIGHTS, OUT, tokens, columns, SLOTS: tl.constexpr, FORMAT: tl.constexpr, WEIGHT: tl.constexpr,
                   TOKENS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (token < tokens) & (column < columns)
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for slot in range(SLOTS):
        row = tl.load(ROW_OF + token * SLOTS + slot, mask=token < tokens, other=0).to(tl.int64)
        known = (row >= 0) & (row < tokens * SLOTS)  # what no row is sent to, a broken handle leaves open
        weight = widen(tl.load(WEIGHTS + token * SLOTS + slot, mask=token < tokens, other=0.0), WEIGHT)
        total = total + widen(tl.load(ROWS + row * columns + column, mask=inside & known, other=0.0), FORMAT) * weight
    tl.store(OUT + token.to(tl.int64) * columns + column, narrow(total, FORMAT), mask=inside)


@kernel(Combine)
def combine(op: Combine, target: Target, rows: Slot, handle: tuple[Slot], weights: Slot, out: Slot) -> tuple[Launch, ...]:
    (tokens, columns), (height, width) = out.shape, token_tile(out.shape[1])
    inverse, rows, out = row_of(handle[0].size), rows.on(target), out.on(target)
    weighted = Launch(
        combine_kernel,
        grid=(ceil_div(tokens, height), ceil_div(columns, width)),
        arguments={"ROWS": rows, "ROW_OF": inverse, "WEIGHTS": weights, "OUT": out, "tokens": tokens, "columns": columns},
        constants={"SLOTS": weights.shape[1], "FORMAT": rows.format, "WEIGHT": weights.format, "TOKENS": height, "COLUMNS": width},
        num_warps=warps(height * width),
    )
    return invert(handle[0], inverse), weighted
