"""RoPE: pairs (a, b) of the last axis turned by their position's angle, (a cos - b sin, b cos + a sin).

Layout        x [B, S, heads, D] and the tables [B or 1, S, D/2], of any strides; y like x, its last
              axis of stride 1. Pairs are (2i, 2i + 1), read as one
              row and split in registers (INTERLEAVED), or (i, i + D/2)
Accumulation  none; float32, two products and a sum, each rounded; y is rounded once
Compared to   numpy_ref, bit for bit; floor: one read and one write of x
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.norm import Rope
from ..arithmetic import narrow, widen
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, rows_of


@triton.jit
def rope_kernel(X, COS, SIN, Y, rows, tokens, heads, x_batch, x_token, x_head, y_batch, y_token, y_head, cos_batch, cos_token,
                sin_batch, sin_token, X_PAIR: tl.constexpr, COS_PAIR: tl.constexpr, SIN_PAIR: tl.constexpr, HALF: tl.constexpr,
                INTERLEAVED: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    head, token, batch = row % heads, row // heads % tokens, row // heads // tokens
    pair = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (pair < HALF)
    cos = tl.load(COS + batch * cos_batch + token * cos_token + pair * COS_PAIR, mask=inside, other=0.0)
    sin = tl.load(SIN + batch * sin_batch + token * sin_token + pair * SIN_PAIR, mask=inside, other=0.0)
    from_row = X + batch * x_batch + token * x_token + head * x_head
    to_row = Y + batch * y_batch + token * y_token + head * y_head
    if INTERLEAVED:
        column = tl.arange(0, 2 * WIDTH)[None, :]
        within = (row < rows) & (column < 2 * HALF)
        x = widen(tl.load(from_row + column * X_PAIR, mask=within, other=0.0), FORMAT)
        a, b = tl.split(tl.reshape(x, (ROWS, WIDTH, 2)))
        turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, 2 * WIDTH))
        tl.store(to_row + column, narrow(turned, FORMAT), mask=within)
    else:
        a = widen(tl.load(from_row + pair * X_PAIR, mask=inside, other=0.0), FORMAT)
        b = widen(tl.load(from_row + (pair + HALF) * X_PAIR, mask=inside, other=0.0), FORMAT)
        tl.store(to_row + pair, narrow(a * cos - b * sin, FORMAT), mask=inside)
        tl.store(to_row + HALF + pair, narrow(b * cos + a * sin, FORMAT), mask=inside)


@kernel(Rope)
def rope(op: Rope, target: Target, x: Slot, cos: Slot, sin: Slot, y: Slot) -> Launch | Declined:
    if len(x.shape) > 4 or len(cos.shape) > 3:
        return Declined(f"x {list(x.shape)} and cos {list(cos.shape)}, expected at most [B, S, heads, D] and [B, S, D/2]")
    x, y = x.on(target), y.on(target)
    *_, tokens, heads, width = x.shape
    tile = rows_of(max(1, width // 2), 1024)
    (batch, token, head, pair), (y_batch, y_token, y_head, _) = ((0, *slot.strides)[-4:] for slot in (x, y))
    tables = {name: _table(table) for name, table in (("cos", cos), ("sin", sin))}
    rows = x.size // max(1, width)
    return Launch(
        rope_kernel,
        grid=(ceil_div(rows, tile.rows),),
        arguments={
            **{"X": x, "COS": cos, "SIN": sin, "Y": y, "rows": rows, "tokens": tokens, "heads": heads},
            **{"x_batch": batch, "x_token": token, "x_head": head, "y_batch": y_batch, "y_token": y_token, "y_head": y_head},
            **{f"{name}_batch": strides[0] for name, strides in tables.items()},
            **{f"{name}_token": strides[1] for name, strides in tables.items()},
        },
        constants={
            **{"X_PAIR": pair, "COS_PAIR": tables["cos"][2], "SIN_PAIR": tables["sin"][2]},
            **{"HALF": width // 2, "INTERLEAVED": op.interleaved, "FORMAT": x.format, "ROWS": tile.rows, "WIDTH": tile.width},
        },
    )


def _table(table: Slot) -> tuple[int, ...]:
    """Strides of batch, token and pair; 0 along an axis that is broadcast."""
    strides = [0 if extent == 1 else stride for extent, stride in zip(table.shape, table.strides, strict=True)]
    return (0, *strides)[-3:]
