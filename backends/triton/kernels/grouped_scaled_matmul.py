"""Block-scaled product of FP8 rows with the matrix of their group: y[r, n] = sum_k (x[r, k] * its scale) (w[e, n, k] * its scale).

Layout        x [R, K] codes, rows of group e consecutive, w [E, N, K] codes; scales row-major float32 over tiles [1, T] of x and [tw, T]
              of w; counts [E] integers; y [R, N], 0 in rows past the sum of the counts. Or x [E, M, K] and y [E, M, N], 0 in rows of a
              group past its count: neither they nor the matrix of a group without rows are read
Accumulation  `scaled_product` of scaled_matmul.py, tile by tile of a group: the same bits as one product per group
Compared to   numpy_ref within gamma(K + 2) sum |x||w|; exactly where all sums are small integers and scales powers of two; floor: one read
              of x and of the matrices that have rows, one write of y
Specialised on Hopper as in scaled_matmul.py. There a launch before it writes down which rows each tile has: the compiler specialises no
loop that computes prefix sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.fused import GroupedScaledMatmulAdd
from ....ir.ops.quant import GroupedScaledMatmul
from ....ir.types import DType
from ..arithmetic import narrow, plus
from ..groups import extents, rows_of_tile
from ..registry import Argument, Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, power_of_two, scaled_gemm
from .scaled_matmul import declined, described_product, scaled_product, tile_of


@triton.jit
def grouped_scaled_matmul_kernel(X, SX, W, SW, COUNTS, ADDED, Y, rows, n, k, groups, row_tiles, steps,
                                 TILE_W: tl.constexpr, FORMULA: tl.constexpr, FORMAT_X: tl.constexpr, FORMAT_W: tl.constexpr,
                                 OUT: tl.constexpr, FNUZ: tl.constexpr, DEQUANTIZE: tl.constexpr, GROUPS: tl.constexpr,
                                 EACH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                                 GROUP: tl.constexpr, PLUS: tl.constexpr):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(n, BLOCK_N), GROUP)
    if EACH:  # rows that each group has
        group = row_tile // tl.cdiv(EACH, BLOCK_M)
        first = row_tile % tl.cdiv(EACH, BLOCK_M) * BLOCK_M
        start = group.to(tl.int64) * EACH + first
        height = tl.minimum(EACH - first, BLOCK_M)
        used = tl.load(COUNTS + group).to(tl.int32) - first
        if used <= 0:
            steps = 0
    else:
        starts, ends = extents(COUNTS, rows, groups, GROUPS, True)
        group, start, stop = rows_of_tile(row_tile, starts, ends, BLOCK_M, GROUPS)
        if start == stop:
            return
        height = (stop - start).to(tl.int32)
        used = height
        if group == groups:
            steps = 0  # spare rows
    # Rows and columns beyond the edge repeat others and are not stored: loads along M and N need no mask.
    row, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    i = tl.maximum(tl.minimum(row, tl.minimum(used, height) - 1), 0)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = column % n
    x_at = X + start * k + i[:, None] * k + inner[None, :]
    w_at = W + group.to(tl.int64) * n * k + j.to(tl.int64)[None, :] * k + inner[:, None]
    scale_columns = tl.cdiv(k, BLOCK_K)
    sx_at = SX + start * scale_columns + i * scale_columns
    sw_at = SW + group.to(tl.int64) * tl.cdiv(n, TILE_W) * scale_columns
    if TILE_W % BLOCK_N == 0:
        sw_at += column_tile * BLOCK_N // TILE_W * scale_columns
    else:
        sw_at += j // TILE_W * scale_columns
    accumulator = scaled_product(x_at, sx_at, w_at, sw_at, k, steps, BLOCK_K, 1, BLOCK_K, 1,
                                 FORMULA, True, FORMAT_X, FORMAT_W, FNUZ, DEQUANTIZE, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    if EACH:
        accumulator = tl.where((row < used)[:, None], accumulator, 0.0)
    at, inside = start * n + row[:, None] * n + column[None, :], (row < height)[:, None] & (column < n)[None, :]
    tl.store(Y + at, narrow(plus(accumulator, ADDED, at, inside, OUT, PLUS), OUT), mask=inside)


@triton.jit
def tiles_of_groups_kernel(COUNTS, TILES, rows, groups, HEIGHT: tl.constexpr, GROUPS: tl.constexpr):
    """Group, first row and number of rows of each tile; past the last tile no rows."""
    starts, ends = extents(COUNTS, rows, groups, GROUPS, True)
    group, start, stop = rows_of_tile(tl.program_id(0), starts, ends, HEIGHT, GROUPS)
    at = TILES + tl.program_id(0) * 3
    tl.store(at, group.to(tl.int32))
    tl.store(at + 1, start.to(tl.int32))
    tl.store(at + 2, (stop - start).to(tl.int32))


@triton.jit
def grouped_scaled_matmul_specialized_kernel(X, SX, W, SW, TILES, ADDED, Y, rows, n, k, groups, row_tiles, steps, tiles,
                                             TILE_W: tl.constexpr, FORMULA: tl.constexpr, FORMAT_X: tl.constexpr, FORMAT_W: tl.constexpr,
                                             OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                                             GROUP: tl.constexpr, PLUS: tl.constexpr):  # fmt: skip
    x_rows = tl.make_tensor_descriptor(X, [rows, k], [k, 1], [BLOCK_M, BLOCK_K])
    w_rows = tl.make_tensor_descriptor(W, [groups * n, k], [k, 1], [BLOCK_N, BLOCK_K])
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=False, warp_specialize=True):
        row_tile, column_tile = tile_of(tile, row_tiles, tl.cdiv(n, BLOCK_N), GROUP)
        group, start, height = tl.load(TILES + row_tile * 3), tl.load(TILES + row_tile * 3 + 1), tl.load(TILES + row_tile * 3 + 2)
        row = tl.arange(0, BLOCK_M)
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        sx_at = SX + (start + tl.maximum(tl.minimum(row, height - 1), 0)).to(tl.int64) * steps
        sw_at = SW + (group.to(tl.int64) * tl.cdiv(n, TILE_W) + column_tile * BLOCK_N // TILE_W) * steps
        multiplied = tl.where((group < groups) & (height > 0), steps, 0)  # spare rows are zero
        accumulator = described_product(x_rows, start, w_rows, group * n + column_tile * BLOCK_N, sx_at, sw_at, multiplied,
                                        FORMULA, True, FORMAT_X, FORMAT_W, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        at, inside = (start + row).to(tl.int64)[:, None] * n + column[None, :], (row < height)[:, None] & (column < n)[None, :]
        tl.store(Y + at, narrow(plus(accumulator, ADDED, at, inside, OUT, PLUS), OUT), mask=inside)


@kernel(GroupedScaledMatmul)
def grouped_scaled_matmul(
    op: GroupedScaledMatmul, target: Target, x: Slot, x_scales: Slot, w: Slot, w_scales: Slot, counts: Slot, y: Slot
) -> Launch | tuple[Launch, ...] | Declined:
    return grouped_scaled_matmul_add(op, target, x, x_scales, w, w_scales, counts, None, y)


@kernel(GroupedScaledMatmulAdd)
def grouped_scaled_matmul_add(
    op: GroupedScaledMatmul, target: Target, x: Slot, x_scales: Slot, w: Slot, w_scales: Slot, counts: Slot, added: Slot | None, y: Slot
) -> Launch | tuple[Launch, ...] | Declined:
    if reason := declined(x, w, op.x_tile, op.w_tile, op.accumulation, target):
        return reason
    if op.x_tile[0] > 1:
        return Declined(f"tiles of {op.x_tile[0]} rows, expected tiles of one row, which belong to one group")
    x, w = x.on(target), w.on(target)
    (groups, n, k), masked = w.shape, len(x.shape) == 3
    rows, each = x.size // max(1, k), x.shape[1] if masked else 0
    tile = scaled_gemm(
        ceil_div(rows, max(1, groups)), n, k, op.x_tile[1], target, groups=groups, scale_rows=op.w_tile[0], specialize=not masked
    )
    row_tiles = groups * ceil_div(each, tile.m) if masked else rows // tile.m + min(groups + 1, rows)
    tiles = row_tiles * ceil_div(n, tile.n)
    arguments: dict[str, Argument] = {
        **{"X": x, "SX": x_scales, "W": w, "SW": w_scales, "ADDED": y if added is None else added, "Y": y, "rows": rows, "n": n, "k": k},
        **{"groups": groups, "row_tiles": row_tiles, "steps": ceil_div(k, tile.k)},
    }
    constants = {
        **{"TILE_W": op.w_tile[0], "FORMULA": op.accumulation.formula, "FORMAT_X": x.format, "FORMAT_W": w.format, "OUT": y.format},
        **{"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group, "PLUS": added is not None},
    }
    fusion = op.accumulation.formula != "unfused"
    width = power_of_two(groups + 1)
    if tile.specialized:
        listed = Slot("workspace", 0, DType.i32, (row_tiles, 3), (3, 1))
        return (
            Launch(
                tiles_of_groups_kernel,
                grid=(row_tiles,),
                arguments={"COUNTS": counts, "TILES": listed, "rows": rows, "groups": groups},
                constants={"HEIGHT": tile.m, "GROUPS": width},
                num_warps=1,
                workspace=(listed,),
            ),
            Launch(
                grouped_scaled_matmul_specialized_kernel,
                grid=(min(tiles, target.units),),
                arguments=arguments | {"TILES": listed, "tiles": tiles},
                constants=constants,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                fusion=fusion,
                described=("X", "W"),
            ),
        )
    return Launch(
        grouped_scaled_matmul_kernel,
        grid=(tiles,),
        arguments=arguments | {"COUNTS": counts},
        constants=constants | {"FNUZ": target.fp8 == "fnuz", "DEQUANTIZE": target.fp8 == "none", "GROUPS": width, "EACH": each},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fusion=fusion,
    )
