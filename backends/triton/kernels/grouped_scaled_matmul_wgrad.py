"""Weight gradient of the experts in FP8: c[e, m, n] = sum over rows r of group e of (a[r, m] * its scale) (b[r, n] * its scale).

Layout        a [R, M], b [R, N] codes, rows of group e consecutive; scales row-major float32 over tiles [T, ta] of a and [T, tb] of b,
              which restart at each group; counts [E] integers; c [E, M, N], 0 for a group without rows
Accumulation  `scaled_product` of scaled_matmul.py over the rows of a group: a partial sum per tile of T rows, promoted into float32
Compared to   numpy_ref within gamma(rows of the group + 2) sum |a||b|; exactly where all sums are small integers and scales powers of two
FP8 tensor cores take K-major operands, and K is the rows here. Both are turned first, [M, P] and [N, P], each group filled up with zeros to
whole tiles of T: then the product copies aligned rows ahead of itself, which it cannot where it has to transpose in registers.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from ....ir.ops.quant import GroupedScaledMatmulWgrad
from ..arithmetic import narrow
from ..groups import extents, rows_of_group, rows_of_tile
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, power_of_two, scaled_gemm
from .scaled_matmul import declined, scaled_product, tile_of

COLUMNS = 64
"""Columns that one program turns: with T rows of 128, two reads of 16 bytes a thread."""


@triton.jit
def turn_groups_kernel(X, COUNTS, Y, rows, columns, padded, groups, GROUPS: tl.constexpr, T: tl.constexpr, COLUMNS: tl.constexpr):
    tile = tl.program_id(0)
    starts, ends = extents(COUNTS, rows, groups, GROUPS, False)
    _, start, stop = rows_of_tile(tile, starts, ends, T, GROUPS)
    if start == stop:
        return
    row, column = tl.arange(0, T), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < stop - start)[:, None] & (column < columns)[None, :]
    x = tl.load(X + start * columns + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    y_at = Y + column.to(tl.int64)[:, None] * padded + tile * T + row[None, :]
    tl.store(y_at, tl.trans(x), mask=(column < columns)[:, None])


@triton.jit
def grouped_scaled_matmul_wgrad_kernel(A, SA, B, SB, COUNTS, C, rows, m, n, padded, groups,
                                       TILE_A: tl.constexpr, TILE_B: tl.constexpr, FORMULA: tl.constexpr, FORMAT_A: tl.constexpr,
                                       FORMAT_B: tl.constexpr, OUT: tl.constexpr, FNUZ: tl.constexpr, DEQUANTIZE: tl.constexpr,
                                       GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                                       GROUP: tl.constexpr):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    group = tl.program_id(1)
    starts, ends = extents(COUNTS, rows, groups, GROUPS, False)
    _, count, tile = rows_of_group(group, starts, ends, BLOCK_K, GROUPS)
    steps = tl.cdiv(count, BLOCK_K)
    # Rows and columns of c beyond the edge repeat others and are not stored: loads along M and N need no mask.
    row, column = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    i, j, inner = row % m, column % n, tl.arange(0, BLOCK_K)
    a_at = A + tile * BLOCK_K + i.to(tl.int64)[:, None] * padded + inner[None, :]
    b_at = B + tile * BLOCK_K + j.to(tl.int64)[None, :] * padded + inner[:, None]
    sa_step, sb_step = tl.cdiv(m, TILE_A), tl.cdiv(n, TILE_B)
    sa_at, sb_at = SA + tile * sa_step + i // TILE_A, SB + tile * sb_step
    if TILE_B % BLOCK_N == 0:
        sb_at += column_tile * BLOCK_N // TILE_B
    else:
        sb_at += j // TILE_B
    accumulator = scaled_product(a_at, sa_at, b_at, sb_at, steps * BLOCK_K, steps, BLOCK_K, sa_step, BLOCK_K, sb_step,
                                 FORMULA, TILE_A == 1 or TILE_B != 1, FORMAT_A, FORMAT_B, FNUZ, DEQUANTIZE,
                                 BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    c_at = C + group.to(tl.int64) * m * n + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(c_at, narrow(accumulator, OUT), mask=(row < m)[:, None] & (column < n)[None, :])


@kernel(GroupedScaledMatmulWgrad)
def grouped_scaled_matmul_wgrad(
    op: GroupedScaledMatmulWgrad, target: Target, a: Slot, a_scales: Slot, b: Slot, b_scales: Slot, counts: Slot, c: Slot
) -> tuple[Launch, ...] | Declined:
    if reason := declined(a, b, op.a_tile[::-1], op.b_tile[::-1], op.accumulation, target):
        return reason
    a, b = a.on(target), b.on(target)
    step, rows, (groups, m, n) = op.a_tile[0], a.shape[0], c.shape
    tiles = rows // step + min(groups, rows)
    padded = tiles * step
    turned = tuple(replace(x, kind="workspace", index=at, shape=(x.shape[1], padded), strides=(padded, 1)) for at, x in enumerate((a, b)))
    turns = tuple(
        Launch(
            turn_groups_kernel,
            grid=(tiles, ceil_div(x.shape[1], COLUMNS)),
            arguments={"X": x, "COUNTS": counts, "Y": y, "rows": rows, "columns": x.shape[1], "padded": padded, "groups": groups},
            constants={"GROUPS": power_of_two(groups), "T": step, "COLUMNS": COLUMNS},
        )
        for x, y in zip((a, b), turned, strict=True)
    )
    tile = scaled_gemm(m, n, padded, step, target, groups=groups, scale_rows=op.b_tile[1])
    product = Launch(
        grouped_scaled_matmul_wgrad_kernel,
        grid=(ceil_div(m, tile.m) * ceil_div(n, tile.n), groups),
        arguments={
            **{"A": turned[0], "SA": a_scales, "B": turned[1], "SB": b_scales, "COUNTS": counts, "C": c},
            **{"rows": rows, "m": m, "n": n, "padded": padded, "groups": groups},
        },
        constants={
            **{"TILE_A": op.a_tile[1], "TILE_B": op.b_tile[1], "FORMULA": op.accumulation.formula},
            **{"FORMAT_A": a.format, "FORMAT_B": b.format, "OUT": c.format},
            **{"FNUZ": target.fp8 == "fnuz", "DEQUANTIZE": target.fp8 == "none", "GROUPS": power_of_two(groups)},
            **{"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group},
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fusion=op.accumulation.formula != "unfused",
        workspace=turned,  # of this launch, which takes place without any rows too
    )
    return *turns, product
