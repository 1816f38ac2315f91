"""Block-scaled matrix product of FP8 operands, both K-major: c[m, n] = sum_k (a[m, k] * its scale) (b[n, k] * its scale).

Layout        a [M, K], b [N, K] codes; scales row-major float32 over tiles [ta, T] of a and [tb, T] of b; c [M, N]
Accumulation  one tensor-core sum p over T elements of K, then promotion into float32 registers, by the op's formula:
              deepgemm  acc = fma(sa * sb, p, acc)
              cublas    acc = fma(p * s1, s2, acc), s1 the scale that is per row (that of a if both are)
              unfused   acc = acc + (p * sa) * sb, each operation rounded
              On Hopper p has 13 fraction bits (DeepSeek-V3 report, section 3.5.2), in the interpreter it is a float32 sum;
              c is rounded once, and again where something is added on top (ADDED)
Compared to   numpy_ref within gamma(K + 4) sum |a||b|; exactly where all sums are small integers and scales powers of two
CDNA3 reads E4M3 with bias 8 and has no -0: stored codes count half there, so -0 is cleared and the scale is times 4 (FNUZ). A target
without FP8 instructions widens codes to BF16, which is exact (DEQUANTIZE).
Large products on Hopper run specialised: of the four groups of warps one copies tiles by tensor descriptors (TMA), two multiply 64 rows
each and promote on their own, so that one promotes while the other multiplies, as in DeepGEMM. Programs persist, one on each unit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.fused import ScaledMatmulAdd
from ....ir.ops.quant import ScaledMatmul
from ....ir.quantization import Accumulation
from ....ir.types import DType
from ..arithmetic import INTERPRET, narrow, plus, to_bf16, widen
from ..jit import device
from ..registry import Argument, Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, scaled_gemm


@device
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of the program's tile: GROUP rows of tiles are walked column by column, so that both operands stay in the L2 cache."""
    width = GROUP * tiles_n
    first = program // width * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + program % width % height, program % width // height


@device
def operand(codes, FORMAT: tl.constexpr, FNUZ: tl.constexpr, DEQUANTIZE: tl.constexpr):
    """Codes as the matrix instruction takes them; for the interpreter, which misreads NaN, as the numbers that they are."""
    if INTERPRET:
        return widen(codes, FORMAT)
    elif DEQUANTIZE:
        return to_bf16(widen(codes, FORMAT))
    elif FNUZ:
        pattern = codes.to(tl.uint8, bitcast=True)
        return tl.where(pattern == 0x80, 0, pattern).to(tl.uint8).to(tl.float8e4b8, bitcast=True)
    else:
        return codes


@device
def promote(partial, a_scale, b_scale, accumulator, FORMULA: tl.constexpr, A_FIRST: tl.constexpr):
    """The accumulator [M, N] with the partial sum added, scaled by a_scale [M] and b_scale [N] or one number."""
    a, b = a_scale[:, None], b_scale
    if len(b_scale.shape) == 1:
        b = b_scale[None, :]
    if FORMULA == "deepgemm":
        return tl.fma(partial, a * b, accumulator)
    elif FORMULA == "cublas":
        if A_FIRST:
            return tl.fma(partial * a, b, accumulator)
        else:
            return tl.fma(partial * b, a, accumulator)
    else:
        return accumulator + (partial * a) * b


