"""Rows times the matrix of their group: y[r, n] = sum_k x[r, k] w[e, k, n], or w[e, n, k] with transpose_b, in BF16, float16 or float32.

Layout        x [R, K], rows of group e consecutive, w [E, K, N] or [E, N, K], row-major; counts [E] integers; y [R, N], 0 in rows past the
              sum of the counts
Accumulation  float32, by the matrix instruction from start to end; float32 operands are multiplied as such, never as TF32; one rounding
              at the end
Compared to   numpy_ref within gamma(K) sum |x||w|; exactly where all sums are small integers; floor: one read of x and of the matrices
              that have rows, one write of y
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.linalg import GroupedMatmul
from ....ir.types import DType
from ..arithmetic import narrow
from ..groups import extents, rows_of_tile
from ..jit import device
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, gemm, power_of_two
from .scaled_matmul import operand, tile_of

DTYPES = (DType.bf16, DType.f16, DType.f32)


@device
def product(a_at, b_at, k, steps, a_step, b_step, FORMAT: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The float32 product of one tile over k elements in steps of BLOCK_K; elements past the k-th are not read.

    Pointers are to the first step, a_at [M, K] and b_at [K, N]; `*_step` elements further is the next.
    """
    inner = tl.arange(0, BLOCK_K)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        left = k - step * BLOCK_K
        a = operand(tl.load(a_at, mask=inner[None, :] < left, other=0.0), FORMAT, False, False)
        b = operand(tl.load(b_at, mask=inner[:, None] < left, other=0.0), FORMAT, False, False)
        accumulator = tl.dot(a, b, accumulator, input_precision="ieee")
        a_at += a_step
        b_at += b_step
    return accumulator


@triton.jit
def grouped_matmul_kernel(X, W, COUNTS, Y, rows, n, k, groups, row_tiles, steps,
                          TRANSPOSED: tl.constexpr, FORMAT: tl.constexpr, GROUPS: tl.constexpr,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(n, BLOCK_N), GROUP)
    starts, ends = extents(COUNTS, rows, groups, GROUPS, True)
    group, start, stop = rows_of_tile(row_tile, starts, ends, BLOCK_M, GROUPS)
    if start == stop:
        return
    height = (stop - start).to(tl.int32)
    if group == groups:
        steps = 0  # spare rows
    # Rows and columns beyond the edge repeat others and are not stored: loads along M and N need no mask.
    row, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    i = tl.minimum(row, height - 1)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = column % n
    x_at = X + start * k + i[:, None] * k + inner[None, :]
    matrix = W + group.to(tl.int64) * n * k
    if TRANSPOSED:
        accumulator = product(x_at, matrix + j.to(tl.int64)[None, :] * k + inner[:, None], k, steps, BLOCK_K, BLOCK_K,
                              FORMAT, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    else:
        accumulator = product(x_at, matrix + inner[:, None] * n + j[None, :], k, steps, BLOCK_K, BLOCK_K * n,
                              FORMAT, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    y_at = Y + start * n + row[:, None] * n + column[None, :]
    tl.store(y_at, narrow(accumulator, FORMAT), mask=(row < height)[:, None] & (column < n)[None, :])


@kernel(GroupedMatmul)
def grouped_matmul(op: GroupedMatmul, target: Target, x: Slot, w: Slot, counts: Slot, y: Slot) -> Launch | Declined:
    if x.dtype not in DTYPES:
        return Declined(f"operands of {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    (rows, k), groups, n = x.shape, w.shape[0], y.shape[1]
    aligned = k % 8 == 0 and (op.transpose_b or n % 8 == 0)
    tile = gemm(ceil_div(rows, max(1, groups)), n, groups, x.dtype.bits, aligned, target)
    row_tiles = rows // tile.m + min(groups + 1, rows)
    return Launch(
        grouped_matmul_kernel,
        grid=(row_tiles * ceil_div(n, tile.n),),
        arguments={
            **{"X": x, "W": w, "COUNTS": counts, "Y": y, "rows": rows, "n": n, "k": k},
            **{"groups": groups, "row_tiles": row_tiles, "steps": ceil_div(k, tile.k)},
        },
        constants={
            **{"TRANSPOSED": op.transpose_b, "FORMAT": x.format, "GROUPS": power_of_two(groups + 1)},
            **{"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group},
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fusion=True,
    )
