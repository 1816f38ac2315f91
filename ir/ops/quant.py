"""Tile and block quantisation, and matrix products of quantised operands. Codes and their scales are two ordinary tensors.

A tile is (rows, columns) of the last two axes: (1, 128) for activations, (128, 1) for their use in the weight gradient,
(128, 128) for weights (DeepSeek-V3 report, section 3.3.2). It is cut at the edge of its matrix and restarts at every matrix of
a stack. Scales are dequantisation factors: codes are multiplied by them, as by `weight_scale_inv` of the released weights.
"""

from __future__ import annotations

from ..core import Op, Value, op
from ..errors import require
from ..quantization import Accumulation, ScaleRule
from ..types import Dim, DType, Ragged, Shape, Tensor, Type, bound
from .rules import require_float, require_int

CODES = (DType.f8e4m3, DType.f8e5m2, DType.e5m6)
FLOAT32 = Accumulation("float32")


def tiles(extent: Dim, length: int) -> int:
    """How many tiles of `length` cover `extent`."""
    return -(-bound(extent) // length)


def scale_shape(shape: Shape, tile: tuple[int, int], groups: int = 0) -> Shape:
    """The shape of the scales of a tensor [..., rows, columns].

    Where rows are grouped and a tile spans several, tiles restart at each group: at most rows / tile + groups of them, and
    as many rows of scales are kept, the unused ones 0. Of ragged rows they are ragged themselves: `rows_by_128` of `rows`.
    """
    rows, columns = shape[-2:]
    if tile[0] == 1:
        return (*shape[:-1], tiles(columns, tile[1]))
    down: Dim = tiles(rows, tile[0]) if not groups else bound(rows) // tile[0] + groups
    if groups and isinstance(rows, Ragged):
        down = Ragged(f"{rows.name}_by_{tile[0]}", bound(down))
    return (*shape[:-2], down, tiles(columns, tile[1]))


def check_tile(x: Tensor, tile: tuple[int, int]) -> None:
    require(x.rank >= 2, f"expected [..., rows, columns], found {x}")
    require(len(tile) == 2 and min(tile) >= 1, f"a tile is [rows, columns], both 1 or more, found {list(tile)}")


def check_scales(codes: Tensor, scales: Tensor, tile: tuple[int, int], groups: int = 0) -> None:
    """Codes are of a quantised dtype, and scales are float32, one for each tile."""
    check_tile(codes, tile)
    require(codes.dtype in CODES, f"expected codes in {', '.join(map(str, CODES))}, found {codes}")
    expected = Tensor(DType.f32, scale_shape(codes.shape, tile, groups))
    restarting = f", restarting at each of {groups} groups," if groups and tile[0] > 1 else ""
    require(scales == expected, f"scales of {codes} in tiles of {list(tile)}{restarting} are {expected}, found {scales}")


@op("quantize", work=3)
class Quantize(Op):
    """Codes of x in `dtype` and the scale of each tile, by `rule`.

    x is [..., rows, columns] of any float dtype; `counts` (i32[groups]) says how many consecutive rows each group has, for tiles
    that span rows: they restart at each group.
    """

    x: Value
    counts: Value | None = None
    tile: tuple[int, int] = (1, 128)
    dtype: DType = DType.f8e4m3
    rule: ScaleRule = ScaleRule(floor=1e-4)

    def infer(self) -> tuple[Type, ...]:
        require_float(self.x)
        x = self.x.tensor
        check_tile(x, self.tile)
        require(self.dtype in CODES, f"expected one of {', '.join(map(str, CODES))}, found {self.dtype}")
        return Tensor(self.dtype, x.shape), Tensor(DType.f32, scale_shape(x.shape, self.tile, _groups(self.counts)))


@op("dequantize", work=1)
class Dequantize(Op):
    """codes * scale of their tile, in float32, rounded once to `dtype`."""

    codes: Value
    scales: Value
    counts: Value | None = None
    tile: tuple[int, int] = (1, 128)
    dtype: DType = DType.bf16

    def infer(self) -> tuple[Type, ...]:
        check_scales(self.codes.tensor, self.scales.tensor, self.tile, _groups(self.counts))
        require(self.dtype.is_float, f"expected a float dtype, found {self.dtype}")
        return (Tensor(self.dtype, self.codes.shape),)


@op("scaled_matmul")
class ScaledMatmul(Op):
    """c[..., m, n] = sum_k (a[..., m, k] * its scale) (b[n, k] * its scale): operands K-major, as tensor cores take them.

    `accumulation` says how the sum is formed: in float32, or as a tensor core does, with promotion (section 3.3.2 of the report).
    """

    a: Value
    a_scales: Value
    b: Value
    b_scales: Value
    a_tile: tuple[int, int] = (1, 128)
    b_tile: tuple[int, int] = (128, 128)
    accumulation: Accumulation = FLOAT32
    out: DType = DType.bf16

    def infer(self) -> tuple[Type, ...]:
        a, b = self.a.tensor, self.b.tensor
        check_scales(a, self.a_scales.tensor, self.a_tile)
        check_scales(b, self.b_scales.tensor, self.b_tile)
        require(b.rank == 2, f"expected b [n, k], found {b}")
        require(a.shape[-1] == b.shape[-1], f"inner dimensions differ: a is {a}, so k = {a.shape[-1]}, but b is {b}, so k = {b.shape[-1]}")
        return (Tensor(self.out, (*a.shape[:-1], b.shape[0])),)

    def flops(self) -> int:
        return 2 * self.result.tensor.size * bound(self.a.shape[-1])


@op("grouped_scaled_matmul")
class GroupedScaledMatmul(Op):
    """Row r of x[R, K] times the matrix of its group, w[E, N, K], both quantised, gives [R, N]: `grouped_matmul` of scaled operands.

    The first counts[0] rows are group 0, the next counts[1] rows group 1, ...; rows past the sum of the counts give 0. Tiles of x
    that span several rows restart at each group, as those of `quantize` with the same counts do. Where x is [E, M, K], in tiles of one
    row, each group has its own M rows, of which the first counts[e] are multiplied and the others give 0: [E, M, N]. It is what decoding
    uses, whose shapes stay the same from one token to the next ("masked" layout).
    """

    x: Value
    x_scales: Value
    w: Value
    w_scales: Value
    counts: Value
    x_tile: tuple[int, int] = (1, 128)
    w_tile: tuple[int, int] = (128, 128)
    accumulation: Accumulation = FLOAT32
    out: DType = DType.bf16

    def infer(self) -> tuple[Type, ...]:
        x, w = self.x.tensor, self.w.tensor
        check_scales(x, self.x_scales.tensor, self.x_tile, _groups(self.counts))
        check_scales(w, self.w_scales.tensor, self.w_tile)
        require_int(self.counts)
        require(x.rank in (2, 3) and w.rank == 3, f"expected x [R, K] or [E, M, K] and w [E, N, K], found {x} and {w}")
        require(x.shape[-1] == w.shape[2], f"inner dimensions differ: x is {x}, so k = {x.shape[-1]}, but w is {w}, so k = {w.shape[2]}")
        require(self.counts.shape == w.shape[:1], f"counts are {self.counts.type}, expected one for each of {w.shape[0]} groups")
        masked = x.rank == 2 or (x.shape[0] == w.shape[0] and self.x_tile[0] == 1)
        require(masked, f"expected x [E, M, K] with {w.shape[0]} groups, in tiles of one row, found {x} in tiles of {list(self.x_tile)}")
        return (Tensor(self.out, (*x.shape[:-1], w.shape[1])),)

    def flops(self) -> int:
        return 2 * self.result.tensor.size * bound(self.x.shape[-1])


@op("grouped_scaled_matmul_wgrad")
class GroupedScaledMatmulWgrad(Op):
    """For each group e, c[e, m, n] = sum over rows r of group e of (a[r, m] * its scale) (b[r, n] * its scale), summed in float32.

    `grouped_matmul_wgrad` of quantised operands: a[R, M] and b[R, N], their tiles restarting at each group as those of `quantize` with the
    same counts do, give [E, M, N]. It is the weight gradient of the experts in FP8 (DeepSeek-V3 report, section 3.3).
    """

    a: Value
    a_scales: Value
    b: Value
    b_scales: Value
    counts: Value
    a_tile: tuple[int, int] = (128, 1)
    b_tile: tuple[int, int] = (128, 1)
    accumulation: Accumulation = FLOAT32
    out: DType = DType.f32

    def infer(self) -> tuple[Type, ...]:
        a, b, groups = self.a.tensor, self.b.tensor, _groups(self.counts)
        check_scales(a, self.a_scales.tensor, self.a_tile, groups)
        check_scales(b, self.b_scales.tensor, self.b_tile, groups)
        require(a.rank == b.rank == 2 and a.shape[0] == b.shape[0], f"expected a [R, M] and b [R, N], found {a} and {b}")
        return (Tensor(self.out, (self.counts.shape[0], a.shape[1], b.shape[1])),)

    def flops(self) -> int:
        return 2 * self.a.tensor.size * bound(self.b.shape[1])


def _groups(counts: Value | None) -> int:
    if counts is None:
        return 0
    require_int(counts)
    require(counts.tensor.rank == 1, f"counts are {counts.type}, expected one number for each group")
    return bound(counts.shape[0])
