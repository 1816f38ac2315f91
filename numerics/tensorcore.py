"""The tensor core's accumulator: what a GPU's matrix instruction keeps of a sum of FP8 products, bit for bit, on a CPU.

A reader finds `fused_dot_add` (one instruction), `scaled_matmul` and its grouped forms (block-scaled products with promotion), and `fma`
(float32 with one rounding). Models are `Accumulation` records (ir/quantization.py); those of real devices are in hardware/devices/.

One instruction adds `products` products and C in one node. Each operand is a significand and an exponent; a product has the exact product
of the significands (in [0, 4), not renormalised) and the sum of the exponents. All terms are aligned to the largest exponent among those
that are not zero, truncated toward zero at `fraction_bits` binary places, added exactly, and the normalised sum is truncated to
`result_bits` places. NaN, 0 * infinity and infinity - infinity give the pattern 0x7fffffff; a sum of zero is +0. The description is that of
"MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix Cores" (arXiv 2511.10909); for Hopper's FP8 it is what the DeepSeek-V3
report, section 3.5.2, and "Insights into DeepSeek-V3", section 3.1.1, describe in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..ir.errors import DscError, require
from ..ir.quantization import Accumulation
from .formats import BF16, F8E4M3, F8E5M2, F16, F32, Array, Format, round_to, round_to_odd, widen
from .scale import Floats, Tile, dequantize, scale_shape

ROWS, COLUMNS = 16, 256
"""Outputs worked on at a time: with 32 products per node the scratch is 512 kB in float32, and inner loops are long."""

NO_EXPONENT = -64
"""The exponent of a zero operand: with any other it stays below those of products of FP8 numbers (-28 and up), and it fits in a byte."""

NAN_PATTERN = np.uint32(0x7FFFFFFF)

FLOAT32 = Accumulation("float32")


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """float32 a * b + c, rounded once to nearest even; shapes broadcast.

    The product of two float32 is exact in float64. TwoSum (Knuth, TAOCP 2, 4.2.2) gives the sum and its rounding error, with which the sum
    is turned into its rounding to odd; narrowing that to float32 is the single rounding (Boldo and Melquiond 2008, theorem on 2p+2 bits).
    """
    with np.errstate(all="ignore"):
        product, addend = a.astype(np.float64) * b, np.asarray(c, np.float64)
        total = product + addend
        addend_part = total - product
        missing = (product - (total - addend_part)) + (addend - addend_part)
        round_to_odd(total, missing)
        return total.astype(np.float32)


def fused_dot_add(a: Array, b: Array, c: Floats, model: Accumulation) -> Floats:
    """One node: `a` [M, K] and `b` [N, K] FP8 codes with K at most `model.products`, `c` float32 [M, N]; returns float32 [M, N].

    `a` and `b` may be of different FP8 formats. Absent products count as zeros, which change nothing.
    """
    _check_operands(a, b)
    require(model.arithmetic == "tensor-core", f"accumulation {model.arithmetic!r}, expected 'tensor-core': only that has nodes")
    require(a.shape[1] <= model.products, f"{a.shape[1]} products for one node, expected at most {model.products}")
    require(c.shape == (len(a), len(b)), f"accumulator of shape {list(c.shape)}, expected {[len(a), len(b)]}")
    out = np.empty(c.shape, np.float32)
    for rows, columns, left, right in _output_blocks(a, b, model):
        out[rows, columns] = _Nodes(left, right, model).add(slice(0, a.shape[1]), c[rows, columns].astype(np.float32))
    return out


def scaled_matmul(
    a: Array,
    a_scales: Floats,
    b: Array,
    b_scales: Floats,
    a_tile: Tile = (1, 128),
    b_tile: Tile = (128, 128),
    model: Accumulation = FLOAT32,
    dtype: DTypeLike = np.float32,
) -> Array:
    """`a` [M, K] times `b` [N, K] transposed, both FP8 codes with the scales `quantize` gives for their tiles; [M, N] of `dtype`.

    `dtype` is float32, bfloat16 or float16, to which the float32 result is rounded at the end. Any M, N, K; tiles of any size.
    """
    _check_operands(a, b)
    for codes, scales, tile, name in ((a, a_scales, a_tile, "a"), (b, b_scales, b_tile, "b")):
        expected = scale_shape(codes.shape, tile)
        require(
            scales.shape == expected,
            f"scales {list(scales.shape)} of {name} {list(codes.shape)} in tiles {list(tile)}, expected {list(expected)}",
        )
    narrow = _OUTPUTS.get(np.dtype(dtype))
    if narrow is None:
        raise DscError(f"result type {np.dtype(dtype)}, expected one of {', '.join(map(str, _OUTPUTS.values()))}")
    if model.arithmetic == "tensor-core":
        out = np.empty((len(a), len(b)), np.float32)
        cublas_first = "b" if b_tile[0] == 1 and a_tile[0] != 1 else "a"
        for rows, columns, left, right in _output_blocks(a, b, model):
            row_scales = _Scales(a_scales[_tile_rows(rows, a_tile)].T[:, :, None], a_tile[1])
            column_scales = _Scales(b_scales[_tile_rows(columns, b_tile)].T[:, None, :], b_tile[1])
            nodes = _Nodes(left, right, model)
            out[rows, columns] = _accumulate(nodes, row_scales, column_scales, a.shape[1], model, cublas_first)
        return round_to(out, narrow)
    compute = np.float64 if model.arithmetic == "exact" else np.float32
    with np.errstate(all="ignore"):
        return round_to(dequantize(a, a_scales, a_tile, dtype=compute) @ dequantize(b, b_scales, b_tile, dtype=compute).T, narrow)


def grouped_scaled_matmul(
    a: Array,
    a_scales: Floats,
    b: Array,
    b_scales: Floats,
    groups: Sequence[int],
    a_tile: Tile = (1, 128),
    b_tile: Tile = (128, 128),
    model: Accumulation = FLOAT32,
    dtype: DTypeLike = np.float32,
) -> Array:
    """Rows of `a` [R, K] in consecutive `groups` (counts that add up to R), group e times `b[e]` of [E, N, K]; [R, N] of `dtype`.

    `a_scales` as `quantize(..., groups=groups)` gives them, `b_scales` [E, ...]. The products of the experts in Fprop and Dgrad.
    """
    _check_groups(groups, len(b), a.shape[0], "rows of a")
    out = np.empty((a.shape[0], b.shape[1]), dtype)
    row = scale_row = 0
    for expert, count in enumerate(groups):
        rows, scale_rows = slice(row, row + count), slice(scale_row, scale_row - (-count // a_tile[0]))
        out[rows] = scaled_matmul(a[rows], a_scales[scale_rows], b[expert], b_scales[expert], a_tile, b_tile, model, dtype)
        row, scale_row = rows.stop, scale_rows.stop
    return out


def grouped_scaled_matmul_k(
    a: Array,
    a_scales: Floats,
    b: Array,
    b_scales: Floats,
    groups: Sequence[int],
    a_tile: Tile = (1, 128),
    b_tile: Tile = (1, 128),
    model: Accumulation = FLOAT32,
    dtype: DTypeLike = np.float32,
) -> Array:
    """`a` [M, R] times `b` [N, R] transposed, separately over each of consecutive `groups` of R; [E, M, N] of `dtype`.

    The weight gradients of the experts (Wgrad): a and b are what `quantize(..., tile=(128, 1), groups=groups)` gives, transposed, so the
    tiles along R restart at each group. An empty group gives zeros.
    """
    _check_groups(groups, len(groups), a.shape[1], "columns of a")
    out = np.empty((len(groups), a.shape[0], b.shape[0]), dtype)
    start = a_start = b_start = 0
    for expert, count in enumerate(groups):
        k = slice(start, start + count)
        a_k, b_k = slice(a_start, a_start - (-count // a_tile[1])), slice(b_start, b_start - (-count // b_tile[1]))
        out[expert] = scaled_matmul(a[:, k], a_scales[:, a_k], b[:, k], b_scales[:, b_k], a_tile, b_tile, model, dtype)
        start, a_start, b_start = k.stop, a_k.stop, b_k.stop
    return out


_OUTPUTS: dict[np.dtype[Any], Format] = {F32.dtype: F32, BF16.dtype: BF16, F16.dtype: F16}


def _check_operands(a: Array, b: Array) -> None:
    for codes, name in ((a, "a"), (b, "b")):
        require(
            codes.dtype in (F8E4M3.dtype, F8E5M2.dtype) and codes.ndim == 2,
            f"operand {name} is {codes.dtype}{list(codes.shape)}, expected a matrix of {F8E4M3} or {F8E5M2}",
        )
    require(a.shape[1] == b.shape[1], f"operands of shapes {list(a.shape)} and {list(b.shape)}, expected equal last dimensions")


def _check_groups(groups: Sequence[int], count: int, size: int, what: str) -> None:
    require(
        len(groups) == count and sum(groups) == size and min(groups, default=0) >= 0,
        f"groups {list(groups)} for {count} experts and {size} {what}, expected one count per expert, {size} in all",
    )


class _Operand(NamedTuple):
    """A block of rows of one operand, decoded and transposed to [K, rows]: values with specials as zero, exponents; and the true values
    where some are NaN or infinite."""

    values: Array
    exponents: NDArray[np.int8]
    special: NDArray[np.float64] | None


@cache
def _decoding(dtype: np.dtype[Any], operands: str) -> tuple[Floats, NDArray[np.int8], NDArray[np.bool_]]:
    """By code: the value with specials as zero, its exponent, and whether it is special."""
    fmt = F8E4M3 if dtype == F8E4M3.dtype else F8E5M2
    values = widen(np.arange(256, dtype=np.uint8).view(dtype))
    special = ~np.isfinite(values)
    finite = np.where(special, np.float32(0), values)
    smallest = 1 - (fmt.bias if operands == "fp8" else F16.bias)
    exponents = np.maximum(np.frexp(finite)[1] - 1, smallest)
    return finite, np.where(finite == 0, NO_EXPONENT, exponents).astype(np.int8), special


def _decode(codes: Array, model: Accumulation) -> _Operand:
    finite, exponents, special = _decoding(codes.dtype, model.operands)
    patterns = np.ascontiguousarray(codes.T).view(np.uint8)
    true_values = widen(patterns.view(codes.dtype), np.float64) if special[patterns].any() else None
    return _Operand(finite[patterns].astype(_working_type(model), copy=False), exponents[patterns], true_values)


def _working_type(model: Accumulation) -> type[np.float32] | type[np.float64]:
    """float32 where sums of aligned terms, integers below 4 * (products + 1) * 2^fraction_bits, are exact in it."""
    return np.float32 if 4 * (model.products + 1) << model.fraction_bits <= 1 << 24 else np.float64


def _output_blocks(a: Array, b: Array, model: Accumulation) -> Iterator[tuple[slice, slice, _Operand, _Operand]]:
    width = max(1, min(len(b), max(COLUMNS, ROWS * COLUMNS // max(1, len(a)))))
    height = max(1, ROWS * COLUMNS // width)
    for j in range(0, len(b), width):
        columns = slice(j, min(j + width, len(b)))
        right = _decode(b[columns], model)
        for i in range(0, len(a), height):
            rows = slice(i, min(i + height, len(a)))
            yield rows, columns, _decode(a[rows], model), right


class _Nodes:
    """The nodes of one block of outputs [rows, columns], with their scratch.

    Every aligned term is an integer in units of 2^(largest exponent - fraction_bits), so floating-point addition is exact in any order, and
    truncating the normalised sum is clearing the low bits of its pattern.
    """

    def __init__(self, left: _Operand, right: _Operand, model: Accumulation) -> None:
        self.left, self.right, self.model = left, right, model
        self.single = left.values.dtype == np.float32
        shape = (min(model.products, max(1, len(left.values))), left.values.shape[1], right.values.shape[1])
        self.terms = np.empty(shape, left.values.dtype)
        self.exponents = np.empty(shape, np.int8)

    def add(self, k: slice, c: Floats) -> Floats:
        """The node of the products `k` and `c` [rows, columns]."""
        special = self._special(k, c)
        if special is not None:
            c = np.where(np.isfinite(c), c, np.float32(0))
        patterns = c.view(np.int32)
        exponent = np.maximum(((patterns >> 23) & 0xFF) - 127, -126)
        if k.stop > k.start:
            exponents = np.add(self.left.exponents[k, :, None], self.right.exponents[k, None, :], out=self.exponents[: k.stop - k.start])
            largest = exponents.max(axis=0)
            empty = largest < NO_EXPONENT // 2  # all products are zero: the sum is C, whose own exponent may be out of the range below
            np.maximum(exponent, largest, out=exponent)
            np.maximum(exponent, NO_EXPONENT, out=exponent)
            to_units, from_units = self._powers(self.model.fraction_bits - exponent), self._powers(exponent - self.model.fraction_bits)
            terms = np.multiply(self.left.values[k, :, None], self.right.values[k, None, :], out=self.terms[: k.stop - k.start])
            terms *= to_units
            np.trunc(terms, out=terms)
            total = terms.sum(axis=0)
            total += np.trunc(c * to_units)
            result = (self._cut(total) * from_units).astype(np.float32, copy=False)
        else:
            empty, result = np.ones(c.shape, np.bool_), c
        if empty.any():
            kept = min(self.model.fraction_bits, self.model.result_bits, 23)
            result = np.where(empty, (patterns & np.int32(-1 << (23 - kept))).view(np.float32), result)
        result += np.float32(0)  # -0 becomes +0
        if special is not None:
            nan = np.isnan(special)
            result = np.where(np.isfinite(special), result, special.astype(np.float32))
            result.view(np.uint32)[nan] = NAN_PATTERN
        return result

    def _special(self, k: slice, c: Floats) -> NDArray[np.float64] | None:
        """A float64 sum that is NaN or infinite exactly where the node's is; None where nothing is special. It cannot overflow."""
        if self.left.special is None and self.right.special is None and np.isfinite(c).all():
            return None
        left, right = (operand.values if operand.special is None else operand.special for operand in (self.left, self.right))
        with np.errstate(invalid="ignore"):
            total: NDArray[np.float64] = left[k].astype(np.float64).T @ right[k].astype(np.float64) + c
        return total

    def _powers(self, exponent: NDArray[np.int32]) -> Array:
        if self.single:
            return ((exponent + 127) << 23).view(np.float32)
        return ((exponent.astype(np.int64) + 1023) << 52).view(np.float64)

    def _cut(self, total: Array) -> Array:
        """`total` with its significand truncated to `result_bits` places."""
        if self.single:
            return (total.view(np.int32) & np.int32(-1 << (23 - self.model.result_bits))).view(np.float32)
        return (total.view(np.int64) & np.int64(-1 << (52 - self.model.result_bits))).view(np.float64)


