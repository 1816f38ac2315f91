"""Weight gradient of the experts: c[e, m, n] = sum over rows r of group e of a[r, m] b[r, n], in BF16, float16 or float32.

Layout        a [R, M], b [R, N], rows of group e consecutive, row-major; counts [E] integers; c [E, M, N], 0 for a group without rows
Accumulation  `product` of grouped_matmul.py over the rows of a group: float32, rounded once
Compared to   numpy_ref within gamma(rows of the group) sum |a||b|; exactly where all sums are small integers; floor: one read of a and b,
              one write of c
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.linalg import GroupedMatmulWgrad
from ..arithmetic import narrow
from ..groups import extents, rows_of_group
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, gemm, power_of_two
from .grouped_matmul import DTYPES, product
from .scaled_matmul import tile_of


@triton.jit
def grouped_matmul_wgrad_kernel(A, B, COUNTS, C, rows, m, n, groups, FORMAT: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr,
                                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    group = tl.program_id(1)
    starts, ends = extents(COUNTS, rows, groups, GROUPS, False)
    start, count, _ = rows_of_group(group, starts, ends, BLOCK_K, GROUPS)
    # Rows and columns of c beyond the edge repeat others and are not stored: loads along M and N need no mask.
    row, column = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    i, j, inner = row % m, column % n, tl.arange(0, BLOCK_K)
    a_at = A + start * m + inner[None, :] * m + i[:, None]
    b_at = B + start * n + inner[:, None] * n + j[None, :]
    accumulator = product(a_at, b_at, count, tl.cdiv(count, BLOCK_K), BLOCK_K * m, BLOCK_K * n, FORMAT, BLOCK_M, BLOCK_N, BLOCK_K)
    c_at = C + group.to(tl.int64) * m * n + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(c_at, narrow(accumulator, OUT), mask=(row < m)[:, None] & (column < n)[None, :])


@kernel(GroupedMatmulWgrad)
def grouped_matmul_wgrad(op: GroupedMatmulWgrad, target: Target, a: Slot, b: Slot, counts: Slot, c: Slot) -> Launch | Declined:
    if a.dtype not in DTYPES:
        return Declined(f"operands of {a.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    rows, (groups, m, n) = a.shape[0], c.shape
    tile = gemm(m, n, groups, a.dtype.bits, m % 8 == 0 and n % 8 == 0, target)
    return Launch(
        grouped_matmul_wgrad_kernel,
        grid=(ceil_div(m, tile.m) * ceil_div(n, tile.n), groups),
        arguments={"A": a, "B": b, "COUNTS": counts, "C": c, "rows": rows, "m": m, "n": n, "groups": groups},
        constants={
            **{"FORMAT": a.format, "OUT": c.format, "GROUPS": power_of_two(groups)},
            **{"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group},
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fusion=True,
    )