@device
def scaled_product(a_at, sa_at, b_at, sb_at, k, steps, a_step, sa_step, b_step, sb_step,
                   FORMULA: tl.constexpr, A_FIRST: tl.constexpr, FORMAT_A: tl.constexpr, FORMAT_B: tl.constexpr,
                   FNUZ: tl.constexpr, DEQUANTIZE: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The float32 product of one tile over k elements, promoted in each of `steps` steps of BLOCK_K; elements past the k-th are not read.

    Pointers are to the first step, a_at [M, K], b_at [K, N], sa_at [M], sb_at [N] or one; `*_step` elements further is the next.
    """
    inner = tl.arange(0, BLOCK_K)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        left = k - step * BLOCK_K
        a = operand(tl.load(a_at, mask=inner[None, :] < left, other=0.0), FORMAT_A, FNUZ, DEQUANTIZE)
        b = operand(tl.load(b_at, mask=inner[:, None] < left, other=0.0), FORMAT_B, FNUZ, DEQUANTIZE)
        partial = tl.dot(a, b)
        a_scale, b_scale = tl.load(sa_at + step * sa_step), tl.load(sb_at + step * sb_step)
        if FNUZ:
            a_scale = a_scale * 4.0
        accumulator = promote(partial, a_scale, b_scale, accumulator, FORMULA, A_FIRST)
        a_at += a_step
        b_at += b_step
    return accumulator


@device
def described_product(a_rows, row, b_rows, column, sa_at, sb_at, steps,
                      FORMULA: tl.constexpr, A_FIRST: tl.constexpr, FORMAT_A: tl.constexpr, FORMAT_B: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """As `scaled_product`, of tiles that descriptors of the matrices copy from `row` and `column` on: zeros past the edges."""
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        a_scale, b_scale = tl.load(sa_at + step), tl.load(sb_at + step)  # first: behind the product the promotion would wait for them
        a = operand(a_rows.load([row, step * BLOCK_K]), FORMAT_A, False, False)
        b = operand(b_rows.load([column, step * BLOCK_K]), FORMAT_B, False, False)
        accumulator = promote(tl.dot(a, tl.trans(b)), a_scale, b_scale, accumulator, FORMULA, A_FIRST)
    return accumulator


@triton.jit
def scaled_matmul_specialized_kernel(A, SA, B, SB, ADDED, C, m, n, k, steps, tiles,
                                     TILE_A: tl.constexpr, TILE_B: tl.constexpr, FORMULA: tl.constexpr, FORMAT_A: tl.constexpr,
                                     FORMAT_B: tl.constexpr, OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                                     BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PLUS: tl.constexpr):  # fmt: skip
    a_rows = tl.make_tensor_descriptor(A, [m, k], [k, 1], [BLOCK_M, BLOCK_K])
    b_rows = tl.make_tensor_descriptor(B, [n, k], [k, 1], [BLOCK_N, BLOCK_K])
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=False, warp_specialize=True):
        row_tile, column_tile = tile_of(tile, tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
        row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        sa_at = SA + (tl.minimum(row, m - 1) // TILE_A).to(tl.int64) * steps
        sb_at = SB + (column_tile * BLOCK_N // TILE_B).to(tl.int64) * steps
        accumulator = described_product(a_rows, row_tile * BLOCK_M, b_rows, column_tile * BLOCK_N, sa_at, sb_at, steps,
                                        FORMULA, TILE_A == 1 or TILE_B != 1, FORMAT_A, FORMAT_B, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        at = row.to(tl.int64)[:, None] * n + column[None, :]
        inside = (row < m)[:, None] & (column < n)[None, :]
        tl.store(C + at, narrow(plus(accumulator, ADDED, at, inside, OUT, PLUS), OUT), mask=inside)


@triton.jit
def scaled_matmul_kernel(A, SA, B, SB, ADDED, C, m, n, k, steps,
                         TILE_A: tl.constexpr, TILE_B: tl.constexpr, FORMULA: tl.constexpr, FORMAT_A: tl.constexpr, FORMAT_B: tl.constexpr,
                         OUT: tl.constexpr, FNUZ: tl.constexpr, DEQUANTIZE: tl.constexpr,
                         BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
                         PLUS: tl.constexpr):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    # Rows beyond the edge wrap around and are not stored: loads along M and N need no mask.
    i = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)) % m
    j = (column_tile * BLOCK_N + tl.arange(0, BLOCK_N)) % n
    inner = tl.arange(0, BLOCK_K)
    a_at = A + i.to(tl.int64)[:, None] * k + inner[None, :]
    b_at = B + j.to(tl.int64)[None, :] * k + inner[:, None]
    sa_at = SA + (i // TILE_A).to(tl.int64) * steps
    if TILE_B % BLOCK_N == 0:
        sb_at = SB + (column_tile * BLOCK_N // TILE_B).to(tl.int64) * steps
    else:
        sb_at = SB + (j // TILE_B).to(tl.int64) * steps
    accumulator = scaled_product(a_at, sa_at, b_at, sb_at, k, steps, BLOCK_K, 1, BLOCK_K, 1,
                                 FORMULA, TILE_A == 1 or TILE_B != 1, FORMAT_A, FORMAT_B, FNUZ, DEQUANTIZE,
                                 BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(C + at, narrow(plus(accumulator, ADDED, at, inside, OUT, PLUS), OUT), mask=inside)


FP8 = (DType.f8e4m3, DType.f8e5m2)


def declined(
    a: Slot, b: Slot, a_tile: tuple[int, int], b_tile: tuple[int, int], accumulation: Accumulation, target: Target
) -> Declined | None:
    """Why a product of operands so quantised does not suit a kernel that promotes once per tile along K; None where it does.

    Tiles are given as those of a [M, K] and b [N, K].
    """
    if accumulation.arithmetic == "exact":
        return Declined("exact accumulation, which no matrix instruction has")
    step = a_tile[1]
    interval = step if accumulation.arithmetic == "float32" else accumulation.interval
    if step != b_tile[1] or step & (step - 1) or not 32 <= step <= 256:
        return Declined(f"tiles of {a_tile[1]} and {b_tile[1]} along K, expected one power of two from 32 to 256")
    if interval != step:
        return Declined(f"promotion every {interval} elements of K, expected every {step}, where the scales change")
    if a.dtype not in FP8 or b.dtype not in FP8:
        return Declined(f"operands of {a.dtype} and {b.dtype}, expected FP8")
    if target.fp8 == "fnuz" and (a.dtype, b.dtype) != (DType.f8e4m3, DType.f8e4m3):
        return Declined(f"operands of {a.dtype} and {b.dtype}, expected f8e4m3 on {target.name}: its E5M2 has another bias")
    return None


@kernel(ScaledMatmul)
def scaled_matmul(op: ScaledMatmul, target: Target, a: Slot, a_scales: Slot, b: Slot, b_scales: Slot, c: Slot) -> Launch | Declined:
    return scaled_matmul_add(op, target, a, a_scales, b, b_scales, None, c)


@kernel(ScaledMatmulAdd)
def scaled_matmul_add(
    op: ScaledMatmul, target: Target, a: Slot, a_scales: Slot, b: Slot, b_scales: Slot, added: Slot | None, c: Slot
) -> Launch | Declined:
    accumulation = op.accumulation
    if reason := declined(a, b, op.a_tile, op.b_tile, accumulation, target):
        return reason
    if op.a_tile[0] > 1 and len(a.shape) > 2:
        return Declined(f"tiles of {op.a_tile[0]} rows over a stack of matrices, expected tiles of one row")
    a, b = a.on(target), b.on(target)
    m, n, k = c.size // max(1, c.shape[-1]), c.shape[-1], a.shape[-1]
    tile = scaled_gemm(m, n, k, op.a_tile[1], target, scale_rows=op.b_tile[0], specialize=True)
    tiles = ceil_div(m, tile.m) * ceil_div(n, tile.n)
    arguments: dict[str, Argument] = {
        "A": a,
        "SA": a_scales,
        "B": b,
        "SB": b_scales,
        "ADDED": c if added is None else added,
        "C": c,
        "m": m,
        "n": n,
        "k": k,
        "steps": ceil_div(k, tile.k),
    }
    constants = {
        **{"TILE_A": op.a_tile[0], "TILE_B": op.b_tile[0], "FORMULA": accumulation.formula},
        **{"FORMAT_A": a.format, "FORMAT_B": b.format, "OUT": c.format},
        **{"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group, "PLUS": added is not None},
    }
    fusion = accumulation.formula != "unfused"
    if tile.specialized:
        return Launch(
            scaled_matmul_specialized_kernel,
            grid=(min(tiles, target.units),),
            arguments=arguments | {"tiles": tiles},
            constants=constants,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            fusion=fusion,
            described=("A", "B"),
        )
    return Launch(
        scaled_matmul_kernel,
        grid=(tiles,),
        arguments=arguments,
        constants=constants | {"FNUZ": target.fp8 == "fnuz", "DEQUANTIZE": target.fp8 == "none"},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fusion=fusion,
    )