class _Scales(NamedTuple):
    """Scales along K of a block of outputs, [tiles of K, rows, 1] or [tiles of K, 1, columns], and the elements of K in a tile."""

    values: Floats
    step: int

    def at(self, k: int) -> Floats:
        scales: Floats = self.values[k // self.step]
        return scales


def _tile_rows(rows: slice, tile: Tile) -> NDArray[np.intp]:
    return np.arange(rows.start, rows.stop) // tile[0]


def _accumulate(nodes: _Nodes, a: _Scales, b: _Scales, size: int, model: Accumulation, first: str) -> Floats:
    """The float32 result of one block of outputs: nodes over K, promoted every `model.interval` elements."""
    shape = np.broadcast_shapes(a.values.shape[1:], b.values.shape[1:])
    accumulator, partial = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    steps = [step for step in (a.step, b.step, model.interval) if step]
    start = 0
    with np.errstate(all="ignore"):
        while start < size:
            stop = min(size, *(start - start % step + step for step in steps))
            for k in range(start, stop, model.products):
                partial = nodes.add(slice(k, min(k + model.products, stop)), partial)
            if stop == size or (model.interval and stop % model.interval == 0):
                accumulator = _promote(accumulator, partial, a.at(start), b.at(start), model.formula, first)
                partial = np.zeros(shape, np.float32)
            elif stop % a.step == 0 or stop % b.step == 0:
                partial = partial * ((a.at(start) * b.at(start)) / (a.at(stop) * b.at(stop)))
            start = stop
    return accumulator


def _promote(accumulator: Floats, partial: Floats, a: Floats, b: Floats, formula: str, first: str) -> Floats:
    if formula == "deepgemm":
        return fma(a * b, partial, accumulator)
    if formula == "cublas":
        return fma(partial * a, b, accumulator) if first == "a" else fma(partial * b, a, accumulator)
    return accumulator + (partial * a) * b
